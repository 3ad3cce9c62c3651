// The routes that a product with quantized weights may take: dense.h, int8.h or tiles.h. Each hands
// every tile of outputs it has finished to a sink, see DenseProduct.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dense.h"
#include "dispatch.h"
#include "int8.h"
#include "tiles.h"
#include "transposed.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

#if defined(FWDLLM_TILES)
#define FWDLLM_BF16
template <typename W>
using Bf16Product = TileProduct<W>;
#elif defined(__AVX512BF16__)
#define FWDLLM_BF16
template <typename W>
using Bf16Product = DenseProduct<BFloat16, W>;
#endif

// Calls f(product) with the route for this weight. Unless exact fp32 arithmetic is asked for,
// quantized weights meet int8 activations, or bf16 ones where that is the instruction set, and so
// do BF16 weights then. The rounding of a primal would be that of all its tangents, so its rows are
// among the first ``refined`` ones, which int8 takes more exactly.
template <typename F>
inline void with_product(const float* x, int64_t rows, [[maybe_unused]] int64_t refined,
                         const int32_t* references, const Weight& w, bool exact, const F& f) {
#if defined(FWDLLM_BF16)
    const bool fast = !exact && w.type != F32 && w.type != F16;
    if (fast) f(Bf16Product<Weight>(x, rows, references, w));
#else
    const bool fast = !exact && with_codec(w.type, [&](auto codec) {
        f(Int8Product<decltype(codec), Weight>(x, rows, refined, references, w));
    });
#endif
    if (!fast) f(DenseProduct<Float32, Weight>(x, rows, nullptr, w));
}

// Calls f(product) with dy W, by the route that with_product would take for W, but for outputs that
// are not whole groups.
template <typename F>
inline void with_transposed(const float* dy, int64_t rows, const Weight& w, bool exact,
                            const F& f) {
    const Transposed t(w);
#if defined(FWDLLM_BF16)
    const bool fast = !exact && w.type != F32 && w.type != F16;
    if (fast) f(Bf16Product<Transposed>(dy, rows, nullptr, t));
#else
    const bool fast = !exact && w.n_out % 32 == 0 && with_codec(w.type, [&](auto codec) {
        const TransposedBlocks<decltype(codec)> blocks(w);
        f(Int8Product<CodecQ8_0, TransposedBlocks<decltype(codec)> >(dy, rows, 0, nullptr, blocks));
    });
#endif
    if (!fast) f(DenseProduct<Float32, Transposed>(dy, rows, nullptr, t));
}

// Outputs out0 .. out0+n of a product, panel after panel: all rows of one before the next.
template <typename Product, typename Sink>
inline void run_by_panels(const Product& product, int64_t out0, int64_t n, const Sink& sink) {
    const int64_t width = product.panel_outputs;
    for (int64_t at = 0; at < n; at += width) product.run(out0 + at, min_of(width, n - at), sink);
}
#if defined(FWDLLM_TILES)
template <typename W, typename Sink>
inline void run_by_panels(const TileProduct<W>& product, int64_t out0, int64_t n,
                          const Sink& sink) {
    product.run(out0, n, product.n_tiles(), true, sink);
}
#endif

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
