// Softmax attention of several sequences in one batch, none seeing another. One task is one
// sequence and key/value head: its keys are transposed and its values copied once, so that what
// is read together lies together, then all query heads of the group use them. Queries go in blocks,
// so that a loaded key or value serves several. Tangents follow each block of the primal, whose
// softmax they share:
//   dS = scale (dQ K^T + Q dK^T),  dY = P (dS - rowsum(P dS)) V + P dV.
#pragma once

#include <cstdint>

#include "pack.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Queries at a time: with 2 vectors of keys or values their sums fill half of 32 registers, or of
// AVX2's 16.
constexpr int kQueries = kWidth == 8 ? 4 : 8;
constexpr int64_t kPanelKeys = 2 * kWidth;  // transposed together, [head_dim][kPanelKeys]

struct Attention {
    const float *q, *k, *v;
    float* y;
    int64_t n_heads, n_kv_heads, head_dim;
    float scale;
    bool causal;
    int64_t window;          // a row sees those less than so many rows away; 0 is all
    float softcap;           // 0 is none
    int64_t tangents, rows;  // rows of each of them
};

// The keys that a block of queries i0 .. i0 + n_queries of a sequence of n sees: first .. end.
struct Keys {
    int64_t behind, ahead;  // a query sees so many before and after its own
    int64_t first, end;

    Keys(int64_t i0, int64_t n_queries, int64_t n, bool causal, int64_t window)
        : behind(window ? min_of(n, window) - 1 : n),
          ahead(causal ? 0 : behind),
          first(max_of<int64_t>(0, i0 - behind) / kPanelKeys * kPanelKeys),
          end(min_of(n, i0 + n_queries + ahead)) {}

    // Those of query i alone, counted from ``first``.
    int64_t begin_of(int64_t i) const { return max_of<int64_t>(0, i - behind) - first; }
    int64_t end_of(int64_t i) const { return min_of(i + 1 + ahead, end) - first; }
};

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
inline void score(const float* const* q, const float* panels, int64_t head_dim, int64_t n,
                  int64_t stride, float scale, float* scores) {
    int64_t j = 0;
    for (; j + kWidth < n; j += kPanelKeys)
        score_keys<2, kAdd>(q, panels + j * head_dim, head_dim, stride, scale, scores + j);
    if (j < n) score_keys<1, kAdd>(q, panels + j * head_dim, head_dim, stride, scale, scores + j);
}

// scores [kQueries][stride] of keys 0 .. n -> softcap tanh(score / softcap), and its slopes.
inline void cap_scores(float softcap, int64_t n, int64_t stride, float* scores, float* slopes) {
    const VF cap = splat(softcap), inverse = splat(1.0f / softcap);
    for (int i = 0; i < kQueries; ++i)
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth) {
            const VF t = vtanh(load(scores + j) * inverse);
            store(scores + j, t * cap);
            store(slopes + j, splat(1.0f) - t * t);
        }
}

// dscores [kQueries][stride] of keys 0 .. n, times the slopes.
inline void cap_tangents(const float* slopes, int64_t n, int64_t stride, float* dscores) {
    for (int i = 0; i < kQueries; ++i)
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth)
            store(dscores + j, load(dscores + j) * load(slopes + j));
}

// Those of elements j, j + 1, .. that are in begin .. end.
inline VI inside(int64_t j, int64_t begin, int64_t end) {
    VI at;
    for (int i = 0; i < kWidth; ++i) at[i] = i;
    return (at >= (int32_t)(begin - j)) & (at < (int32_t)(end - j));
}

// scores[begin .. n) -> exp(score - max), zeros before and up to padded; returns 1 / their sum.
inline float softmax(float* scores, int64_t begin, int64_t n, int64_t padded) {
    const int64_t first = begin / kWidth * kWidth, end = ceil_div(n, kWidth) * kWidth;
    const VF any = splat(scores[begin]);
    VF top = any;
    for (int64_t j = first; j < end; j += kWidth)
        top = vmax(top, select(inside(j, begin, n), load(scores + j), any));
    const VF max = splat(largest(top)), zero = {};
    VF total = {};
    for (int64_t j = 0; j < first; j += kWidth) store(scores + j, zero);
    for (int64_t j = first; j < end; j += kWidth) {
        const VF e = select(inside(j, begin, n), vexp(load(scores + j) - max), zero);
        store(scores + j, e);
        total += e;
    }
    for (int64_t j = end; j < padded; j += kWidth) store(scores + j, zero);
    return 1.0f / sum(total);
}

// y [kQueries rows], dimensions d on = weights v for keys 0 .. n, m dimensions of the last vector,
// which is all of them if it is kWhole.
template <int kVectors, bool kAdd, bool kWhole>
inline void mix_values(const float* weights, int64_t stride, const float* inverse_sums,
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
inline void mix(const float* weights, int64_t stride, const float* inverse_sums, const float* v,
                int64_t v_stride, int64_t n, int64_t head_dim, float* const* y, int n_queries) {
    for (int64_t d = 0; d < head_dim; d += 2 * kWidth) {
        const int64_t left = head_dim - d, m = (left - 1) % kWidth + 1;
        if (left >= 2 * kWidth)
            mix_values<2, kAdd, true>(weights, stride, inverse_sums, v, v_stride, n, d, kWidth, y,
                                      n_queries);
        else if (left > kWidth)
            mix_values<2, kAdd, false>(weights, stride, inverse_sums, v, v_stride, n, d, m, y,
                                       n_queries);
        else
            mix_values<1, kAdd, false>(weights, stride, inverse_sums, v, v_stride, n, d, m, y,
                                       n_queries);
    }
}

// dS [kQueries][stride] -> e (dS - mean of dS under the softmax e / sum(e)), zeros up to padded.
inline void softmax_tangent(const float* e, const float* inverse_sums, int64_t stride, int64_t n,
                            float* ds) {
    for (int i = 0; i < kQueries; ++i) {
        VF total = {};
        for (int64_t j = 0; j < n; j += kWidth)
            total = fmadd(load(e + i * stride + j), load(ds + i * stride + j), total);
        const VF mean = splat(sum(total) * inverse_sums[i]);
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth)
            store(ds + j, load(e + j) * (load(ds + j) - mean));
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

inline void attend(const Attention& a, int64_t row0, int64_t n, int64_t kv_head) {
    const int64_t q_stride = a.n_heads * a.head_dim, kv_stride = a.n_kv_heads * a.head_dim;
    const int64_t stride = ceil_div(n, kPanelKeys) * kPanelKeys, size = stride * a.head_dim;
    const int64_t group = a.n_heads / a.n_kv_heads;
    // Keys and values of the primal and of every tangent, and the scores of a block of queries.
    float* panels =
        (float*)thread_scratch(4 * (2 * (1 + a.tangents) * size + 3 * kQueries * stride));
    float* values = panels + (1 + a.tangents) * size;
    float* scores = values + (1 + a.tangents) * size;
    float* dscores = scores + kQueries * stride;
    float* slopes = dscores + kQueries * stride;
    for (int64_t t = 0; t <= a.tangents; ++t) {
        const int64_t kv0 = (row0 + t * a.rows) * kv_stride + kv_head * a.head_dim;
        pack_panels(a.k + kv0, kv_stride, n, a.head_dim, panels + t * size);
        for (int64_t j = 0; j < n; ++j)
            __builtin_memcpy(values + t * size + j * a.head_dim, a.v + kv0 + j * kv_stride,
                             4 * a.head_dim);
    }

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
            const int n_queries = (int)min_of<int64_t>(kQueries, n - i0);
            const Keys seen(i0, n_queries, n, a.causal, a.window);
            const float* seen_keys = panels + seen.first * a.head_dim;
            const float* seen_values = values + seen.first * a.head_dim;
            const int64_t n_keys = seen.end - seen.first;
            const int64_t padded = ceil_div(n_keys, kWidth) * kWidth;
            const float *q[kQueries], *dq[kQueries];
            float* y[kQueries];
            float inverse_sums[kQueries];
            for (int i = 0; i < kQueries; ++i) {  // the last block repeats its last query
                const int64_t row = row0 + min_of<int64_t>(i0 + i, n - 1);
                q[i] = dq[i] = a.q + row * q_stride + head * a.head_dim;
                y[i] = a.y + row * q_stride + head * a.head_dim;
            }
            score<false>(q, seen_keys, a.head_dim, n_keys, stride, a.scale, scores);
            if (a.softcap > 0) cap_scores(a.softcap, n_keys, stride, scores, slopes);
            for (int i = 0; i < kQueries; ++i) {
                const int64_t row = min_of<int64_t>(i0 + i, n - 1);
                inverse_sums[i] =
                    softmax(scores + i * stride, seen.begin_of(row), seen.end_of(row), padded);
            }
            mix<false>(scores, stride, inverse_sums, seen_values, a.head_dim, n_keys, a.head_dim, y,
                       n_queries);
            for (int64_t t = 1; t <= a.tangents; ++t) {
                for (int i = 0; i < kQueries; ++i) {
                    dq[i] += a.rows * q_stride;
                    y[i] += a.rows * q_stride;
                }
                score<false>(dq, seen_keys, a.head_dim, n_keys, stride, a.scale, dscores);
                score<true>(q, seen_keys + t * size, a.head_dim, n_keys, stride, a.scale, dscores);
                if (a.softcap > 0) cap_tangents(slopes, n_keys, stride, dscores);
                softmax_tangent(scores, inverse_sums, stride, padded, dscores);
                mix<false>(dscores, stride, inverse_sums, seen_values, a.head_dim, n_keys,
                           a.head_dim, y, n_queries);
                mix<true>(scores, stride, inverse_sums, seen_values + t * size, a.head_dim, n_keys,
                          a.head_dim, y, n_queries);
            }
        }
    }
}

void attention(const float* q, const float* k, const float* v, const int32_t* starts, int64_t n_seq,
               int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, float scale, bool causal,
               int64_t window, float softcap, int64_t tangents, float* y) {
    const int64_t n_primal = n_seq / (1 + tangents);
    const Attention a{q,     k,      v,      y,       n_heads,  n_kv_heads,      head_dim,
                      scale, causal, window, softcap, tangents, starts[n_primal]};
    parallel_for(n_primal * n_kv_heads, [&](int64_t task) {
        const int64_t s = task / n_kv_heads;
        attend(a, starts[s], starts[s + 1] - starts[s], task % n_kv_heads);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
