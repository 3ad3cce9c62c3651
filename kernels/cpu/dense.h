// The floating-point routes of the matmul: fp32, and bf16 where the instruction set has its dot
// product. Activations are packed once per call into tiles of kRows rows; weights are decoded
// once, piece by piece along K, into panels of kDenseOutputs that serve every tile. A row's
// result depends on that row and the weights only, and its reduction order is fixed: that is
// batch invariance. The matrix is a Weight, or the transpose of one, see transposed.h.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dispatch.h"
#include "pack.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// A tile's kRows x kDenseVectors sums fill the registers but for the operands, see kRows.
constexpr int kDenseVectors = kWidth == 4 ? 4 : 2;
constexpr int kDenseOutputs = kDenseVectors * kWidth;
// K per decoded panel: with 16 or 32 outputs 32 or 64 KiB, which leaves half of a small L2 to the
// tiles. Even, so that pairs of bf16 stay together.
constexpr int64_t kDenseDepth = 512;

// How elements lie along K: in words of 4 bytes, one float or two bf16.
struct Float32 {
    static constexpr int per_word = 1;
    static void words(const float* x, int64_t n, uint32_t* out) { __builtin_memcpy(out, x, 4 * n); }
    static VF multiply_add(VF w, VF x, VF sum) { return fmadd(x, w, sum); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    static constexpr int per_word = 2;
    static void words(const float* x, int64_t n, uint32_t* out) {
        for (int64_t i = 0; i < n; i += kWidth) {
            const int64_t m = min_of<int64_t>(kWidth, n - i);
            const auto pairs = to_bf16(load_first(x + i, m));
            __builtin_memcpy(out + i / 2, &pairs, 2 * (m + m % 2));
        }
    }
    static VF multiply_add(VF w, VF x, VF sum) {
        return (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
};
#endif

template <typename E>
inline int64_t words_of(int64_t n) {
    return ceil_div(n, E::per_word);
}

// Rows row0 .. row0+rows of x [., k] -> tile [words][kRows], zero rows at the end. A row with an
// earlier reference row is packed as its difference to that one.
template <typename E>
inline void pack_tile_dense(const float* x, int64_t row0, int64_t rows, const int32_t* references,
                            int64_t k, uint32_t* out) {
    constexpr int64_t piece = 256;
    float values[piece];
    uint32_t words[piece];
    for (int r = 0; r < kRows; ++r) {
        for (int64_t first = 0; first < k; first += piece) {
            const int64_t n = min_of(piece, k - first), n_words = words_of<E>(n);
            if (r < rows) {
                row_or_difference(x, k, row0 + r, references, first, n, values);
                E::words(values, n, words);
            } else {
                __builtin_memset(words, 0, 4 * n_words);
            }
            uint32_t* to = out + first / E::per_word * kRows + r;
            for (int64_t i = 0; i < n_words; ++i) to[i * kRows] = words[i];
        }
    }
}

// W [out0 .. out0+n, first .. first+k] -> panel [words][kDenseOutputs], zero outputs at the end.
template <typename E>
inline void pack_panel_dense(const Weight& w, int64_t out0, int64_t n, int64_t first, int64_t k,
                             uint32_t* panel) {
    constexpr int64_t piece = 256;  // whole groups of every type
    float row[piece];
    alignas(64) uint32_t words[16][piece];
    for (int64_t i = 0; i < k; i += piece) {
        const int64_t m = min_of(piece, k - i), n_words = words_of<E>(m);
        for (int j0 = 0; j0 < kDenseOutputs; j0 += 16) {
            for (int j = 0; j < 16; ++j) {
                if (j0 + j < n) {
                    const uint8_t* from = w.data + (out0 + j0 + j) * w.row_bytes;
                    decode_row(w.type, from, first + i, m, row);
                    E::words(row, m, words[j]);
                } else {
                    __builtin_memset(words[j], 0, 4 * n_words);
                }
            }
            uint32_t* to = panel + i / E::per_word * kDenseOutputs + j0;
            int64_t l = 0;
            for (; l + 8 <= n_words; l += 8)
                transpose_16x8(words[0] + l, piece, to + l * kDenseOutputs, kDenseOutputs);
            for (; l < n_words; ++l)
                for (int j = 0; j < 16; ++j) to[l * kDenseOutputs + j] = words[j][l];
        }
    }
}

// c [kRows][kDenseOutputs] += tile . panel^T, one word after the other along K.
template <typename E>
inline void multiply_dense(const uint32_t* tile, const uint32_t* panel, int64_t n_words, float* c) {
    VF acc[kRows][kDenseVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kDenseVectors; ++v)
            acc[r][v] = load(c + r * kDenseOutputs + v * kWidth);
    for (int64_t i = 0; i < n_words; ++i) {
        VF w[kDenseVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kDenseVectors; ++v)
            w[v] = load((const float*)panel + i * kDenseOutputs + v * kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            float word;
            __builtin_memcpy(&word, tile + i * kRows + r, 4);
            const VF x = splat(word);
#pragma GCC unroll 4
            for (int v = 0; v < kDenseVectors; ++v) acc[r][v] = E::multiply_add(w[v], x, acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kDenseVectors; ++v)
            store(c + r * kDenseOutputs + v * kWidth, acc[r][v]);
}

// A product of packed activations with w [n_out, n_in]. run() calls sink(row0, n_rows, out0,
// n_outs, tile, stride) for all tiles of outputs out0 .. out0+n, rows ascending. The tile of a row
// that has a reference holds the product of the difference.
template <typename E, typename W>
struct DenseProduct {
    const W& w;
    int64_t rows;
    const int32_t* references;
    Buffer tiles, zeros;
    static constexpr int panel_outputs = kDenseOutputs;

    DenseProduct(const float* x, int64_t rows, const int32_t* references, const W& w)
        : w(w),
          rows(rows),
          references(references),
          tiles(4 * ceil_div(rows, kRows) * kRows * words_of<E>(w.n_in)),
          zeros(ceil_div(rows, kRows)) {
        parallel_for(ceil_div(rows, kRows), [&](int64_t t) {
            pack_tile_dense<E>(x, t * kRows, min_of<int64_t>(kRows, rows - t * kRows), references,
                               w.n_in, tile(t));
            uint32_t any = 0;
            for (int64_t i = 0; i < kRows * words_of<E>(w.n_in); ++i) any |= tile(t)[i];
            is_zero(t) = any == 0;
        });
    }

    uint32_t* tile(int64_t t) const {
        return (uint32_t*)tiles.data + t * kRows * words_of<E>(w.n_in);
    }
    // Lanes do not differ before the first perturbed product, and have no tangents there.
    bool& is_zero(int64_t t) const { return ((bool*)zeros.data)[t]; }
    int64_t panels_at_once() const { return 1; }

    template <typename Sink>
    void run(int64_t out0, int64_t n, const Sink& sink) const {
        const int64_t n_tiles = ceil_div(rows, kRows), c_size = kRows * kDenseOutputs;
        float* c = (float*)thread_scratch(4 * (kDenseDepth * kDenseOutputs + n_tiles * c_size));
        uint32_t* panel = (uint32_t*)(c + n_tiles * c_size);
        __builtin_memset(c, 0, 4 * n_tiles * c_size);
        for (int64_t first = 0; first < w.n_in; first += kDenseDepth) {
            const int64_t k = min_of(kDenseDepth, w.n_in - first);
            pack_panel_dense<E>(w, out0, n, first, k, panel);
            for (int64_t t = 0; t < n_tiles; ++t)
                if (!is_zero(t))
                    multiply_dense<E>(tile(t) + first / E::per_word * kRows, panel, words_of<E>(k),
                                      c + t * c_size);
        }
        for (int64_t t = 0; t < n_tiles; ++t)
            sink(t * kRows, min_of<int64_t>(kRows, rows - t * kRows), out0, n, c + t * c_size,
                 kDenseOutputs);
    }
};

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
