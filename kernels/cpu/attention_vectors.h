// Attention's products by vectors of fp32: of some queries at a time, so that a loaded key or value
// serves several.
#pragma once

#include <cstdint>

#include "pack.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Queries at a time: with 2 vectors of keys or values their sums fill half of 32 registers, or of
// AVX2's 16.
constexpr int kQueries = kWidth == 8 ? 4 : 8;
constexpr int64_t kPanelKeys = 2 * kWidth;  // transposed together, [head_dim][kPanelKeys]

// scores [kQueries][stride] = scale q . k for the first kVectors of a panel of keys. kAdd: added to
// what is there, here and below.
template <int kVectors, bool kAdd>
inline void score_keys(const float* const* q, const float* panel, int64_t head_dim, int64_t stride,
                       float scale, float* scores) {
    VF acc[kQueries][kVectors] = {};
    for (int64_t d = 0; d < head_dim; ++d, panel += kPanelKeys) {
        VF keys[kVectors];
        for (int v = 0; v < kVectors; ++v) keys[v] = load(panel + v * kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
                acc[i][v] = fmadd(splat(q[i][d]), keys[v], acc[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i)
        for (int v = 0; v < kVectors; ++v) {
            float* to = scores + i * stride + v * kWidth;
            const VF score = acc[i][v] * splat(scale);
            store(to, kAdd ? load(to) + score : score);
        }
}

// The same for keys 0 .. n of several panels.
template <bool kAdd>
inline void score_panels(const float* const* q, const float* panels, int64_t head_dim, int64_t n,
                         int64_t stride, float scale, float* scores) {
    int64_t j = 0;
    for (; j + kWidth < n; j += kPanelKeys)
        score_keys<2, kAdd>(q, panels + j * head_dim, head_dim, stride, scale, scores + j);
    if (j < n) score_keys<1, kAdd>(q, panels + j * head_dim, head_dim, stride, scale, scores + j);
}

// y [kQueries rows], dimensions d on = weights v for keys 0 .. n, m dimensions of the last vector,
// which is all of them if it is kWhole.
template <int kVectors, bool kAdd, bool kWhole>
inline void mix_dimensions(const float* weights, int64_t stride, const float* inverse_sums,
                           const float* v, int64_t v_stride, int64_t n, int64_t d, int64_t m,
                           float* const* y, int n_queries) {
    VF acc[kQueries][kVectors] = {};
    const float* from = v + d;
    // Two pointers and multiples of the stride: more do not fit into the registers.
    const float *low = weights, *high = weights + 4 * stride;
    for (int64_t j = 0; j < n; ++j, from += v_stride, ++low, ++high) {
        VF value[kVectors];
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u)
            value[u] = kWhole || u < kVectors - 1 ? load(from + u * kWidth)
                                                  : load_first(from + u * kWidth, m);
#pragma GCC unroll 8
        for (int i = 0; i < kQueries; ++i) {
            const VF weight = splat((i < 4 ? low : high)[i % 4 * stride]);
#pragma GCC unroll 2
            for (int u = 0; u < kVectors; ++u) acc[i][u] = fmadd(weight, value[u], acc[i][u]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {  // a fixed count keeps the sums in registers
        if (i >= n_queries) break;
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u) {
            float* to = y[i] + d + u * kWidth;
            const int64_t n_to = u < kVectors - 1 ? kWidth : m;
            const VF mixed = acc[i][u] * splat(inverse_sums[i]);
            store_first(to, kAdd ? load_first(to, n_to) + mixed : mixed, n_to);
        }
    }
}

template <bool kAdd>
inline void mix_values(const float* weights, int64_t stride, const float* inverse_sums,
                       const float* v, int64_t v_stride, int64_t n, int64_t head_dim,
                       float* const* y, int n_queries) {
    for (int64_t d = 0; d < head_dim; d += 2 * kWidth) {
        const int64_t left = head_dim - d, m = (left - 1) % kWidth + 1;
        if (left >= 2 * kWidth)
            mix_dimensions<2, kAdd, true>(weights, stride, inverse_sums, v, v_stride, n, d, kWidth,
                                          y, n_queries);
        else if (left > kWidth)
            mix_dimensions<2, kAdd, false>(weights, stride, inverse_sums, v, v_stride, n, d, m, y,
                                           n_queries);
        else
            mix_dimensions<1, kAdd, false>(weights, stride, inverse_sums, v, v_stride, n, d, m, y,
                                           n_queries);
    }
}

// Rows [n] -> panels [n / kPanelKeys][head_dim][kPanelKeys], zeros behind the last row.
inline void pack_panels(const float* rows, int64_t row_stride, int64_t n, int64_t head_dim,
                        float* panels) {
    const int64_t words = kPanelKeys % 16 == 0 ? head_dim / 8 * 8 : 0;
    for (int64_t j = 0; j < n; j += kPanelKeys, panels += kPanelKeys * head_dim) {
        const float* from = rows + j * row_stride;
        const int64_t had = min_of(kPanelKeys, n - j), whole = had / 16 * 16;
        for (int64_t i = 0; i < whole; i += 16)
            for (int64_t d = 0; d < words; d += 8)
                transpose_16x8((const uint32_t*)(from + i * row_stride + d), row_stride,
                               (uint32_t*)(panels + d * kPanelKeys + i), kPanelKeys);
        for (int64_t i = 0; i < kPanelKeys; ++i)
            for (int64_t d = i < whole ? words : 0; d < head_dim; ++d)
                panels[d * kPanelKeys + i] = i < had ? from[i * row_stride + d] : 0.0f;
    }
}

// to [n rows] += weights^T x over a block of queries, dimensions d on, m of the last vector.
template <int kVectors>
inline void add_to_rows(const float* weights, int64_t stride, const float* const* x, int64_t n,
                        int64_t d, int64_t m, float* to, int64_t to_stride) {
    VF rows[kQueries][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u)
            rows[i][u] = load_first(x[i] + d + u * kWidth, u < kVectors - 1 ? kWidth : m);
    for (int64_t j = 0; j < n; ++j) {
        float* at = to + j * to_stride + d;
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u) {
            const int64_t count = u < kVectors - 1 ? kWidth : m;
            VF acc = load_first(at + u * kWidth, count);
#pragma GCC unroll 8
            for (int i = 0; i < kQueries; ++i)
                acc = fmadd(splat(weights[i * stride + j]), rows[i][u], acc);
            store_first(at + u * kWidth, acc, count);
        }
    }
}

// What attention multiplies by. For a sequence it packs keys and values, of one lane after the
// other; for each block of queries it sets those of kPrimal or kTangent, and then the weights that
// their scores have become.
enum Kind { kPrimal, kTangent };

struct VectorProducts {
    static constexpr int kBlock = kQueries;
    static constexpr int64_t kFirst = kPanelKeys;  // a block sees keys from a multiple of it on
    static constexpr int64_t kPadded = kWidth;     // weights are set up to a multiple of it

    const int64_t n, head_dim, stride, size;
    float *keys, *values, scales[2];
    const float *queries[2][kQueries], *weights[2];

    // Floats from the scores of a query to those of the next one.
    static int64_t stride_of(int64_t n) { return ceil_div(n, kPanelKeys) * kPanelKeys; }
    // Bytes of scratch for a sequence of n.
    static int64_t bytes(int64_t n, int64_t head_dim, int64_t key_lanes, int64_t value_lanes) {
        return 4 * (key_lanes + value_lanes) * stride_of(n) * head_dim;
    }

    VectorProducts(void* scratch, int64_t n, int64_t head_dim, int64_t key_lanes, int64_t)
        : n(n),
          head_dim(head_dim),
          stride(stride_of(n)),
          size(stride * head_dim),
          keys((float*)scratch),
          values(keys + key_lanes * size) {}

    // Keys are transposed and values copied, so that what is read together lies together.
    void pack_keys(int64_t lane, const float* rows, int64_t row_stride) {
        pack_panels(rows, row_stride, n, head_dim, keys + lane * size);
    }
    void pack_values(int64_t lane, const float* rows, int64_t row_stride) {
        for (int64_t j = 0; j < n; ++j)
            __builtin_memcpy(values + lane * size + j * head_dim, rows + j * row_stride,
                             4 * head_dim);
    }

    void set_queries(Kind kind, const float* rows, int64_t row_stride, int n_queries, float scale) {
        repeat_last(rows, row_stride, n_queries, queries[kind]);
        scales[kind] = scale;
    }

    // scores [kBlock][stride] = scale q . k for the keys of a lane first .. first+n_keys. kAdd:
    // added to what is there, here and below.
    template <bool kAdd>
    void score(Kind kind, int64_t lane, int64_t first, int64_t n_keys, int, float* scores) const {
        score_panels<kAdd>(queries[kind], keys + lane * size + first * head_dim, head_dim, n_keys,
                           stride, scales[kind], scores);
    }

    // scores [kBlock][stride] that are weights now, of n_queries.
    void set_weights(Kind kind, const float* scores, int64_t, int) { weights[kind] = scores; }

    // Rows of y = weights v for the values of a lane first .. first+n_keys, times the factors.
    template <bool kAdd>
    void mix(Kind kind, int64_t lane, int64_t first, int64_t n_keys, int n_queries,
             const float* factors, float* y, int64_t row_stride) const {
        float* rows[kQueries];
        repeat_last(y, row_stride, n_queries, rows);
        mix_values<kAdd>(weights[kind], stride, factors, values + lane * size + first * head_dim,
                         head_dim, n_keys, head_dim, rows, n_queries);
    }

    // A block that is not full repeats its last row.
    template <typename T>
    static void repeat_last(T* rows, int64_t row_stride, int n, T** out) {
        for (int i = 0; i < kQueries; ++i) out[i] = rows + min_of(i, n - 1) * row_stride;
    }

    // What blocks of queries add to the keys or values of a sequence.
    struct KeySums {
        const int64_t n, head_dim, row_stride;
        float* rows;

        static int64_t bytes(int64_t, int64_t) { return 0; }

        KeySums(void*, int64_t n, int64_t head_dim, float* rows, int64_t row_stride)
            : n(n), head_dim(head_dim), row_stride(row_stride), rows(rows) {
            for (int64_t j = 0; j < n; ++j)
                __builtin_memset(rows + j * row_stride, 0, 4 * head_dim);
        }

        // += weights^T x for first .. first+n_keys, weights [kBlock][stride] and x of n_queries.
        void add(float* weights, int64_t stride, const float* x, int64_t x_stride, int n_queries,
                 int64_t first, int64_t n_keys) {
            const float* queries[kQueries];
            repeat_last(x, x_stride, n_queries, queries);
            for (int i = n_queries; i < kQueries; ++i)  // the repeated ones count once
                __builtin_memset(weights + i * stride, 0, 4 * n_keys);
            float* to = rows + first * row_stride;
            int64_t d = 0;
            for (; d + kWidth < head_dim; d += 2 * kWidth)
                add_to_rows<2>(weights, stride, queries, n_keys, d,
                               min_of<int64_t>(kWidth, head_dim - d - kWidth), to, row_stride);
            if (d < head_dim)
                add_to_rows<1>(weights, stride, queries, n_keys, d, head_dim - d, to, row_stride);
        }

        void finish() {}
    };
};

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
