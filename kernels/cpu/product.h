// The routes that a product with quantized weights may take: dense.h or int8.h. Either hands each
// tile of outputs it has finished to a sink, see DenseProduct.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dense.h"
#include "dispatch.h"
#include "int8.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Calls f(product) with the route for this weight. Unless exact fp32 arithmetic is asked for,
// quantized weights meet int8 activations, or bf16 ones where that is the instruction set, and so
// do BF16 weights then. The rounding of a primal would be that of all its tangents, so its rows are
// among the first ``refined`` ones, which int8 takes more exactly.
template <typename F>
inline void with_product(const float* x, int64_t rows, [[maybe_unused]] int64_t refined,
                         const int32_t* references, const Weight& w, bool exact, const F& f) {
#if defined(FWDLLM_BF16)
    const bool fast = !exact && w.type != F32 && w.type != F16;
    if (fast) f(DenseProduct<BFloat16, Weight>(x, rows, references, w));
#else
    const bool fast = !exact && with_codec(w.type, [&](auto codec) {
        f(Int8Product<decltype(codec), Weight>(x, rows, refined, references, w));
    });
#endif
    if (!fast) f(DenseProduct<Float32, Weight>(x, rows, nullptr, w));
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
