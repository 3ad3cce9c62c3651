// y = x W^T + bias + LoRA, panel after panel of outputs. Tangents are rows like all others, without
// bias.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "lora.h"
#include "pack.h"
#include "product.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Tasks per thread at least, so that a thread that is late to start costs little.
constexpr int64_t kTasksPerThread = 2;

// Calls body(out0, n) for equal shares of the panels of n_out outputs, a multiple of the threads.
template <typename Product, typename F>
inline void for_each_share(const Product& product, int64_t n_out, const F& body) {
    const int64_t width = product.panel_outputs;
    const int64_t n_panels = ceil_div(n_out, width), threads = num_threads();
    const int64_t least =
        max_of(ceil_div(n_panels, product.panels_at_once()), kTasksPerThread * threads);
    const int64_t n_tasks = min_of(n_panels, ceil_div(least, threads) * threads);
    parallel_for(n_tasks, [&](int64_t task) {
        const int64_t out0 = task * n_panels / n_tasks * width;
        body(out0, min_of((task + 1) * n_panels / n_tasks * width, n_out) - out0);
    });
}

template <typename Product>
inline void multiply(const Product& product, const float* bias, int64_t biased_rows,
                     const LoraTerm* term, float* y) {
    const int64_t n_out = product.w.n_out;
    const auto write = [&](int64_t row0, int64_t n_rows, int64_t out0, int64_t n, const float* c,
                           int64_t stride) {
        for (int64_t r = row0; r < row0 + n_rows; ++r, c += stride) {
            float* to = y + r * n_out + out0;
            const float* base = bias && r < biased_rows ? bias + out0 : nullptr;
            if (is_difference(product.references, r))
                base = y + product.references[r] * n_out + out0;
            for (int64_t j = 0; j < n; j += kWidth) {
                const int64_t m = min_of<int64_t>(kWidth, n - j);
                const VF v = load(c + j);
                store_first(to + j, base ? load_first(base + j, m) + v : v, m);
            }
        }
    };
    for_each_share(product, n_out, [&](int64_t out0, int64_t n) {
        product.run(out0, n, write);
        if (term) term->add(out0, n, y);
    });
}

// y = x W^T + bias + LoRA; without one, lora is null.
void matmul(const float* x, int64_t rows, const int32_t* references, const Weight& w,
            const float* bias, const LoRA* lora, const Lanes& lanes, bool exact, float* y) {
    const int64_t biased_rows = rows / (1 + lanes.n_tangents());
    with_product(x, rows, lanes.tangents ? biased_rows : 0, references, w, exact,
                 [&](const auto& product) {
                     if (lora) {
                         const LoraTerm term(x, rows, w.n_in, w.n_out, *lora, lanes);
                         multiply(product, bias, biased_rows, &term, y);
                     } else {
                         multiply(product, bias, biased_rows, nullptr, y);
                     }
                 });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
