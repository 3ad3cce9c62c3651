// Row-wise operations: norms, rotary embedding, activations.

constexpr int64_t kRowsPerTask = 16;         // of a norm or rotary embedding
constexpr int64_t kElementsPerTask = 16384;  // of an activation: 3 arrays of 64 KiB

template <typename F>
inline void for_each_row(int64_t rows, const F& body) {
    parallel_for(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
        for (int64_t r = task * kRowsPerTask; r < min_of(rows, (task + 1) * kRowsPerTask); ++r)
            body(r);
    });
}

void rms_norm(const float* x, int64_t rows, int64_t d, const float* weight, float eps, float* y) {
    for_each_row(rows, [=](int64_t r) {
        const float* from = x + r * d;
        VF squares = {};
        for (int64_t i = 0; i < d; i += kWidth) {
            const VF v = load_first(from + i, min_of<int64_t>(kWidth, d - i));
            squares = fmadd(v, v, squares);
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + eps);
        for (int64_t i = 0; i < d; ++i) y[r * d + i] = from[i] * scale * weight[i];
    });
}

void layer_norm(const float* x, int64_t rows, int64_t d, const float* weight, const float* bias,
                float eps, float* y) {
    for_each_row(rows, [=](int64_t r) {
        const float* from = x + r * d;
        VF total = {};
        for (int64_t i = 0; i < d; i += kWidth)
            total += load_first(from + i, min_of<int64_t>(kWidth, d - i));
        const float mean = sum(total) / (float)d;
        VF squares = {};
        for (int64_t i = 0; i < d; i += kWidth) {
            const int64_t m = min_of<int64_t>(kWidth, d - i);
            float centred[kWidth] = {};
            store_first(centred, load_first(from + i, m) - splat(mean), m);
            squares = fmadd(load(centred), load(centred), squares);
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + eps);
        for (int64_t i = 0; i < d; ++i)
            y[r * d + i] = (from[i] - mean) * scale * weight[i] + bias[i];
    });
}

// Rotates the first 2 * half dimensions of each head; cos, sin [n_positions, half].
void rope(const float* x, int64_t rows, int64_t width, int64_t head_dim, int64_t half,
          const int32_t* positions, const float* cos, const float* sin, bool interleaved,
          float* y) {
    const int64_t stride = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
    for_each_row(rows, [=](int64_t r) {
        const float* c = cos + positions[r] * half;
        const float* s = sin + positions[r] * half;
        for (int64_t h = 0; h < width; h += head_dim) {
            const float* from = x + r * width + h;
            float* to = y + r * width + h;
            for (int64_t i = 0; i < half; ++i) {
                const float a = from[i * stride], b = from[i * stride + partner];
                to[i * stride] = a * c[i] - b * s[i];
                to[i * stride + partner] = a * s[i] + b * c[i];
            }
            for (int64_t i = 2 * half; i < head_dim; ++i) to[i] = from[i];
        }
    });
}

template <typename F>
inline void for_each_vector(int64_t n, const F& body) {
    parallel_for(ceil_div(n, kElementsPerTask), [&](int64_t task) {
        const int64_t end = min_of(n, (task + 1) * kElementsPerTask);
        for (int64_t i = task * kElementsPerTask; i < end; i += kWidth)
            body(i, min_of<int64_t>(kWidth, end - i));
    });
}

inline VF sigmoid(VF x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
    for_each_vector(n, [=](int64_t i, int64_t m) {
        const VF g = load_first(gate + i, m);
        store_first(y + i, g * sigmoid(g) * load_first(up + i, m), m);
    });
}

// The tanh approximation, as llama.cpp computes it: 0.5 x (1 + tanh(t)) = x sigmoid(2 t).
void gelu(const float* x, int64_t n, float* y) {
    for_each_vector(n, [=](int64_t i, int64_t m) {
        const VF v = load_first(x + i, m);
        const VF t = v * splat(0.79788456f) * fmadd(splat(0.044715f) * v, v, splat(1.0f));
        store_first(y + i, v * sigmoid(t + t), m);
    });
}
