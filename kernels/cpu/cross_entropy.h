// The output product fused with cross-entropy. Of the logits only those of a few panels of outputs
// exist at a time: each chunk of the vocabulary has a partial softmax of every row, and these are
// put together at the end, for
//   nll[r] = log sum_j exp(logit[r, j]) - logit[r, labels[r]],
// and for a tangent, with the softmax p of its primal,
//   sum_j p[j] dlogit[r, j] - dlogit[r, labels[r]].
// Of logits below a soft cap dlogit is that of the product times the cap's slope.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "pack.h"
#include "product.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Outputs per partial softmax. Fixed, so that neither threads nor cache sizes change a result.
constexpr int64_t kVocabChunk = 256;
// Outputs by which a partial softmax grows, whole panels: what that costs beside the exponentials
// is paid for so many, and a thousand rows of so many logits still fit in the L2 cache.
constexpr int64_t kVocabStep = 64;
static_assert(kVocabChunk % kVocabStep == 0);

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

// The slope of a soft cap where it gives ``capped``.
inline VF slope_of_cap(float softcap, VF capped) {
    const VF t = capped * splat(1.0f / softcap);
    return splat(1.0f) - t * t;
}

// capped: softcap tanh(logit / softcap). slopes: whether they take the place of the logits.
inline void cap_logits(float softcap, float* logits, int64_t n, float* capped, bool slopes) {
    for (int64_t j = 0; j < n; j += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - j);
        const VF c = splat(softcap) * vtanh(load_first(logits + j, m) * splat(1.0f / softcap));
        if (slopes) store_first(logits + j, slope_of_cap(softcap, c), m);
        store_first(capped + j, c, m);
    }
}

// What one chunk of the vocabulary knows of all rows: the sink of its product's tiles, which come
// panel after panel.
struct ChunkOfLogits {
    const int32_t* references;
    const int32_t* labels;
    int64_t primal, tangents;  // rows of the primal, and how many slices of as many follow it
    int64_t end;               // of the chunk's outputs
    float softcap;             // 0 is none
    float* logits;             // [rows][kVocabStep], of the panels at hand
    float* capped;             // the same below the soft cap; the same array if there is none
    PartialSoftmax* softmax;   // [rows], of this chunk
    float* label_logit;        // [rows], of all chunks: the label's is in one of them

    void operator()(int64_t row0, int64_t n_rows, int64_t out0, int64_t n, const float* c,
                    int64_t stride) const {
        const int64_t at = out0 % kVocabStep, found = at + n;
        for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
            __builtin_memcpy(logits + r * kVocabStep + at, c, 4 * n);
            if (found == kVocabStep || out0 + n == end) add(r, out0 - at, found);
        }
    }

    // Outputs out0 .. out0+n of row r.
    void add(int64_t r, int64_t out0, int64_t n) const {
        float* to = logits + r * kVocabStep;
        if (is_difference(references, r))
            for (int64_t j = 0; j < n; ++j) to[j] += logits[references[r] * kVocabStep + j];
        float* values = r < primal ? capped + r * kVocabStep : to;
        if (softcap > 0 && r < primal) cap_logits(softcap, to, n, values, tangents > 0);
        if (softcap > 0 && r >= primal)
            for (int64_t j = 0; j < n; ++j) to[j] *= logits[r % primal * kVocabStep + j];
        const int64_t label = labels[r] - out0;
        if (label >= 0 && label < n) label_logit[r] = values[label];
        if (r < primal)
            extend(softmax + r, values, n, tangents > 0);
        else
            extend_tangent(softmax + r, softmax[r % primal], capped + r % primal * kVocabStep, to,
                           n);
    }
};

// Partial softmaxes [n_chunks][rows] and the labels' logits of all rows.
template <typename Product>
inline void partial_softmaxes(const Product& product, int64_t rows, int64_t tangents,
                              const int32_t* labels, float softcap, PartialSoftmax* softmaxes,
                              float* label_logit) {
    static_assert(kVocabStep % Product::panel_outputs == 0);
    const int64_t n_out = product.w.n_out;
    parallel_for(ceil_div(n_out, kVocabChunk), [&](int64_t chunk) {
        Buffer buffer(rows * kVocabStep * (softcap > 0 ? 8 : 4));
        float* logits = (float*)buffer.data;
        PartialSoftmax* mine = softmaxes + chunk * rows;
        for (int64_t r = 0; r < rows; ++r) mine[r] = {0.0, -__builtin_inff()};
        const int64_t out0 = chunk * kVocabChunk, end = min_of(out0 + kVocabChunk, n_out);
        const ChunkOfLogits sink{product.references,
                                 labels,
                                 rows / (1 + tangents),
                                 tangents,
                                 end,
                                 softcap,
                                 logits,
                                 softcap > 0 ? logits + rows * kVocabStep : logits,
                                 mine,
                                 label_logit};
        run_by_panels(product, out0, end - out0, sink);
    });
}

// A row's chunks put together; those of a row are ``rows`` apart.
inline PartialSoftmax whole_softmax(const PartialSoftmax* chunks, int64_t n_chunks, int64_t rows) {
    float max = chunks[0].max;
    for (int64_t i = 1; i < n_chunks; ++i) {
        const float m = chunks[i * rows].max;
        if (!(m <= max)) max = m;
    }
    double total = 0;
    for (int64_t i = 0; i < n_chunks; ++i)
        total += chunks[i * rows].sum * __builtin_exp((double)chunks[i * rows].max - max);
    return {total, max};
}

// nll [rows] of a product, and whole [rows], the softmax of each row's logits.
template <typename Product>
inline void losses(const Product& product, int64_t rows, int64_t tangents, const int32_t* labels,
                   float softcap, PartialSoftmax* whole, double* nll) {
    const int64_t primal = rows / (1 + tangents);
    const int64_t n_chunks = ceil_div(product.w.n_out, kVocabChunk);
    Buffer softmax_buffer(n_chunks * rows * (int64_t)sizeof(PartialSoftmax)),
        label_buffer(rows * 4);
    auto* softmaxes = (PartialSoftmax*)softmax_buffer.data;
    auto* label_logit = (float*)label_buffer.data;
    partial_softmaxes(product, rows, tangents, labels, softcap, softmaxes, label_logit);
    for (int64_t r = 0; r < rows; ++r) {
        whole[r] = whole_softmax(softmaxes + r, n_chunks, rows);
        if (r < primal)
            nll[r] = __builtin_log(whole[r].sum) + whole[r].max - label_logit[r];
        else
            nll[r] = whole[r].sum / whole[r % primal].sum - label_logit[r];
    }
}

void cross_entropy(const float* x, int64_t rows, const int32_t* references, int64_t tangents,
                   const Weight& w, const int32_t* labels, float softcap, bool exact, double* nll) {
    Buffer whole(rows * (int64_t)sizeof(PartialSoftmax));
    const int64_t refined = tangents > 0 ? rows / (1 + tangents) : 0;
    with_product(x, rows, refined, references, w, exact, [&](const auto& product) {
        losses(product, rows, tangents, labels, softcap, (PartialSoftmax*)whole.data, nll);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
