// Softmax attention of several sequences in one batch, none seeing another. One task is one
// sequence and key/value head: its keys are transposed and its values copied once, so that what
// is read together lies together, then all query heads of the group use them. Queries go in blocks,
// so that a loaded key or value serves several. Tangents follow each block of the primal, whose
// softmax they share:
//   dS = scale (dQ K^T + Q dK^T),  dY = P (dS - rowsum(P dS)) V + P dV.
#pragma once

#include <cstdint>

#include "attention_tiles.h"
#include "attention_vectors.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

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

// The keys that a block of queries i0 .. i0 + n_queries of a sequence of n sees: first .. end, the
// first of a panel on.
struct Keys {
    int64_t behind, ahead;  // a query sees so many before and after its own
    int64_t first, end;

    Keys(int64_t i0, int64_t n_queries, int64_t n, bool causal, int64_t window, int64_t panel)
        : behind(window ? min_of(n, window) - 1 : n),
          ahead(causal ? 0 : behind),
          first(max_of<int64_t>(0, i0 - behind) / panel * panel),
          end(min_of(n, i0 + n_queries + ahead)) {}

    // Those of query i alone, counted from ``first``.
    int64_t begin_of(int64_t i) const { return max_of<int64_t>(0, i - behind) - first; }
    int64_t end_of(int64_t i) const { return min_of(i + 1 + ahead, end) - first; }
};

// scores [rows][stride] of keys 0 .. n -> softcap tanh(score / softcap), and its slopes.
inline void cap_scores(float softcap, int rows, int64_t n, int64_t stride, float* scores,
                       float* slopes) {
    const VF cap = splat(softcap), inverse = splat(1.0f / softcap);
    for (int i = 0; i < rows; ++i)
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth) {
            const VF t = vtanh(load(scores + j) * inverse);
            store(scores + j, t * cap);
            store(slopes + j, splat(1.0f) - t * t);
        }
}

// dscores [rows][stride] of keys 0 .. n, times the slopes.
inline void cap_tangents(const float* slopes, int rows, int64_t n, int64_t stride, float* dscores) {
    for (int i = 0; i < rows; ++i)
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth)
            store(dscores + j, load(dscores + j) * load(slopes + j));
}

// The elements j, j + 1, .. of x that are in begin .. end, and others in the place of the rest.
inline VF inside(VF x, int64_t j, int64_t begin, int64_t end, VF others) {
    if (begin <= j && j + kWidth <= end) return x;
    VI at;
    for (int i = 0; i < kWidth; ++i) at[i] = i;
    return select((at >= (int32_t)(begin - j)) & (at < (int32_t)(end - j)), x, others);
}

// scores[begin .. n) -> exp(score - max), zeros before and up to padded; returns 1 / their sum.
inline float softmax(float* scores, int64_t begin, int64_t n, int64_t padded) {
    const int64_t first = begin / kWidth * kWidth, end = ceil_div(n, kWidth) * kWidth;
    const VF any = splat(scores[begin]);
    VF top = any;
    for (int64_t j = first; j < end; j += kWidth)
        top = vmax(top, inside(load(scores + j), j, begin, n, any));
    const VF max = splat(largest(top)), zero = {};
    VF total = {};
    for (int64_t j = 0; j < first; j += kWidth) store(scores + j, zero);
    for (int64_t j = first; j < end; j += kWidth) {
        const VF e = inside(vexp(load(scores + j) - max), j, begin, n, zero);
        store(scores + j, e);
        total += e;
    }
    for (int64_t j = end; j < padded; j += kWidth) store(scores + j, zero);
    return 1.0f / sum(total);
}

// dS [rows][stride] -> e (dS - mean of dS under the softmax e / sum(e)), zeros up to padded.
inline void softmax_tangent(const float* e, const float* inverse_sums, int rows, int64_t stride,
                            int64_t n, float* ds) {
    for (int i = 0; i < rows; ++i) {
        VF total = {};
        for (int64_t j = 0; j < n; j += kWidth)
            total = fmadd(load(e + i * stride + j), load(ds + i * stride + j), total);
        const VF mean = splat(sum(total) * inverse_sums[i]);
        for (int64_t j = i * stride; j < i * stride + n; j += kWidth)
            store(ds + j, load(e + j) * (load(ds + j) - mean));
    }
}

// Sequences whose next block is read ahead: the processor does not foresee rows so far apart. It
// gained 10% of 512 tokens and cost 7% of 16.
constexpr int64_t kReadAheadTokens = 64;

// Rows of m floats, soon read or written.
inline void read_ahead(const float* rows, int64_t row_stride, int64_t n, int64_t m) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < m; d += 16) __builtin_prefetch(rows + i * row_stride + d);
}

template <typename Products>
inline void attend(const Attention& a, int64_t row0, int64_t n, int64_t kv_head) {
    constexpr int kBlock = Products::kBlock;
    const int64_t q_stride = a.n_heads * a.head_dim, kv_stride = a.n_kv_heads * a.head_dim;
    const int64_t stride = Products::stride_of(n), group = a.n_heads / a.n_kv_heads;
    const int64_t lanes = 1 + a.tangents, packed = Products::bytes(n, a.head_dim, lanes, lanes);
    char* scratch = (char*)thread_scratch(packed + 4 * 3 * kBlock * stride);
    Products products(scratch, n, a.head_dim, lanes, lanes);
    float* scores = (float*)(scratch + packed);
    float* dscores = scores + kBlock * stride;
    float* slopes = dscores + kBlock * stride;
    for (int64_t t = 0; t < lanes; ++t) {
        const int64_t kv0 = (row0 + t * a.rows) * kv_stride + kv_head * a.head_dim;
        products.pack_keys(t, a.k + kv0, kv_stride);
        products.pack_values(t, a.v + kv0, kv_stride);
    }

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
            const int n_queries = (int)min_of<int64_t>(kBlock, n - i0);
            const Keys seen(i0, n_queries, n, a.causal, a.window, Products::kFirst);
            const int64_t first = seen.first, n_keys = seen.end - first;
            const int64_t padded = ceil_div(n_keys, Products::kPadded) * Products::kPadded;
            const float* q = a.q + (row0 + i0) * q_stride + head * a.head_dim;
            float* y = a.y + (row0 + i0) * q_stride + head * a.head_dim;
            float inverse_sums[kBlock];
            if (n > kReadAheadTokens && i0 + kBlock < n) {
                const int64_t next = min_of<int64_t>(kBlock, n - i0 - kBlock);
                read_ahead(q + kBlock * q_stride, q_stride, next, a.head_dim);
                read_ahead(y + kBlock * q_stride, q_stride, next, a.head_dim);
            }
            products.set_queries(kPrimal, q, q_stride, n_queries, a.scale);
            products.template score<false>(kPrimal, 0, first, n_keys, n_queries, scores);
            if (a.softcap > 0) cap_scores(a.softcap, n_queries, n_keys, stride, scores, slopes);
            for (int i = 0; i < n_queries; ++i)
                inverse_sums[i] = softmax(scores + i * stride, seen.begin_of(i0 + i),
                                          seen.end_of(i0 + i), padded);
            products.set_weights(kPrimal, scores, n_keys, n_queries);
            products.template mix<false>(kPrimal, 0, first, n_keys, n_queries, inverse_sums, y,
                                         q_stride);
            for (int64_t t = 1; t <= a.tangents; ++t) {
                q += a.rows * q_stride;
                y += a.rows * q_stride;
                products.set_queries(kTangent, q, q_stride, n_queries, a.scale);
                products.template score<false>(kTangent, 0, first, n_keys, n_queries, dscores);
                products.template score<true>(kPrimal, t, first, n_keys, n_queries, dscores);
                if (a.softcap > 0) cap_tangents(slopes, n_queries, n_keys, stride, dscores);
                softmax_tangent(scores, inverse_sums, n_queries, stride, padded, dscores);
                products.set_weights(kTangent, dscores, n_keys, n_queries);
                products.template mix<false>(kTangent, 0, first, n_keys, n_queries, inverse_sums, y,
                                             q_stride);
                products.template mix<true>(kPrimal, t, first, n_keys, n_queries, inverse_sums, y,
                                            q_stride);
            }
        }
    }
}

#if defined(FWDLLM_TILES)
// Shorter sequences are multiplied by vectors: blocks and steps of 32 would be padding. Tiles took
// 1.5 times as long for 16 tokens; for 32 they take 1.2 times as long for a primal, but 0.75 with
// 7 tangents and 0.9 back; for 64 as long, 0.8 and 0.7. The primal is to have one result with and
// without tangents.
constexpr int64_t kFewTokens = 32;
#endif

// Calls f with what a sequence of n is multiplied by.
template <typename F>
inline void with_products([[maybe_unused]] int64_t n, const F& f) {
#if defined(FWDLLM_TILES)
    if (n >= kFewTokens) return f.template operator()<TileProducts>();
#endif
    f.template operator()<VectorProducts>();
}

void attention(const float* q, const float* k, const float* v, const int32_t* starts, int64_t n_seq,
               int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, float scale, bool causal,
               int64_t window, float softcap, int64_t tangents, float* y) {
    const int64_t n_primal = n_seq / (1 + tangents);
    const Attention a{q,     k,      v,      y,       n_heads,  n_kv_heads,      head_dim,
                      scale, causal, window, softcap, tangents, starts[n_primal]};
    parallel_for(n_primal * n_kv_heads, [&](int64_t task) {
        const int64_t s = task / n_kv_heads, n = starts[s + 1] - starts[s];
        with_products(
            n, [&]<typename Products>() { attend<Products>(a, starts[s], n, task % n_kv_heads); });
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
