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

template <typename Products>
inline void attend_vjp(const AttentionVjp& a, int64_t row0, int64_t n, int64_t kv_head) {
    constexpr int kBlock = Products::kBlock;
    using KeySums = typename Products::KeySums;
    const int64_t q_stride = a.n_heads * a.head_dim, kv_stride = a.n_kv_heads * a.head_dim;
    const int64_t stride = Products::stride_of(n), group = a.n_heads / a.n_kv_heads;
    const int64_t packed = Products::bytes(n, a.head_dim, 2, 1);
    const int64_t summed = KeySums::bytes(n, a.head_dim);
    char* scratch = (char*)thread_scratch(packed + 2 * summed + 4 * 3 * kBlock * stride);
    const int64_t kv0 = row0 * kv_stride + kv_head * a.head_dim;
    Products products(scratch, n, a.head_dim, 2, 1);
    KeySums dk(scratch + packed, n, a.head_dim, a.dk + kv0, kv_stride);
    KeySums dv(scratch + packed + summed, n, a.head_dim, a.dv + kv0, kv_stride);
    float* scores = (float*)(scratch + packed + 2 * summed);
    float* dscores = scores + kBlock * stride;
    float* slopes = dscores + kBlock * stride;
    products.pack_keys(0, a.k + kv0, kv_stride);    // of S
    products.pack_keys(1, a.v + kv0, kv_stride);    // of dP
    products.pack_values(0, a.k + kv0, kv_stride);  // of dQ

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
            const int n_queries = (int)min_of<int64_t>(kBlock, n - i0);
            const Keys seen(i0, n_queries, n, a.causal, a.window, Products::kFirst);
            const int64_t first = seen.first, n_keys = seen.end - first;
            const int64_t padded = ceil_div(n_keys, Products::kPadded) * Products::kPadded;
            const int64_t at = (row0 + i0) * q_stride + head * a.head_dim;
            float inverse_sums[kBlock], ones[kBlock];
            products.set_queries(kPrimal, a.q + at, q_stride, n_queries, a.scale);
            products.set_queries(kTangent, a.dy + at, q_stride, n_queries, 1.0f);
            products.template score<false>(kPrimal, 0, first, n_keys, n_queries, scores);
            if (a.softcap > 0) cap_scores(a.softcap, n_queries, n_keys, stride, scores, slopes);
            for (int i = 0; i < n_queries; ++i)
                inverse_sums[i] = softmax(scores + i * stride, seen.begin_of(i0 + i),
                                          seen.end_of(i0 + i), padded);
            products.template score<false>(kTangent, 1, first, n_keys, n_queries, dscores);
            softmax_tangent(scores, inverse_sums, n_queries, stride, padded, dscores);
            if (a.softcap > 0) cap_tangents(slopes, n_queries, n_keys, stride, dscores);
            for (int i = 0; i < n_queries; ++i) {
                const VF p = splat(inverse_sums[i]);
                ones[i] = 1.0f;
                for (int64_t j = i * stride; j < i * stride + padded; j += kWidth) {
                    store(scores + j, load(scores + j) * p);
                    store(dscores + j, load(dscores + j) * p * splat(a.scale));
                }
            }
            products.set_weights(kTangent, dscores, n_keys, n_queries);
            products.template mix<false>(kTangent, 0, first, n_keys, n_queries, ones, a.dq + at,
                                         q_stride);
            dk.add(dscores, stride, a.q + at, q_stride, n_queries, first, n_keys);
            dv.add(scores, stride, a.dy + at, q_stride, n_queries, first, n_keys);
        }
    }
    dk.finish();
    dv.finish();
}

void attention_vjp(const float* q, const float* k, const float* v, const float* dy,
                   const int32_t* starts, int64_t n_seq, int64_t n_heads, int64_t n_kv_heads,
                   int64_t head_dim, float scale, bool causal, int64_t window, float softcap,
                   float* dq, float* dk, float* dv) {
    const AttentionVjp a{q,       k,          v,        dy,    dq,     dk,     dv,
                         n_heads, n_kv_heads, head_dim, scale, causal, window, softcap};
    parallel_for(n_seq * n_kv_heads, [&](int64_t task) {
        const int64_t s = task / n_kv_heads, n = starts[s + 1] - starts[s];
        with_products(n, [&]<typename Products>() {
            attend_vjp<Products>(a, starts[s], n, task % n_kv_heads);
        });
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
