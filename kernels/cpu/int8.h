// The product of packed int8 activations with a quantized W; see int8_pack.h and int8_dot.h. The
// first ``refined`` rows count twice: what rounding takes from them is multiplied as well, to about
// 15 bits.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dispatch.h"
#include "int8_dot.h"
#include "int8_pack.h"
#include "pack.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

template <typename Codec, typename W>
struct Int8Product {  // run() is that of DenseProduct
    const W& w;
    int64_t rows, refined;
    const int32_t* references;
    Buffer tiles, rests, zeros;
    static constexpr int panel_outputs = kInt8Outputs;

    Int8Product(const float* x, int64_t rows, int64_t refined, const int32_t* references,
                const W& w)
        : w(w),
          rows(rows),
          refined(refined),
          references(references),
          tiles(ceil_div(rows, kRows) * (w.n_in / 32) * sizeof(TileGroup<Codec>)),
          rests(ceil_div(refined, kRows) * (w.n_in / 32) * sizeof(TileGroup<Codec>)),
          zeros(ceil_div(rows, kRows)) {
        parallel_for(ceil_div(rows, kRows), [&](int64_t t) {
            pack_tile_int8<Codec>(x, t * kRows, min_of<int64_t>(kRows, rows - t * kRows),
                                  references, w.n_in, tile(t), refined_rows(t), rest(t));
            is_zero(t) = true;
            for (int64_t g = 0; g < w.n_in / 32; ++g)
                for (int r = 0; r < kRows; ++r) is_zero(t) &= tile(t)[g].scale[r] == 0;
        });
    }

    TileGroup<Codec>* tile(int64_t t) const {
        return (TileGroup<Codec>*)tiles.data + t * (w.n_in / 32);
    }
    TileGroup<Codec>* rest(int64_t t) const {
        return (TileGroup<Codec>*)rests.data + t * (w.n_in / 32);
    }
    int64_t refined_rows(int64_t t) const { return min_of<int64_t>(kRows, refined - t * kRows); }

    // Lanes do not differ before the first perturbed product, and have no tangents there.
    bool& is_zero(int64_t t) const { return ((bool*)zeros.data)[t]; }

    // Half of the L2 cache for decoded panels: a tile, read from there too, serves them all.
    int64_t panels_at_once() const {
        const int64_t panel = w.n_in / 32 * (int64_t)sizeof(PanelGroup<Codec>);
        return max_of<int64_t>(1, l2_bytes() / 2 / panel);
    }

    template <typename Sink>
    void run(int64_t out0, int64_t n, const Sink& sink) const {
        const int64_t groups = w.n_in / 32, n_panels = ceil_div(n, kInt8Outputs);
        auto* panels =
            (PanelGroup<Codec>*)thread_scratch(n_panels * groups * sizeof(PanelGroup<Codec>));
        pack_panels_int8(w, out0, n, panels);
        constexpr int size = kRows * kInt8Outputs;
        alignas(64) float c[size], c_rest[size];
        for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
            for (int64_t p = 0; p < n_panels; ++p) {
                if (is_zero(row0 / kRows))
                    __builtin_memset(c, 0, sizeof c);
                else
                    multiply_int8<Codec>(tile(row0 / kRows), panels + p * groups, groups, c);
                if (row0 < refined) {
                    multiply_int8<Codec>(rest(row0 / kRows), panels + p * groups, groups, c_rest);
                    for (int i = 0; i < size; i += kWidth)
                        store(c + i, load(c + i) + load(c_rest + i));
                }
                sink(row0, min_of<int64_t>(kRows, rows - row0), out0 + p * kInt8Outputs,
                     min_of<int64_t>(kInt8Outputs, n - p * kInt8Outputs), c, kInt8Outputs);
            }
        }
    }
};

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
