// Products on AMX's tile registers, of 16 rows of 64 bytes: one instruction adds to 16 x 16 fp32
// sums the products of 16 rows of A by 16 columns of B along 32 bf16 (Intel's Optimization
// Reference Manual, 20). It takes 16 cycles, as a load of a tile takes 8.
//
// int8 tiles would take half of the cycles, but the scales of a group of 32 make each product a
// tile of its own sums, which has to be stored (16 cycles), converted, scaled and added: 16 loads,
// 32 conversions and multiplications and 16 additions in vectors, another 32 cycles on two units.
// bf16 with the scales in the weights has none of that, and is exacter.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(FWDLLM_TILES)

namespace fwdllm::FWDLLM_ISA {
namespace {

// What a tile has along K, in bf16, and in words of two, neighbours along K. A tile of A is 16 rows
// of 16 words; of B 16 words along K by 16 columns.
constexpr int64_t kStep = 32, kStepWords = kStep / 2;
constexpr int kTileSide = 16;
constexpr int64_t kTileSize = kTileSide * kStepWords;  // in words
// A panel of weights, which stays in the L1 cache, is two tiles wide; activations pass by one.
constexpr int kPanelOutputs = 2 * kTileSide;

// Of the 8 tile registers half: now and then, we believe where another hardware thread of the core
// is at work, a processor has too few to rename more, and products wait for each other. There 2 x 2
// tiles of sums, whose 4 loads serve 4 products, took 2.2 times as long a product as these 3 loads
// for 2; otherwise both take the same (docs/decisions.md).
struct alignas(64) TileConfig {  // of ldtilecfg
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// The tile registers of this thread, while this lives.
struct Tiles {
    Tiles() { _tile_loadconfig(&kTileConfig); }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

// The products of a panel [steps][2] of tiles by others [steps], added to c, or in place of it if
// the sums are new. The panel is A and c [kPanelOutputs][kTileSide], or it is B and c
// [kTileSide][kPanelOutputs].
template <bool kPanelIsA>
inline void multiply_tiles(const uint32_t* panel, const uint32_t* tile, int64_t steps, bool is_new,
                           float* c) {
    constexpr int64_t stride = 4 * (kPanelIsA ? kTileSide : kPanelOutputs);
    float* second = c + (kPanelIsA ? kTileSide * kTileSide : kTileSide);
    // GCC's tile loads do not say that they read memory: what was written must be there.
    __asm__ volatile("" ::: "memory");
    if (is_new) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, c, stride);
        _tile_loadd(1, second, stride);
    }
    for (int64_t i = 0; i < steps; ++i, panel += 2 * kTileSize, tile += kTileSize) {
        _tile_stream_loadd(3, tile, 64);  // not to push the panel out of the L1 cache
        _tile_loadd(2, panel, 64);
        if (kPanelIsA)
            _tile_dpbf16ps(0, 2, 3);
        else
            _tile_dpbf16ps(0, 3, 2);
        _tile_loadd(2, panel + kTileSize, 64);
        if (kPanelIsA)
            _tile_dpbf16ps(1, 2, 3);
        else
            _tile_dpbf16ps(1, 3, 2);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, second, stride);
}

// The products of a [steps][2] by b [steps][2][2], the high and low parts of operands that are
// their sums, added to c [kTileSide][kPanelOutputs] or in place of it; rows of c are stride bytes
// apart. Without those of two low parts: 7 loads for 6 products.
inline void multiply_parts(const uint32_t* a, const uint32_t* b, int64_t steps, bool is_new,
                           float* c, int64_t stride) {
    // As above; and here vectors write, right before, what tiles read.
    __asm__ volatile("" ::: "memory");
    if (is_new) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, c, stride);
        _tile_loadd(1, c + kTileSide, stride);
    }
    for (int64_t i = 0; i < steps; ++i, a += 2 * kTileSize, b += 4 * kTileSize) {
        _tile_loadd(2, a, 64);
        _tile_loadd(3, b + 2 * kTileSize, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(3, b + 3 * kTileSize, 64);
        _tile_dpbf16ps(1, 2, 3);
        _tile_loadd(3, b, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(3, b + kTileSize, 64);
        _tile_dpbf16ps(1, 2, 3);
        _tile_loadd(2, a + kTileSize, 64);
        _tile_dpbf16ps(1, 2, 3);
        _tile_loadd(3, b, 64);
        _tile_dpbf16ps(0, 2, 3);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + kTileSide, stride);
    __asm__ volatile("" ::: "memory");
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA

#endif
