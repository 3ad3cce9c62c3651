// Rows as scaled differences to other rows, for products that are computed elsewhere: what the rows
// have in common is then rounded once, as in int8.h.
#pragma once

#include <cstdint>

#include "layers.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// The power of two that makes the largest of a row, if that is a number above 0, 1 to 2.
inline float normalizing(float largest) {
    if (!(largest > 1e-30f && largest < 1e30f)) return 1;
    return __builtin_ldexpf(1, -__builtin_ilogbf(largest));
}

// x[r] = (x[r] - x[references[r]]) scales[r] where that is another row, which is its own reference.
void to_relative(float* x, int64_t rows, int64_t d, const int32_t* references, float* scales) {
    for_each_row(rows, [&](int64_t r) {
        if (references[r] == r) return;
        float* to = x + r * d;
        const float* base = x + references[r] * d;
        float largest = 0;
        for (int64_t j = 0; j < d; ++j) {
            to[j] -= base[j];
            const float size = __builtin_fabsf(to[j]);
            largest = size > largest ? size : largest;
        }
        scales[r] = normalizing(largest);
        for (int64_t j = 0; j < d; ++j) to[j] *= scales[r];
    });
}

// The way back after a product: y[r] = y[r] / scales[r] + y[references[r]].
void from_relative(float* y, int64_t rows, int64_t d, const int32_t* references,
                   const float* scales) {
    for_each_row(rows, [&](int64_t r) {
        if (references[r] == r) return;
        float* to = y + r * d;
        const float* base = y + references[r] * d;
        const float back = 1 / scales[r];  // exact, of a power of two
        for (int64_t j = 0; j < d; ++j) to[j] = to[j] * back + base[j];
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
