// Attention's products on AMX's tiles. Operands are sums of two bf16, of which all products are
// made but those of two low parts: plain bf16 is wrong by up to 0.4%, and scores have no reference
// lane whose rounding would take that out again (docs/decisions.md).
#pragma once

#include <cstdint>

#include "amx.h"
#include "attention_vectors.h"
#include "pack.h"
#include "simd.h"

#if defined(FWDLLM_TILES)

namespace fwdllm::FWDLLM_ISA {
namespace {

// Operands are packed in steps of kStep along K, each the tiles of the high parts, then those of
// the low ones: of A [steps][2 parts], of B, a panel of kPanelOutputs columns, [steps][2 parts][2].
// A word has elements w and w + kStepWords of a step, so that no vector needs a permutation.
constexpr int64_t kStepA = 2 * kTileSize, kStepB = 4 * kTileSize;

// x = high + low, to 2^-17 of it, in the upper halves of words. low of what is not finite is
// neither.
inline void to_parts(VF x, VU* high, VU* low) {
    *high = ((VU)x + 0x8000) & 0xFFFF0000;
    const VF rest = x - (VF)*high;
    // The bits of a NaN could wrap around.
    *low = (VU)select(rest == rest, (VF)((VU)rest + 0x8000), rest);
}

// Words of low halves a and high halves b.
inline void store_parts(VF a, VF b, uint32_t* high, uint32_t* low) {
    VU a_high, a_low, b_high, b_low;
    to_parts(a, &a_high, &a_low);
    to_parts(b, &b_high, &b_low);
    store((float*)high, (VF)(a_high >> 16 | b_high));
    store((float*)low, (VF)(a_low >> 16 | (b_low & 0xFFFF0000)));
}

// Element first of n on; zeros behind them, a vector or more.
inline VF load_padded(const float* from, int64_t first, int64_t n) {
    if (first + kWidth <= n) return load(from + first);
    return first < n ? load_first(from + first, n - first) : VF{};
}

// Rows [n][k] times a factor -> A.
inline void pack_a(const float* rows, int64_t row_stride, int n, int64_t k, float factor,
                   uint32_t* out) {
    for (int64_t d = 0; d < k; d += kStep, out += kStepA)
        for (int r = 0; r < kTileSide; ++r)
            for (int64_t w = 0; w < kStepWords; w += kWidth) {
                const float* row = rows + r * row_stride;
                const int64_t end = r < n ? k : 0, at = d + w;
                uint32_t* to = out + r * kStepWords + w;
                store_parts(load_padded(row, at, end) * splat(factor),
                            load_padded(row, at + kStepWords, end) * splat(factor), to,
                            to + kTileSize);
            }
}

// Rows [n][k], n up to kPanelOutputs, -> B, along K their k.
inline void pack_transposed(const float* rows, int64_t row_stride, int64_t n, int64_t k,
                            uint32_t* out) {
    alignas(64) uint32_t words[kStepA];
    for (int64_t d = 0; d < k; d += kStep, out += kStepB)
        for (int64_t tile = 0; tile < 2; ++tile) {
            const int64_t first = tile * kTileSide;
            pack_a(rows + first * row_stride + d, row_stride,
                   (int)min_of<int64_t>(kTileSide, n - first), min_of(kStep, k - d), 1.0f, words);
            for (int64_t part = 0; part < 2; ++part)
                for (int64_t i = 0; i < kStepWords; i += 8)
                    transpose_16x8(words + part * kTileSize + i, kStepWords,
                                   out + (2 * part + tile) * kTileSize + i * kTileSide, kTileSide);
        }
}

// Rows [k][n], n up to kPanelOutputs, -> B.
inline void pack_b(const float* rows, int64_t row_stride, int64_t k, int64_t n, uint32_t* out) {
    for (int64_t j = 0; j < k; j += kStep, out += kStepB)
        for (int64_t w = 0; w < kStepWords; ++w)
            for (int64_t d = 0; d < kPanelOutputs; d += kWidth) {
                const int64_t a = j + w, b = a + kStepWords;
                uint32_t* to = out + d / kTileSide * kTileSize + w * kTileSide + d % kTileSide;
                store_parts(load_padded(rows + a * row_stride, d, a < k ? n : 0),
                            load_padded(rows + b * row_stride, d, b < k ? n : 0), to,
                            to + 2 * kTileSize);
            }
}

// As VectorProducts.
struct TileProducts {
    // Two tiles of queries, which find the keys and values of the first in the L1 cache.
    static constexpr int kBlock = 2 * kTileSide;
    static constexpr int64_t kFirst = kStep, kPadded = kStep;
    // Of values at a time: 16 KiB of a panel, read by both tiles of queries, and 16 KiB of weights,
    // read by all panels, stay in the L1 cache.
    static constexpr int64_t kSteps = 4;

    const Tiles registers;
    const int64_t n, head_dim, stride, dim_steps, key_steps, size;
    uint32_t *keys, *values, *queries[2], *weights[2];
    float* sums;

    // An odd number of cache lines: rows a power of two apart would share sets of the cache.
    static int64_t stride_of(int64_t n) { return ceil_div(n, kStep) * kStep + 16; }
    static int64_t bytes(int64_t n, int64_t head_dim, int64_t key_lanes, int64_t value_lanes) {
        const int64_t dims = ceil_div(head_dim, kStep), keys = ceil_div(n, kStep);
        return 4 * ((key_lanes + value_lanes) * dims * keys * kStepB +
                    2 * 2 * (dims + keys) * kStepA + dims * kBlock * kPanelOutputs);
    }

    TileProducts(void* scratch, int64_t n, int64_t head_dim, int64_t key_lanes, int64_t value_lanes)
        : n(n),
          head_dim(head_dim),
          stride(stride_of(n)),
          dim_steps(ceil_div(head_dim, kStep)),
          key_steps(ceil_div(n, kStep)),
          size(dim_steps * key_steps * kStepB),
          keys((uint32_t*)scratch),
          values(keys + key_lanes * size),
          queries{values + value_lanes * size, queries[0] + 2 * dim_steps * kStepA},
          weights{queries[1] + 2 * dim_steps * kStepA, weights[0] + 2 * key_steps * kStepA},
          sums((float*)(weights[1] + 2 * key_steps * kStepA)) {}

    // keys [key_steps][dim_steps][kStepB], values [dim_steps][key_steps][kStepB]
    void pack_keys(int64_t lane, const float* rows, int64_t row_stride) {
        for (int64_t j = 0; j < key_steps; ++j)
            pack_transposed(rows + j * kStep * row_stride, row_stride, n - j * kStep, head_dim,
                            keys + lane * size + j * dim_steps * kStepB);
    }
    void pack_values(int64_t lane, const float* rows, int64_t row_stride) {
        for (int64_t d = 0; d < dim_steps; ++d)
            pack_b(rows + d * kStep, row_stride, n, head_dim - d * kStep,
                   values + lane * size + d * key_steps * kStepB);
    }

    void set_queries(Kind kind, const float* rows, int64_t row_stride, int n_queries, float scale) {
        for (int i = 0; i < n_queries; i += kTileSide)
            pack_a(rows + i * row_stride, row_stride, n_queries - i, head_dim, scale,
                   queries[kind] + i / kTileSide * dim_steps * kStepA);
    }

    template <bool kAdd>
    void score(Kind kind, int64_t lane, int64_t first, int64_t n_keys, int n_queries,
               float* scores) const {
        const uint32_t* panel = keys + lane * size + first / kStep * dim_steps * kStepB;
        for (int64_t j = 0; j < n_keys; j += kPanelOutputs, panel += dim_steps * kStepB)
            for (int i = 0; i < n_queries; i += kTileSide)
                multiply_parts(queries[kind] + i / kTileSide * dim_steps * kStepA, panel, dim_steps,
                               !kAdd, scores + i * stride + j, 4 * stride);
    }

    void set_weights(Kind kind, const float* scores, int64_t n_keys, int n_queries) {
        for (int i = 0; i < n_queries; i += kTileSide)
            pack_a(scores + i * stride, stride, n_queries - i, ceil_div(n_keys, kStep) * kStep,
                   1.0f, weights[kind] + i / kTileSide * key_steps * kStepA);
    }

    template <bool kAdd>
    void mix(Kind kind, int64_t lane, int64_t first, int64_t n_keys, int n_queries,
             const float* factors, float* y, int64_t row_stride) const {
        const int64_t steps = ceil_div(n_keys, kStep);
        for (int64_t s = 0; s < steps; s += kSteps)
            for (int64_t d = 0; d < dim_steps; ++d)
                for (int i = 0; i < n_queries; i += kTileSide)
                    multiply_parts(
                        weights[kind] + (i / kTileSide * key_steps + s) * kStepA,
                        values + lane * size + (d * key_steps + first / kStep + s) * kStepB,
                        min_of(kSteps, steps - s), s == 0, sums + (d * kBlock + i) * kPanelOutputs,
                        4 * kPanelOutputs);
        for (int64_t d = 0; d < head_dim; d += kWidth) {
            const int64_t m = min_of<int64_t>(kWidth, head_dim - d);
            const float* from =
                sums + d / kPanelOutputs * kBlock * kPanelOutputs + d % kPanelOutputs;
            for (int i = 0; i < n_queries; ++i) {
                float* to = y + i * row_stride + d;
                const VF mixed = load(from + i * kPanelOutputs) * splat(factors[i]);
                store_first(to, kAdd ? load_first(to, m) + mixed : mixed, m);
            }
        }
    }

    // Sums are transposed, [keys of a panel][dimensions of a tile], as products of x^T, whose
    // transposition is smaller than that of the weights.
    struct KeySums {
        const int64_t n, head_dim, row_stride, dim_tiles;
        float *sums, *rows;
        uint32_t *x, *panel;

        static constexpr int64_t kSize = kTileSide * kPanelOutputs;
        static int64_t bytes(int64_t n, int64_t head_dim) {
            const int64_t dims = ceil_div(head_dim, kTileSide);
            return 4 * (ceil_div(n, kStep) * dims * kSize + dims * kStepA + kStepB);
        }

        KeySums(void* scratch, int64_t n, int64_t head_dim, float* rows, int64_t row_stride)
            : n(n),
              head_dim(head_dim),
              row_stride(row_stride),
              dim_tiles(ceil_div(head_dim, kTileSide)),
              sums((float*)scratch),
              rows(rows),
              x((uint32_t*)sums + ceil_div(n, kStep) * dim_tiles * kSize),
              panel(x + dim_tiles * kStepA) {
            __builtin_memset(sums, 0, 4 * ceil_div(n, kStep) * dim_tiles * kSize);
        }

        void add(const float* weights, int64_t stride, const float* of_queries, int64_t x_stride,
                 int n_queries, int64_t first, int64_t n_keys) {
            for (int64_t d = 0; d < head_dim; d += kPanelOutputs) {
                pack_b(of_queries + d, x_stride, n_queries, head_dim - d, panel);
                for (int64_t tile = 0; tile < min_of<int64_t>(2, dim_tiles - d / kTileSide); ++tile)
                    for (int64_t part = 0; part < 2; ++part)
                        for (int64_t i = 0; i < kTileSide; i += 8)
                            transpose_16x8(panel + (2 * part + tile) * kTileSize + i, kTileSide,
                                           x + (d / kTileSide + tile) * kStepA + part * kTileSize +
                                               i * kStepWords,
                                           kStepWords);
            }
            for (int64_t j = 0; j < n_keys; j += kStep) {
                pack_b(weights + j, stride, n_queries, kStep, panel);
                for (int64_t tile = 0; tile < dim_tiles; ++tile)
                    multiply_parts(x + tile * kStepA, panel, 1, false,
                                   sums + ((first + j) / kStep * dim_tiles + tile) * kSize,
                                   4 * kPanelOutputs);
            }
        }

        void finish() {
            alignas(64) float turned[kSize];
            for (int64_t j = 0; j < n; j += kStep)
                for (int64_t tile = 0; tile < dim_tiles; ++tile) {
                    const float* from = sums + (j / kStep * dim_tiles + tile) * kSize;
                    for (int64_t i = 0; i < kPanelOutputs; i += 8)
                        transpose_16x8((const uint32_t*)from + i, kPanelOutputs,
                                       (uint32_t*)turned + i * kTileSide, kTileSide);
                    const int64_t d = tile * kTileSide;
                    for (int64_t i = 0; i < min_of(kStep, n - j); ++i)
                        __builtin_memcpy(rows + (j + i) * row_stride + d, turned + i * kTileSide,
                                         4 * min_of<int64_t>(kTileSide, head_dim - d));
                }
        }
    };
};

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA

#endif
