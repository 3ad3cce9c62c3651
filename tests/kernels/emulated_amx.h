// AMX's tile instructions in C++, put in place of the compiler's by tests/amx.sh, so that kernels on
// tiles can be tested on any x86. As in Intel's manual, but that a product's two halves of a word are
// added in fp32 one after the other, and small numbers are not flushed to zero.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#define _tile_loadconfig emulated_loadconfig
#undef _tile_release
#define _tile_release emulated_release
#undef _tile_loadd
#define _tile_loadd emulated_loadd
#undef _tile_stream_loadd
#define _tile_stream_loadd emulated_loadd
#undef _tile_zero
#define _tile_zero emulated_zero
#undef _tile_stored
#define _tile_stored emulated_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated_dpbf16ps

struct EmulatedTiles {
    bool configured[8];
    uint32_t words[8][16][16];
};
inline thread_local EmulatedTiles emulated_tiles;

// What the processor would not do without configuration ends the test.
inline uint32_t (*emulated_tile(int tile))[16] {
    if (!emulated_tiles.configured[tile]) __builtin_trap();
    return emulated_tiles.words[tile];
}
inline float emulated_half(uint32_t word, int half) {
    const uint32_t bits = half ? word & 0xFFFF0000 : word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The tiles in use are of 16 rows of 64 bytes, by palette 1.
inline void emulated_loadconfig(const void* config) {
    const uint8_t* bytes = (const uint8_t*)config;
    if (bytes[0] != 1) __builtin_trap();
    std::memset(&emulated_tiles, 0, sizeof emulated_tiles);
    for (int tile = 0; tile < 8; ++tile) {
        const int width = bytes[16 + 2 * tile] + 256 * bytes[17 + 2 * tile], rows = bytes[48 + tile];
        if (!(width == 64 && rows == 16) && !(width == 0 && rows == 0)) __builtin_trap();
        emulated_tiles.configured[tile] = rows > 0;
    }
}
inline void emulated_release() { std::memset(&emulated_tiles, 0, sizeof emulated_tiles); }
inline void emulated_zero(int tile) {
    std::memset(emulated_tile(tile), 0, sizeof emulated_tiles.words[tile]);
}
inline void emulated_loadd(int tile, const void* from, long stride) {
    auto* to = emulated_tile(tile);
    for (int r = 0; r < 16; ++r) std::memcpy(to[r], (const char*)from + r * stride, 64);
}
inline void emulated_stored(int tile, void* to, long stride) {
    auto* from = emulated_tile(tile);
    for (int r = 0; r < 16; ++r) std::memcpy((char*)to + r * stride, from[r], 64);
}
inline void emulated_dpbf16ps(int sums, int rows, int outputs) {
    auto *c = emulated_tile(sums), *a = emulated_tile(rows), *b = emulated_tile(outputs);
    for (int r = 0; r < 16; ++r) {
        float total[16];
        std::memcpy(total, c[r], 64);
        for (int k = 0; k < 16; ++k)
            for (int half = 0; half < 2; ++half) {
                const float x = emulated_half(a[r][k], half);
                for (int j = 0; j < 16; ++j) total[j] += x * emulated_half(b[k][j], half);
            }
        std::memcpy(c[r], total, 64);
    }
}
