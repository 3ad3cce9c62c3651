// y = x W^T + bias, and the output matmul fused with cross-entropy: both walk the outputs panel
// by panel and hand each finished tile to a sink.

// Bytes of decoded weights kept for one sweep over the activations: half of a common 512 KiB L2,
// so that a tile of activations, read from there too, serves several panels.
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int64_t kF32Depth = 512;  // K per decoded fp32 panel: 512 x 32 outputs = 64 KiB

struct Buffer {  // freed at the end of the call
    void* data;
    explicit Buffer(int64_t bytes) : data(allocate(bytes)) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { release(data); }
};

// A product of packed activations with W. run() calls sink(row0, n_rows, out0, n_outs, tile,
// stride) for all tiles of outputs out0 .. out0+n, rows ascending. references: see dispatch.h; the
// tile of a row that has one holds the product of the difference. fp32 products have none.
struct F32Product {
    const Weight& w;
    int64_t rows;
    const int32_t* references = nullptr;
    Buffer tiles;
    static constexpr int panel_outputs = kF32Outputs;

    F32Product(const float* x, int64_t rows, const Weight& w)
        : w(w), rows(rows), tiles(ceil_div(rows, kRows) * kRows * w.n_in * 4) {
        float* packed = (float*)tiles.data;
        parallel_for(ceil_div(rows, kRows), [&](int64_t t) {
            const int64_t row0 = t * kRows;
            pack_tile_f32(x + row0 * w.n_in, min_of<int64_t>(kRows, rows - row0), w.n_in,
                          packed + row0 * w.n_in);
        });
    }

    int64_t outputs_at_once() const { return panel_outputs; }

    template <typename Sink>
    void run(int64_t out0, int64_t n, const Sink& sink) const {
        const int64_t n_tiles = ceil_div(rows, kRows), c_size = kRows * kF32Outputs;
        float* panel = (float*)thread_scratch(4 * (kF32Depth * kF32Outputs + n_tiles * c_size));
        float* c = panel + kF32Depth * kF32Outputs;
        __builtin_memset(c, 0, 4 * n_tiles * c_size);
        for (int64_t first = 0; first < w.n_in; first += kF32Depth) {
            const int64_t k = min_of(kF32Depth, w.n_in - first);
            pack_panel_f32(w, out0, n, first, k, panel);
            for (int64_t t = 0; t < n_tiles; ++t) {
                const float* tile = (const float*)tiles.data + t * kRows * w.n_in + first * kRows;
                multiply_f32(tile, panel, k, c + t * c_size);
            }
        }
        for (int64_t t = 0; t < n_tiles; ++t)
            sink(t * kRows, min_of<int64_t>(kRows, rows - t * kRows), out0, n, c + t * c_size,
                 kF32Outputs);
    }
};

template <typename Codec>
struct Int8Product {
    const Weight& w;
    int64_t rows;
    const int32_t* references;
    Buffer tiles;
    static constexpr int panel_outputs = kInt8Outputs;

    Int8Product(const float* x, int64_t rows, const int32_t* references, const Weight& w)
        : w(w),
          rows(rows),
          references(references),
          tiles(ceil_div(rows, kRows) * (w.n_in / 32) * sizeof(TileGroup<Codec>)) {
        auto* packed = (TileGroup<Codec>*)tiles.data;
        parallel_for(ceil_div(rows, kRows), [&](int64_t t) {
            const int64_t row0 = t * kRows;
            pack_tile_int8<Codec>(x, row0, min_of<int64_t>(kRows, rows - row0), references, w.n_in,
                                  packed + t * (w.n_in / 32));
        });
    }

    int64_t outputs_at_once() const {
        const int64_t panel = w.n_in / 32 * (int64_t)sizeof(PanelGroup<Codec>);
        return kInt8Outputs * max_of<int64_t>(1, min_of<int64_t>(16, kPanelBytes / panel));
    }

    template <typename Sink>
    void run(int64_t out0, int64_t n, const Sink& sink) const {
        const int64_t groups = w.n_in / 32, n_panels = ceil_div(n, kInt8Outputs);
        auto* panels =
            (PanelGroup<Codec>*)thread_scratch(n_panels * groups * sizeof(PanelGroup<Codec>));
        for (int64_t p = 0; p < n_panels; ++p)
            pack_panel_int8<Codec>(w, out0 + p * kInt8Outputs,
                                   min_of<int64_t>(kInt8Outputs, n - p * kInt8Outputs),
                                   panels + p * groups);
        float c[kRows * kInt8Outputs];
        for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
            const auto* tile = (const TileGroup<Codec>*)tiles.data + row0 / kRows * groups;
            for (int64_t p = 0; p < n_panels; ++p) {
                multiply_int8<Codec>(tile, panels + p * groups, groups, c);
                sink(row0, min_of<int64_t>(kRows, rows - row0), out0 + p * kInt8Outputs,
                     min_of<int64_t>(kInt8Outputs, n - p * kInt8Outputs), c, kInt8Outputs);
            }
        }
    }
};

// Calls f(product) with the route for this weight: int8 activations for quantized weights unless
// exact fp32 arithmetic is asked for.
template <typename F>
inline void with_product(const float* x, int64_t rows, const int32_t* references, const Weight& w,
                         bool exact, const F& f) {
    const bool done = !exact && with_codec(w.type, [&](auto codec) {
        f(Int8Product<decltype(codec)>(x, rows, references, w));
    });
    if (!done) f(F32Product(x, rows, w));
}

void matmul(const float* x, int64_t rows, const int32_t* references, const Weight& w,
            const float* bias, bool exact, float* y) {
    with_product(x, rows, references, w, exact, [&](const auto& product) {
        const auto write = [&](int64_t row0, int64_t n_rows, int64_t out0, int64_t n,
                               const float* c, int64_t stride) {
            for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
                float* to = y + r * w.n_out + out0;
                const float* base = bias ? bias + out0 : nullptr;
                if (is_difference(product.references, r))
                    base = y + product.references[r] * w.n_out + out0;
                for (int64_t j = 0; j < n; ++j) to[j] = base ? base[j] + c[j] : c[j];
            }
        };
        const int64_t at_once = product.outputs_at_once();
        parallel_for(ceil_div(w.n_out, at_once), [&](int64_t task) {
            const int64_t out0 = task * at_once;
            product.run(out0, min_of(at_once, w.n_out - out0), write);
        });
    });
}

// Outputs per partial softmax. Fixed, so that neither threads nor cache sizes change a result.
constexpr int64_t kVocabChunk = 256;

struct PartialSoftmax {
    double sum;  // of exp(logit - max)
    float max;
};

inline void extend(PartialSoftmax* p, const float* logits, int64_t n) {
    VF top = splat(p->max);
    for (int64_t j = 0; j < n; j += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - j);
        VF v = load_first(logits + j, m);
        for (int64_t i = m; i < kWidth; ++i) v[i] = logits[0];
        top = select(v != v, v, select(top != top, top, vmax(top, v)));
    }
    float max = top[0];
    for (int i = 1; i < kWidth; ++i) max = !(top[i] <= max) ? top[i] : max;
    if (max > p->max || max != max) {
        p->sum *= __builtin_exp((double)p->max - max);
        p->max = max;
    }
    VF total = {};
    for (int64_t j = 0; j < n; j += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - j);
        float e[kWidth] = {};
        store_first(e, vexp(load_first(logits + j, m) - splat(p->max)), m);
        total += load(e);
    }
    p->sum += sum(total);
}

// nll[r] = log sum_j exp(logit[r, j]) - logit[r, labels[r]], logits = x W^T, of which only one
// panel of outputs exists at a time.
void cross_entropy(const float* x, int64_t rows, const int32_t* references, const Weight& w,
                   const int32_t* labels, bool exact, double* nll) {
    const int64_t n_chunks = ceil_div(w.n_out, kVocabChunk);
    Buffer partial_buffer(n_chunks * rows * (int64_t)sizeof(PartialSoftmax)),
        label_buffer(rows * 4);
    auto* partial = (PartialSoftmax*)partial_buffer.data;
    auto* label_logit = (float*)label_buffer.data;
    with_product(x, rows, references, w, exact, [&](const auto& product) {
        parallel_for(n_chunks, [&](int64_t chunk) {
            const int64_t width = product.panel_outputs;
            Buffer logit_buffer(rows * width * 4);
            float* logits = (float*)logit_buffer.data;
            PartialSoftmax* mine = partial + chunk * rows;
            for (int64_t r = 0; r < rows; ++r) mine[r] = {0.0, -__builtin_inff()};
            const auto add = [&](int64_t row0, int64_t n_rows, int64_t out0, int64_t n,
                                 const float* c, int64_t stride) {
                for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
                    float* to = logits + r * width;
                    __builtin_memcpy(to, c, 4 * n);
                    if (is_difference(product.references, r))
                        for (int64_t j = 0; j < n; ++j)
                            to[j] += logits[product.references[r] * width + j];
                    extend(mine + r, to, n);
                    const int64_t label = labels[r] - out0;
                    if (label >= 0 && label < n) label_logit[r] = to[label];
                }
            };
            const int64_t end = min_of((chunk + 1) * kVocabChunk, w.n_out);
            for (int64_t out0 = chunk * kVocabChunk; out0 < end; out0 += width)
                product.run(out0, min_of(width, end - out0), add);
        });
    });
    for (int64_t r = 0; r < rows; ++r) {
        float max = partial[r].max;
        for (int64_t i = 1; i < n_chunks; ++i) {
            const float m = partial[i * rows + r].max;
            if (!(m <= max)) max = m;
        }
        double total = 0;
        for (int64_t i = 0; i < n_chunks; ++i)
            total +=
                partial[i * rows + r].sum * __builtin_exp((double)partial[i * rows + r].max - max);
        nll[r] = __builtin_log(total) + max - label_logit[r];
    }
}
