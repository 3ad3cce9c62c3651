// Losses of cross_entropy.h with the cotangents of their inputs,
//   dx[r] = sum_j p[r, j] W[j] - W[labels[r]],  p the softmax of the logits.
// Logits are computed twice, so that no more of them exist at a time than those of kVocabBlock
// words. The label's own weight, p - 1, is the largest by far and cancels most of what is summed:
// it goes in exactly, apart from the products of the others, which may be rounded.
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

// Words of the vocabulary at a time: for 256 rows 2 MiB of probabilities, and enough for a product.
// Whole groups of 32.
constexpr int64_t kVocabBlock = 2048;

// Probabilities of words first .. first+n, but of the labels: the sink of a product's tiles.
struct BlockOfProbabilities {
    const PartialSoftmax* whole;
    const int32_t* labels;
    int64_t first, n;
    float* p;        // [rows][n]
    float* label_p;  // [rows], of all blocks: the label's is in one of them

    void operator()(int64_t row0, int64_t n_rows, int64_t out0, int64_t n_outs, const float* c,
                    int64_t stride) const {
        for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
            float* to = p + r * n + out0 - first;
            const VF max = splat(whole[r].max), inverse = splat((float)(1.0 / whole[r].sum));
            for (int64_t j = 0; j < n_outs; j += kWidth) {
                const int64_t m = min_of<int64_t>(kWidth, n_outs - j);
                store_first(to + j, vexp(load_first(c + j, m) - max) * inverse, m);
            }
            const int64_t label = labels[r] - out0;
            if (label < 0 || label >= n_outs) continue;
            label_p[r] = to[label];
            to[label] = 0;
        }
    }
};

void cross_entropy_vjp(const float* x, int64_t rows, const Weight& w, const int32_t* labels,
                       bool exact, double* nll, float* dx) {
    const int64_t width = w.n_in;
    Buffer whole_buffer(rows * (int64_t)sizeof(PartialSoftmax)), p_buffer(4 * rows * kVocabBlock),
        label_buffer(4 * rows), share_buffer(4 * rows * width);
    auto* whole = (PartialSoftmax*)whole_buffer.data;
    auto* p = (float*)p_buffer.data;
    auto* label_p = (float*)label_buffer.data;
    auto* share = (float*)share_buffer.data;
    __builtin_memset(dx, 0, 4 * rows * width);
    with_product(x, rows, 0, nullptr, w, exact, [&](const auto& product) {
        losses(product, rows, 0, labels, whole, nll);
        for (int64_t first = 0; first < w.n_out; first += kVocabBlock) {
            const int64_t n = min_of(kVocabBlock, w.n_out - first);
            const BlockOfProbabilities sink{whole, labels, first, n, p, label_p};
            const int64_t panels = ceil_div(n, product.panel_outputs);
            parallel_for(panels, [&](int64_t i) {
                const int64_t at = i * product.panel_outputs;
                product.run(first + at, min_of<int64_t>(product.panel_outputs, n - at), sink);
            });
            const Weight block{w.data + first * w.row_bytes, w.type, n, width, w.row_bytes};
            with_transposed(p, rows, block, exact, [&](const auto& transposed) {
                multiply(transposed, nullptr, 0, nullptr, share);
            });
            parallel_for(rows, [&](int64_t r) {
                for (int64_t i = r * width; i < (r + 1) * width; ++i) dx[i] += share[i];
            });
        }
    });
    parallel_for(rows, [&](int64_t r) {
        float* label_row = (float*)thread_scratch(4 * width);
        decode_row(w.type, w.data + labels[r] * w.row_bytes, 0, width, label_row);
        for (int64_t i = 0; i < width; ++i) dx[r * width + i] += (label_p[r] - 1) * label_row[i];
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
