// Losses of cross_entropy.h with the cotangents of their inputs,
//   dx[r] = sum_j p[r, j] W[j] - W[labels[r]],  p the softmax of the logits.
// a soft cap's slope being a factor of each term.
// Each logit is computed once, and those of kVocabBlock words exist at a time: the sum goes on with
// exp(logit - m), m the largest logit so far, and shrinks when m grows, as in flash attention
// (arXiv 2205.14135). The label's own weight, p - 1, is the largest by far and cancels most of what
// is summed: it goes in exactly, apart from the products of the others, which may be rounded.
#pragma once

#include <cstdint>

#include "cross_entropy.h"
#include "decode.h"
#include "dispatch.h"
#include "matmul.h"
#include "pack.h"
#include "product.h"
#include "simd.h"
#include "threads.h"
#include "transposed.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Words of the vocabulary at a time: for 256 rows 2 MiB of logits, and enough for a product. Whole
// groups of 32, and whole chunks.
constexpr int64_t kVocabBlock = 2048;
static_assert(kVocabBlock % kVocabChunk == 0);

// Logits of words first .. first+n: the sink of a product's tiles.
struct BlockOfLogits {
    int64_t first, n;
    float* logits;  // [rows][n]

    void operator()(int64_t row0, int64_t n_rows, int64_t out0, int64_t n_outs, const float* c,
                    int64_t stride) const {
        for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride)
            __builtin_memcpy(logits + r * n + out0 - first, c, 4 * n_outs);
    }
};

// A row's partial softmaxes of a block's chunks, those of a row ``rows`` apart, with the bits of
// partial_softmaxes.
inline void extend_by_block(PartialSoftmax* chunks, int64_t rows, float* logits, int64_t n) {
    for (int64_t at = 0; at < n; at += kVocabChunk, chunks += rows) {
        *chunks = {0.0, -__builtin_inff()};
        const int64_t end = min_of(at + kVocabChunk, n);
        for (int64_t j = at; j < end; j += kVocabStep)
            extend(chunks, logits + j, min_of(kVocabStep, end - j), false);
    }
}

void cross_entropy_vjp(const float* x, int64_t rows, const Weight& w, const int32_t* labels,
                       float softcap, bool exact, double* nll, float* dx) {
    const int64_t width = w.n_in, n_chunks = ceil_div(w.n_out, kVocabChunk);
    Buffer softmax_buffer(n_chunks * rows * (int64_t)sizeof(PartialSoftmax)),
        p_buffer(4 * rows * kVocabBlock), max_buffer(4 * rows), shrink_buffer(4 * rows),
        label_buffer(4 * rows), share_buffer(4 * rows * width);
    auto* softmaxes = (PartialSoftmax*)softmax_buffer.data;
    auto* p = (float*)p_buffer.data;
    auto* max = (float*)max_buffer.data;        // the largest logit so far
    auto* shrink = (float*)shrink_buffer.data;  // what its growth makes of the sum before
    auto* label_logit = (float*)label_buffer.data;
    auto* share = (float*)share_buffer.data;
    __builtin_memset(dx, 0, 4 * rows * width);
    for (int64_t r = 0; r < rows; ++r) max[r] = -__builtin_inff();
    with_product(x, rows, 0, nullptr, w, exact, [&](const auto& product) {
        for (int64_t first = 0; first < w.n_out; first += kVocabBlock) {
            const int64_t n = min_of(kVocabBlock, w.n_out - first);
            for_each_share(product, n, [&](int64_t at, int64_t n_outs) {
                product.run(first + at, n_outs, BlockOfLogits{first, n, p});
            });
            parallel_for(rows, [&](int64_t r) {
                float* to = p + r * n;
                if (softcap > 0) cap_logits(softcap, to, n, to, false);
                PartialSoftmax* chunks = softmaxes + first / kVocabChunk * rows + r;
                extend_by_block(chunks, rows, to, n);
                const float before = max[r];
                const float of_block = whole_softmax(chunks, ceil_div(n, kVocabChunk), rows).max;
                if (!(of_block <= before)) max[r] = of_block;
                shrink[r] = first == 0 ? 0 : (float)__builtin_exp((double)before - max[r]);
                const int64_t label = labels[r] - first;
                if (label >= 0 && label < n) label_logit[r] = to[label];
                for (int64_t j = 0; j < n; j += kWidth) {
                    const int64_t m = min_of<int64_t>(kWidth, n - j);
                    const VF logit = load_first(to + j, m);
                    VF share = vexp(logit - splat(max[r]));
                    if (softcap > 0) share *= slope_of_cap(softcap, logit);
                    store_first(to + j, share, m);
                }
                if (label >= 0 && label < n) to[label] = 0;
            });
            const Weight block{w.data + first * w.row_bytes, w.type, n, width, w.row_bytes};
            with_transposed(p, rows, block, exact, [&](const auto& transposed) {
                multiply(transposed, nullptr, 0, nullptr, share);
            });
            parallel_for(rows, [&](int64_t r) {
                for (int64_t i = r * width; i < (r + 1) * width; ++i)
                    dx[i] = dx[i] * shrink[r] + share[i];
            });
        }
    });
    parallel_for(rows, [&](int64_t r) {
        const PartialSoftmax whole = whole_softmax(softmaxes + r, n_chunks, rows);
        nll[r] = __builtin_log(whole.sum) + whole.max - label_logit[r];
        const float inverse = (float)(1.0 / whole.sum);
        const float p_label =
            (float)(__builtin_exp((double)label_logit[r] - whole.max) / whole.sum);
        const float t = softcap > 0 ? label_logit[r] / softcap : 0.0f;
        const float of_label = (p_label - 1) * (1 - t * t);
        float* label_row = (float*)thread_scratch(4 * width);
        decode_row(w.type, w.data + labels[r] * w.row_bytes, 0, width, label_row);
        for (int64_t i = 0; i < width; ++i) {
            float* to = dx + r * width + i;
            *to = *to * inverse + of_label * label_row[i];
        }
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
