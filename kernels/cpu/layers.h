// Row-wise operations: norms, rotary embedding, activations; and of those that are not linear the
// directional derivatives, each with what it needs of the primal computed once, and the cotangents
// of their inputs, dx from dy. Rotary embedding's is itself, turned the other way.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;         // of a norm or rotary embedding
constexpr int64_t kElementsPerTask = 16384;  // of an activation: 3 arrays of 64 KiB

template <typename F>
inline void for_each_row(int64_t rows, const F& body) {
    parallel_for(ceil_div(rows, kRowsPerTask), [&](int64_t task) {
        for (int64_t r = task * kRowsPerTask; r < min_of(rows, (task + 1) * kRowsPerTask); ++r)
            body(r);
    });
}

// (a - mean) . b
inline float centred_dot(const float* a, float mean, const float* b, int64_t n) {
    VF products = {};
    for (int64_t i = 0; i < n; i += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - i);
        products = fmadd(load_first(a + i, m) - splat(mean), load_first(b + i, m), products);
    }
    return sum(products);
}

void rms_norm(const float* x, int64_t rows, int64_t d, const float* weight, float eps,
              int64_t tangents, float* y) {
    const int64_t primal = rows / (1 + tangents);
    for_each_row(primal, [=](int64_t r) {
        const float* from = x + r * d;
        VF squares = {};
        for (int64_t i = 0; i < d; i += kWidth) {
            const VF v = load_first(from + i, min_of<int64_t>(kWidth, d - i));
            squares = fmadd(v, v, squares);
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + eps);
        for (int64_t i = 0; i < d; ++i) y[r * d + i] = from[i] * scale * weight[i];
        for (int64_t t = r + primal; t < rows; t += primal) {
            const float* dx = x + t * d;
            const float along = scale * scale * centred_dot(from, 0.0f, dx, d) / (float)d;
            for (int64_t i = 0; i < d; ++i)
                y[t * d + i] = (dx[i] - from[i] * along) * scale * weight[i];
        }
    });
}

// dx = scale (w dy - x scale^2 mean(x w dy)), scale = 1 / sqrt(mean(x^2) + eps).
void rms_norm_vjp(const float* x, const float* dy, int64_t rows, int64_t d, const float* weight,
                  float eps, float* dx) {
    for_each_row(rows, [=](int64_t r) {
        const float *from = x + r * d, *cotangent = dy + r * d;
        VF squares = {}, products = {};
        for (int64_t i = 0; i < d; i += kWidth) {
            const int64_t m = min_of<int64_t>(kWidth, d - i);
            const VF v = load_first(from + i, m);
            squares = fmadd(v, v, squares);
            products = fmadd(v, load_first(cotangent + i, m) * load_first(weight + i, m), products);
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + eps);
        const float along = scale * scale * sum(products) / (float)d;
        for (int64_t i = 0; i < d; ++i)
            dx[r * d + i] = (cotangent[i] * weight[i] - from[i] * along) * scale;
    });
}

inline float mean_of(const float* x, int64_t n) {
    VF total = {};
    for (int64_t i = 0; i < n; i += kWidth)
        total += load_first(x + i, min_of<int64_t>(kWidth, n - i));
    return sum(total) / (float)n;
}

void layer_norm(const float* x, int64_t rows, int64_t d, const float* weight, const float* bias,
                float eps, int64_t tangents, float* y) {
    const int64_t primal = rows / (1 + tangents);
    for_each_row(primal, [=](int64_t r) {
        const float* from = x + r * d;
        const float mean = mean_of(from, d);
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
        for (int64_t t = r + primal; t < rows; t += primal) {
            const float* dx = x + t * d;
            const float dmean = mean_of(dx, d);
            const float along = scale * scale * centred_dot(from, mean, dx, d) / (float)d;
            for (int64_t i = 0; i < d; ++i)
                y[t * d + i] = (dx[i] - dmean - (from[i] - mean) * along) * scale * weight[i];
        }
    });
}

// dx = scale (g - mean(g) - c scale^2 mean(c g)), g = w dy, c = x - mean(x).
void layer_norm_vjp(const float* x, const float* dy, int64_t rows, int64_t d, const float* weight,
                    float eps, float* dx) {
    for_each_row(rows, [=](int64_t r) {
        const float *from = x + r * d, *cotangent = dy + r * d;
        const float mean = mean_of(from, d);
        VF squares = {}, products = {}, total = {};
        for (int64_t i = 0; i < d; i += kWidth) {
            const int64_t m = min_of<int64_t>(kWidth, d - i);
            float centred[kWidth] = {};
            store_first(centred, load_first(from + i, m) - splat(mean), m);
            const VF c = load(centred);
            const VF g = load_first(cotangent + i, m) * load_first(weight + i, m);
            squares = fmadd(c, c, squares);
            products = fmadd(c, g, products);
            total += g;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + eps);
        const float along = scale * scale * sum(products) / (float)d;
        const float common = sum(total) / (float)d;
        for (int64_t i = 0; i < d; ++i)
            dx[r * d + i] = (cotangent[i] * weight[i] - common - (from[i] - mean) * along) * scale;
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

struct Activated {  // f(x) and f'(x)
    VF value, slope;
};

inline Activated silu(VF x) {
    const VF s = sigmoid(x);
    return {x * s, s * fmadd(x, splat(1.0f) - s, splat(1.0f))};
}

// The tanh approximation, as llama.cpp computes it: 0.5 x (1 + tanh(t)) = x sigmoid(2 t), with
// 2 dt/dx = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2).
inline Activated tanh_gelu(VF x) {
    const VF cubic = x * splat(0.79788456f) * fmadd(splat(0.044715f) * x, x, splat(1.0f));
    const VF s = sigmoid(cubic + cubic);
    const VF twice = splat(1.59576912f) * fmadd(splat(0.134145f) * x, x, splat(1.0f));
    return {x * s, fmadd(x * s * (splat(1.0f) - s), twice, s)};
}

// y = f(gate) up.
template <Activated (*f)(VF)>
void gated(const float* gate, const float* up, int64_t n, int64_t tangents, float* y) {
    const int64_t primal = n / (1 + tangents);
    for_each_vector(primal, [=](int64_t i, int64_t m) {
        const VF u = load_first(up + i, m);
        const auto [value, slope_of_gate] = f(load_first(gate + i, m));
        store_first(y + i, value * u, m);
        const VF slope = slope_of_gate * u;
        for (int64_t t = i + primal; t < n; t += primal)
            store_first(y + t, fmadd(slope, load_first(gate + t, m), value * load_first(up + t, m)),
                        m);
    });
}

template <Activated (*f)(VF)>
void gated_vjp(const float* gate, const float* up, const float* dy, int64_t n, float* dgate,
               float* dup) {
    for_each_vector(n, [=](int64_t i, int64_t m) {
        const VF cotangent = load_first(dy + i, m);
        const auto [value, slope] = f(load_first(gate + i, m));
        store_first(dgate + i, slope * load_first(up + i, m) * cotangent, m);
        store_first(dup + i, value * cotangent, m);
    });
}

void gelu(const float* x, int64_t n, int64_t tangents, float* y) {
    const int64_t primal = n / (1 + tangents);
    for_each_vector(primal, [=](int64_t i, int64_t m) {
        const auto [value, slope] = tanh_gelu(load_first(x + i, m));
        store_first(y + i, value, m);
        for (int64_t t = i + primal; t < n; t += primal)
            store_first(y + t, slope * load_first(x + t, m), m);
    });
}

void gelu_vjp(const float* x, const float* dy, int64_t n, float* dx) {
    for_each_vector(n, [=](int64_t i, int64_t m) {
        const VF slope = tanh_gelu(load_first(x + i, m)).slope;
        store_first(dx + i, slope * load_first(dy + i, m), m);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
