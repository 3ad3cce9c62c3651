// The route of the matmul on AMX's tiles: activations and weights in bf16, sums in fp32, along K in
// order. Of y^T = W x^T the weights are the rows A of a product: they lie along K as they do in
// their blocks, and decoding needs no transposition, which the sums do then, once per call. Of
// dx = dy W, where a row of W lies along the outputs, W is B.
#pragma once

#include <cstdint>

#include "amx.h"
#include "decode.h"
#include "dispatch.h"
#include "pack.h"
#include "simd.h"
#include "threads.h"
#include "transposed.h"

#if defined(FWDLLM_TILES)

namespace fwdllm::FWDLLM_ISA {
namespace {

// Steps of a slice along K: 32 KiB of a panel, which stay in the L1 cache while all rows pass.
constexpr int64_t kSliceSteps = 16;
// Tiles of activations that pass: their slices take 512 KiB of the L2 cache, as do their sums with
// the panels that are decoded together. The activations come from the L3 cache once for all of
// these.
constexpr int64_t kBlockTiles = 32, kPanels = 8;

// Weights of a group as bf16. Codes of up to 5 bits choose among 16 or 32 rounded weights.
template <typename Codec>
inline void group_to_bf16(const Group& g, uint16_t* out) {
#if defined(__AVX512BW__)
    constexpr bool few = Codec::scales == 1 && Codec::top <= 31;
    if constexpr (few) {
        constexpr VF codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const VF scale = splat(g.scale[0]);
        VF low = (codes - splat(Codec::offset)) * scale;
        if (Codec::has_min) low += splat(g.min[0]);
        __m512i table = _mm512_castsi256_si512((__m256i)to_bf16(low));
        if (Codec::top > 15) {
            VF high = (codes + splat(16 - Codec::offset)) * scale;
            if (Codec::has_min) high += splat(g.min[0]);
            table = _mm512_inserti64x4(table, (__m256i)to_bf16(high), 1);
        }
        const __m256i first = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)g.code));
        const __m256i second = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)g.code + 1));
        const __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
        return;
    }
#endif
    typedef uint8_t Codes __attribute__((vector_size(kWidth)));
    for (int i = 0; i < 32; i += kWidth) {
        Codes codes;
        __builtin_memcpy(&codes, g.code + i, sizeof codes);
        const int s = i * Codec::scales / 32;
        VF w = to_float(__builtin_convertvector(codes, VI) - Codec::offset) * splat(g.scale[s]);
        if (Codec::has_min) w += splat(g.min[s]);
        const auto rounded = to_bf16(w);
        __builtin_memcpy(out + i, &rounded, 2 * kWidth);
    }
}

// Weights first .. first+n of a row as bf16, steps `stride` words apart, zeros at the end.
inline void decode_bf16(int type, const uint8_t* row, int64_t first, int64_t n, int64_t stride,
                        uint32_t* out) {
    const bool quantized = with_codec(type, [&](auto codec) {
        using C = decltype(codec);
        for (int64_t i = 0; i < n; i += kStep, out += stride) {
            Group g;
            C::group(row, (first + i) / kStep, &g);
            group_to_bf16<C>(g, (uint16_t*)out);
        }
    });
    if (quantized) return;
    for (int64_t i = 0; i < n; i += kStep, out += stride) {
        const int64_t m = min_of(kStep, n - i);
        __builtin_memset(out, 0, 2 * kStep);
        __builtin_memcpy(out, row + 2 * (first + i), 2 * m);
    }
}

// Outputs out0 .. out0+n of W along first .. first+k -> A [steps][kPanelOutputs][kStepWords], zero
// outputs at the end.
inline void pack_weights(const Weight& w, int64_t out0, int64_t n, int64_t first, int64_t k,
                         uint32_t* out) {
    for (int64_t j = 0; j < kPanelOutputs; ++j, out += kStepWords) {
        if (j < n)
            decode_bf16(w.type, w.data + (out0 + j) * w.row_bytes, first, k, 2 * kTileSize, out);
        for (int64_t i = 0; j >= n && i < k; i += kStep)
            __builtin_memset(out + i / kStep * 2 * kTileSize, 0, 2 * kStep);
    }
}

// Inputs out0 .. out0+n of W at its outputs first .. first+k -> B
// [steps][2][kStepWords][kTileSide], zeros at the end.
inline void pack_weights(const Transposed& w, int64_t out0, int64_t n, int64_t first, int64_t k,
                         uint32_t* out) {
    alignas(64) uint32_t rows[2][kPanelOutputs / 2];
    for (int64_t o = 0; o < ceil_div(k, kStep) * kStep; o += 2) {
        for (int p = 0; p < 2; ++p) {
            if (o + p < k)
                decode_bf16(w.of.type, w.of.data + (first + o + p) * w.of.row_bytes, out0, n, 0,
                            rows[p]);
            else
                __builtin_memset(rows[p], 0, sizeof rows[p]);
        }
        uint16_t low[kPanelOutputs], high[kPanelOutputs];
        __builtin_memcpy(low, rows[0], sizeof low);
        __builtin_memcpy(high, rows[1], sizeof high);
        uint32_t* to = out + o / kStep * 2 * kTileSize + o % kStep / 2 * kTileSide;
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < kTileSide; ++i)
                to[half * kTileSize + i] =
                    low[half * kTileSide + i] | (uint32_t)high[half * kTileSide + i] << 16;
    }
}

// Rows row0 .. row0+n of x [., k] along first .. first+m, zero rows at the end, as tiles of A or of
// B. A row with an earlier reference row is packed as its difference to that one. Returns whether
// any is not 0.
inline bool pack_activations(const float* x, int64_t row0, int64_t n, const int32_t* references,
                             int64_t k, int64_t first, int64_t m, bool as_b, uint32_t* out) {
    constexpr int64_t length = kSliceSteps * kStep;
    float values[length];
    alignas(64) uint32_t words[kTileSide][length / 2];
    const int64_t steps = ceil_div(m, kStep);
    uint32_t any = 0;
    for (int r = 0; r < kTileSide; ++r) {
        if (r >= n) {
            __builtin_memset(words[r], 0, sizeof words[r]);
            continue;
        }
        row_or_difference(x, k, row0 + r, references, first, m, values);
        __builtin_memset(values + m, 0, 4 * (steps * kStep - m));
        for (int64_t i = 0; i < steps * kStep; i += kWidth) {
            const auto rounded = to_bf16(load(values + i));
            __builtin_memcpy(words[r] + i / 2, &rounded, 2 * kWidth);
        }
        for (int64_t i = 0; i < steps * kStepWords; ++i) any |= words[r][i];
    }
    for (int64_t s = 0; s < steps; ++s, out += kTileSize) {
        const uint32_t* from = words[0] + s * kStepWords;
        for (int i = 0; as_b && i < kStepWords; i += 8)
            transpose_16x8(from + i, length / 2, out + i * kTileSide, kTileSide);
        for (int r = 0; !as_b && r < kTileSide; ++r)
            __builtin_memcpy(out + r * kStepWords, from + r * length / 2, 4 * kStepWords);
    }
    return any != 0;
}

// Reads ahead into the L2 cache.
inline void prefetch(const uint32_t* from, int64_t words) {
    for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(from + i, 0, 2);
}

template <typename W>
inline constexpr bool weights_are_a = false;
template <>
inline constexpr bool weights_are_a<Weight> = true;

// A product of packed activations with w; run() is that of DenseProduct. All packed operands lie
// slice after slice along K, and in a slice tile after tile, or panel after panel, with all of its
// steps: what is used together is together in memory, and in different sets of the cache.
template <typename W>
struct TileProduct {
    const W& w;
    int64_t rows;
    const int32_t* references;
    Buffer tiles, zeros;
    static constexpr int panel_outputs = kPanelOutputs;

    TileProduct(const float* x, int64_t rows, const int32_t* references, const W& w)
        : w(w),
          rows(rows),
          references(references),
          tiles(4 * n_tiles() * steps() * kTileSize),
          zeros(n_tiles()) {
        parallel_for(n_tiles(), [&](int64_t t) {
            is_zero(t) = true;
            for_each_slice([&](int64_t first, int64_t n) {
                is_zero(t) &= !pack_activations(x, t * kTileSide, rows_of(t), references, w.n_in,
                                                first * kStep, depth_of(first, n), weights_are_a<W>,
                                                tile(t, first, n));
            });
        });
    }

    int64_t steps() const { return ceil_div(w.n_in, kStep); }
    int64_t n_tiles() const { return ceil_div(rows, kTileSide); }
    int64_t rows_of(int64_t t) const { return min_of<int64_t>(kTileSide, rows - t * kTileSide); }
    // Elements along K of steps first .. first+n.
    int64_t depth_of(int64_t first, int64_t n) const {
        return min_of(n * kStep, w.n_in - first * kStep);
    }
    uint32_t* tile(int64_t t, int64_t first, int64_t n) const {
        return (uint32_t*)tiles.data + (first * n_tiles() + t * n) * kTileSize;
    }
    // Lanes do not differ before the first perturbed product, and have no tangents there.
    bool& is_zero(int64_t t) const { return ((bool*)zeros.data)[t]; }
    int64_t panels_at_once() const { return kPanels; }

    // Calls body(first, n) for the steps of each slice.
    template <typename F>
    void for_each_slice(const F& body) const {
        for (int64_t s = 0; s < steps(); s += kSliceSteps)
            body(s, min_of(kSliceSteps, steps() - s));
    }

    template <typename Sink>
    void run(int64_t out0, int64_t n_out, const Sink& sink) const {
        run(out0, n_out, min_of(kBlockTiles, n_tiles()), false, sink);
    }

    // block: tiles of activations that pass together.  by_panels: all of a panel's before the next;
    // otherwise the panels of a tile follow each other, which lie together in y.
    template <typename Sink>
    void run(int64_t out0, int64_t n_out, int64_t block, bool by_panels, const Sink& sink) const {
        constexpr int64_t c_size = kTileSide * kPanelOutputs;
        const int64_t n_panels = ceil_div(n_out, kPanelOutputs);
        const int64_t sums_size = n_panels * block * c_size;
        float* sums =
            (float*)thread_scratch(4 * (sums_size + c_size + n_panels * steps() * 2 * kTileSize));
        float* turned = sums + sums_size;
        uint32_t* panels = (uint32_t*)(turned + c_size);
        const auto panel = [&](int64_t p, int64_t first, int64_t n) {
            return panels + (first * n_panels + p * n) * 2 * kTileSize;
        };
        const auto outs_of = [&](int64_t p) {
            return min_of<int64_t>(kPanelOutputs, n_out - p * kPanelOutputs);
        };
        for (int64_t p = 0; p < n_panels; ++p)
            for_each_slice([&](int64_t first, int64_t n) {
                pack_weights(w, out0 + p * kPanelOutputs, outs_of(p), first * kStep,
                             depth_of(first, n), panel(p, first, n));
            });
        for (int64_t t0 = 0; t0 < n_tiles(); t0 += block) {
            const int64_t end = min_of(t0 + block, n_tiles());
            multiply(t0, end, block, n_panels, panel, sums);
            const auto finish = [&](int64_t t, int64_t p) {
                float* c = sums + (p * block + t - t0) * c_size;
                float* of_rows = weights_are_a<W> ? turned : c;
                if (is_zero(t))
                    __builtin_memset(of_rows, 0, 4 * c_size);
                else if (weights_are_a<W>)
                    turn(c, turned);
                sink(t * kTileSide, rows_of(t), out0 + p * kPanelOutputs, outs_of(p), of_rows,
                     kPanelOutputs);
            };
            for (int64_t p = 0; by_panels && p < n_panels; ++p)
                for (int64_t t = t0; t < end; ++t) finish(t, p);
            for (int64_t t = t0; !by_panels && t < end; ++t)
                for (int64_t p = 0; p < n_panels; ++p) finish(t, p);
        }
    }

    // The sums of tiles t0 .. end with each panel, [n_panels][block].
    template <typename Panel>
    void multiply(int64_t t0, int64_t end, int64_t block, int64_t n_panels, const Panel& panel,
                  float* sums) const {
        constexpr int64_t c_size = kTileSide * kPanelOutputs;
        const Tiles registers;
        for_each_slice([&](int64_t first, int64_t n) {
            // What comes next is read ahead, in shares: the panel by each tile, tiles by each
            // panel. A few rows find all of it in the L2 cache.
            const bool few = end - t0 < kBlockTiles / 4;
            const int64_t ahead = few ? 0 : ceil_div(n * 2 * kTileSize, end - t0);
            const int64_t next = first + n, n_next = min_of(n, steps() - next);
            const int64_t share = ceil_div(n_next * kTileSize, n_panels);
            for (int64_t p = 0; p < n_panels; ++p)
                for (int64_t t = t0; t < end; ++t) {
                    if (is_zero(t)) continue;
                    if (n_next > 0) prefetch(tile(t, next, n_next) + p * share, share);
                    prefetch(panel(p, first, n) + n * 2 * kTileSize + (t - t0) * ahead, ahead);
                    multiply_tiles<weights_are_a<W>>(panel(p, first, n), tile(t, first, n), n,
                                                     first == 0,
                                                     sums + (p * block + t - t0) * c_size);
                }
        });
    }

    // c [kPanelOutputs][kTileSide] -> [kTileSide][kPanelOutputs]
    static void turn(const float* c, float* out) {
        for (int i = 0; i < kPanelOutputs; i += kTileSide)
            for (int j = 0; j < kTileSide; j += 8)
                transpose_16x8((const uint32_t*)c + i * kTileSide + j, kTileSide,
                               (uint32_t*)out + j * kPanelOutputs + i, kPanelOutputs);
    }
};

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA

#endif
