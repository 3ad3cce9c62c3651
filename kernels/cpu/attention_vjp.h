// Cotangents of attention's inputs. Its softmax is computed again for each block of queries, so
// that no more than their scores exist at a time. With P = softmax(scale Q K^T), Y = P V:
//   dV = P^T dY,  dS = scale P (dP - rowsum(P dP)) with dP = dY V^T,  dQ = dS K,  dK = dS^T Q,
// where a soft cap's slope is a factor of dS.
// One task is one sequence and key/value head, whose dK and dV it adds up query after query.
#pragma once

#include <cstdint>

#include "attention.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

struct AttentionVjp {
    const float *q, *k, *v, *dy;
    float *dq, *dk, *dv;
    int64_t n_heads, n_kv_heads, head_dim;
    float scale;
    bool causal;
    int64_t window;
    float softcap;
};

// to [n rows] += weights^T x over a block of queries, dimensions d on, m of the last vector.
template <int kVectors>
inline void add_to_keys(const float* weights, int64_t stride, const float* const* x, int64_t n,
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

inline void add_to_keys(const float* weights, int64_t stride, const float* const* x, int64_t n,
                        int64_t head_dim, float* to, int64_t to_stride) {
    int64_t d = 0;
    for (; d + kWidth < head_dim; d += 2 * kWidth)
        add_to_keys<2>(weights, stride, x, n, d, min_of<int64_t>(kWidth, head_dim - d - kWidth), to,
                       to_stride);
    if (d < head_dim) add_to_keys<1>(weights, stride, x, n, d, head_dim - d, to, to_stride);
}

inline void attend_vjp(const AttentionVjp& a, int64_t row0, int64_t n, int64_t kv_head) {
    const int64_t q_stride = a.n_heads * a.head_dim, kv_stride = a.n_kv_heads * a.head_dim;
    const int64_t stride = ceil_div(n, kPanelKeys) * kPanelKeys, size = stride * a.head_dim;
    const int64_t group = a.n_heads / a.n_kv_heads;
    float* keys = (float*)thread_scratch(4 * (2 * size + 3 * kQueries * stride));
    float* values = keys + size;
    float* scores = values + size;
    float* dscores = scores + kQueries * stride;
    float* slopes = dscores + kQueries * stride;
    const int64_t kv0 = row0 * kv_stride + kv_head * a.head_dim;
    pack_panels(a.k + kv0, kv_stride, n, a.head_dim, keys);
    pack_panels(a.v + kv0, kv_stride, n, a.head_dim, values);
    for (int64_t j = 0; j < n; ++j) {
        __builtin_memset(a.dk + kv0 + j * kv_stride, 0, 4 * a.head_dim);
        __builtin_memset(a.dv + kv0 + j * kv_stride, 0, 4 * a.head_dim);
    }

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i0 = 0; i0 < n; i0 += kQueries) {
            const int n_queries = (int)min_of<int64_t>(kQueries, n - i0);
            const Keys seen(i0, n_queries, n, a.causal, a.window);
            const int64_t n_keys = seen.end - seen.first;
            const int64_t kv = kv0 + seen.first * kv_stride;
            const int64_t padded = ceil_div(n_keys, kWidth) * kWidth;
            const float *q[kQueries], *dy[kQueries];
            float* dq[kQueries];
            float inverse_sums[kQueries], ones[kQueries];
            for (int i = 0; i < kQueries; ++i) {  // the last block repeats its last query
                const int64_t at = (row0 + min_of<int64_t>(i0 + i, n - 1)) * q_stride;
                q[i] = a.q + at + head * a.head_dim;
                dy[i] = a.dy + at + head * a.head_dim;
                dq[i] = a.dq + at + head * a.head_dim;
                ones[i] = 1.0f;
            }
            score<false>(q, keys + seen.first * a.head_dim, a.head_dim, n_keys, stride, a.scale,
                         scores);
            if (a.softcap > 0) cap_scores(a.softcap, n_keys, stride, scores, slopes);
            for (int i = 0; i < kQueries; ++i) {
                const int64_t row = min_of<int64_t>(i0 + i, n - 1);
                inverse_sums[i] =
                    softmax(scores + i * stride, seen.begin_of(row), seen.end_of(row), padded);
            }
            score<false>(dy, values + seen.first * a.head_dim, a.head_dim, n_keys, stride, 1.0f,
                         dscores);
            softmax_tangent(scores, inverse_sums, stride, padded, dscores);
            if (a.softcap > 0) cap_tangents(slopes, n_keys, stride, dscores);
            for (int i = 0; i < kQueries; ++i) {  // the repeated ones count once
                const VF p = splat(i < n_queries ? inverse_sums[i] : 0.0f);
                for (int64_t j = i * stride; j < i * stride + padded; j += kWidth) {
                    store(scores + j, load(scores + j) * p);
                    store(dscores + j, load(dscores + j) * p * splat(a.scale));
                }
            }
            mix<false>(dscores, stride, ones, a.k + kv, kv_stride, n_keys, a.head_dim, dq,
                       n_queries);
            add_to_keys(dscores, stride, q, n_keys, a.head_dim, a.dk + kv, kv_stride);
            add_to_keys(scores, stride, dy, n_keys, a.head_dim, a.dv + kv, kv_stride);
        }
    }
}

void attention_vjp(const float* q, const float* k, const float* v, const float* dy,
                   const int32_t* starts, int64_t n_seq, int64_t n_heads, int64_t n_kv_heads,
                   int64_t head_dim, float scale, bool causal, int64_t window, float softcap,
                   float* dq, float* dk, float* dv) {
    const AttentionVjp a{q,       k,          v,        dy,    dq,     dk,     dv,
                         n_heads, n_kv_heads, head_dim, scale, causal, window, softcap};
    parallel_for(n_seq * n_kv_heads, [&](int64_t task) {
        const int64_t s = task / n_kv_heads;
        attend_vjp(a, starts[s], starts[s + 1] - starts[s], task % n_kv_heads);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
