// y = x W^T + bias + LoRA, and the output matmul fused with cross-entropy: both walk the outputs
// panel by panel and hand each finished tile to a sink. Tangents are rows like all others, without
// bias.

// Calls f(product) with the route for this weight. Unless exact fp32 arithmetic is asked for,
// quantized weights meet int8 activations, or bf16 ones where that is the instruction set, and so
// do BF16 weights then. The rounding of a primal would be that of all its tangents, so its rows are
// among the first ``refined`` ones, which int8 takes more exactly.
template <typename F>
inline void with_product(const float* x, int64_t rows, [[maybe_unused]] int64_t refined,
                         const int32_t* references, const Weight& w, bool exact, const F& f) {
#if defined(__AVX512BF16__)
    const bool fast = !exact && w.type != F32 && w.type != F16;
    if (fast) f(DenseProduct<BFloat16>(x, rows, references, w));
#else
    const bool fast = !exact && with_codec(w.type, [&](auto codec) {
        f(Int8Product<decltype(codec)>(x, rows, refined, references, w));
    });
#endif
    if (!fast) f(DenseProduct<Float32>(x, rows, nullptr, w));
}

// Tasks per thread at least, so that a thread that is late to start costs little.
constexpr int64_t kTasksPerThread = 2;

// Calls body(out0, n) for equal shares of the panels, a multiple of the threads.
template <typename Product, typename F>
inline void for_each_share(const Product& product, const F& body) {
    const int64_t width = product.panel_outputs, n_out = product.w.n_out;
    const int64_t n_panels = ceil_div(n_out, width), threads = num_threads();
    const int64_t least =
        max_of(ceil_div(n_panels, product.panels_at_once()), kTasksPerThread * threads);
    const int64_t n_tasks = min_of(n_panels, ceil_div(least, threads) * threads);
    parallel_for(n_tasks, [&](int64_t task) {
        const int64_t out0 = task * n_panels / n_tasks * width;
        body(out0, min_of((task + 1) * n_panels / n_tasks * width, n_out) - out0);
    });
}

template <typename Product>
inline void multiply(const Product& product, const float* bias, int64_t biased_rows,
                     const LoraTerm* term, float* y) {
    const int64_t n_out = product.w.n_out;
    const auto write = [&](int64_t row0, int64_t n_rows, int64_t out0, int64_t n, const float* c,
                           int64_t stride) {
        for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
            float* to = y + r * n_out + out0;
            const float* base = bias && r < biased_rows ? bias + out0 : nullptr;
            if (is_difference(product.references, r))
                base = y + product.references[r] * n_out + out0;
            for (int64_t j = 0; j < n; j += kWidth) {
                const int64_t m = min_of<int64_t>(kWidth, n - j);
                const VF v = load(c + j);
                store_first(to + j, base ? load_first(base + j, m) + v : v, m);
            }
        }
    };
    for_each_share(product, [&](int64_t out0, int64_t n) {
        product.run(out0, n, write);
        if (term) term->add(out0, n, y);
    });
}

// y = x W^T + bias + LoRA; without one, lora is null.
void matmul(const float* x, int64_t rows, const int32_t* references, const Weight& w,
            const float* bias, const LoRA* lora, const Lanes& lanes, bool exact, float* y) {
    const int64_t biased_rows = rows / (1 + lanes.n_tangents());
    with_product(x, rows, lanes.tangents ? biased_rows : 0, references, w, exact,
                 [&](const auto& product) {
                     if (lora) {
                         const LoraTerm term(x, rows, w.n_in, w.n_out, *lora, lanes);
                         multiply(product, bias, biased_rows, &term, y);
                     } else {
                         multiply(product, bias, biased_rows, nullptr, y);
                     }
                 });
}

// Outputs per partial softmax. Fixed, so that neither threads nor cache sizes change a result.
constexpr int64_t kVocabChunk = 256;

struct PartialSoftmax {
    double sum;  // of exp(logit - max); of a tangent, those times its logits
    float max;
};

// keep: exp(logit - max) takes the place of the logits, for extend_tangent.
inline void extend(PartialSoftmax* p, float* logits, int64_t n, bool keep) {
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
        if (keep) store_first(logits + j, load(e), m);
    }
    p->sum += sum(total);
}

// The same of a tangent, for the logits its primal was extended by last and has kept.
inline void extend_tangent(PartialSoftmax* p, const PartialSoftmax& primal, const float* kept,
                           const float* tangent, int64_t n) {
    if (p->max != primal.max) {
        p->sum *= __builtin_exp((double)p->max - primal.max);
        p->max = primal.max;
    }
    VF total = {};
    for (int64_t j = 0; j < n; j += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - j);
        total = fmadd(load_first(kept + j, m), load_first(tangent + j, m), total);
    }
    p->sum += sum(total);
}

// nll[r] = log sum_j exp(logit[r, j]) - logit[r, labels[r]], logits = x W^T, of which only one
// panel of outputs exists at a time. Of a tangent sum_j p[j] dlogit[r, j] - dlogit[r, labels[r]]
// with the softmax p of its primal.
void cross_entropy(const float* x, int64_t rows, const int32_t* references, int64_t tangents,
                   const Weight& w, const int32_t* labels, bool exact, double* nll) {
    const int64_t primal = rows / (1 + tangents);
    const int64_t n_chunks = ceil_div(w.n_out, kVocabChunk);
    Buffer partial_buffer(n_chunks * rows * (int64_t)sizeof(PartialSoftmax)),
        label_buffer(rows * 4), sum_buffer(primal * 8);
    auto* sums = (double*)sum_buffer.data;
    auto* partial = (PartialSoftmax*)partial_buffer.data;
    auto* label_logit = (float*)label_buffer.data;
    with_product(x, rows, tangents > 0 ? primal : 0, references, w, exact,
                 [&](const auto& product) {
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
                                 const int64_t label = labels[r] - out0;
                                 if (label >= 0 && label < n) label_logit[r] = to[label];
                                 if (r < primal)
                                     extend(mine + r, to, n, tangents > 0);
                                 else
                                     extend_tangent(mine + r, mine[r % primal],
                                                    logits + r % primal * width, to, n);
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
        if (r < primal) {
            nll[r] = __builtin_log(total) + max - label_logit[r];
            sums[r] = total;
        } else {
            nll[r] = total / sums[r % primal] - label_logit[r];
        }
    }
}
