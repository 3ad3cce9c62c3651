// Products on AMX's tile registers, of 16 rows of 64 bytes: one instruction adds to 16 x 16 fp32
// sums the products of 16 rows by 16 outputs along 32 bf16 (Intel's Optimization Reference Manual,
// 20).
//
// It takes 16 cycles, as a load of a tile takes 8: 2 x 2 tiles of sums, whose products share 2
// tiles of activations and 2 of weights, leave half of the load units' time. int8 tiles would take
// half of the cycles, but the scales of a group of 32 make each product a tile of its own sums,
// which has to be stored (16 cycles), converted, scaled and added: 16 loads, 32 conversions and
// multiplications and 16 additions in vectors, another 32 cycles on two units. bf16 with the scales
// in the weights has none of that, and is exacter.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__AMX_BF16__)

namespace fwdllm::FWDLLM_ISA {
namespace {

constexpr int kTileRows = 16, kTileWords = 16, kTileOutputs = 2 * 16;

struct alignas(64) TileConfig {  // of ldtilecfg
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// The tile registers of this thread, while this lives.
struct Tiles {
    Tiles() { _tile_loadconfig(&kTileConfig); }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

// c [2 kTileRows][kTileOutputs] += tile [words / kTileWords][2 kTileRows][kTileWords] .
// panel [words][kTileOutputs]^T; the first half of the rows alone, or both.
template <bool kBoth>
inline void multiply_tiles(const uint32_t* tile, const uint32_t* panel, int64_t n_words, float* c) {
    constexpr int64_t half = kTileRows * kTileWords, stride = 4 * kTileOutputs;
    float* c_low = c + kTileRows * kTileOutputs;
    // GCC's tile loads do not say that they read memory: what was written must be there.
    __asm__ volatile("" ::: "memory");
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    if (kBoth) {
        _tile_loadd(2, c_low, stride);
        _tile_loadd(3, c_low + 16, stride);
    }
    for (int64_t i = 0; i < n_words; i += kTileWords) {
        _tile_loadd(4, tile, 64);
        _tile_loadd(6, panel, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + 16, stride);
        _tile_dpbf16ps(1, 4, 7);
        if (kBoth) {
            _tile_loadd(5, tile + half, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        tile += 2 * half;
        panel += kTileWords * kTileOutputs;
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16, stride);
    if (kBoth) {
        _tile_stored(2, c_low, stride);
        _tile_stored(3, c_low + 16, stride);
    }
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA

#endif
