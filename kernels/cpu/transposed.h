// Products with the transpose of a quantized W [n_out, n_in], for cotangents: dx = dy W. Its panels
// are made from the blocks as they are, 32 outputs by 32 inputs at a time. The scales of a block
// lie along the inputs, which are not summed over here: for the int8 route weights are rounded
// again, to signed bytes with a scale for each input and 32 outputs.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dense.h"
#include "dispatch.h"
#include "int8_pack.h"
#include "pack.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// W^T with the names of a product's matrix: of n_out inputs of W, along K the outputs of W.
struct Transposed {
    const Weight& of;
    int64_t n_out, n_in;
    explicit Transposed(const Weight& w) : of(w), n_out(w.n_in), n_in(w.n_out) {}
};

// The same with the codec of its blocks.
template <typename Blocks>
struct TransposedBlocks : Transposed {
    using Transposed::Transposed;
};

constexpr int64_t kBlock = 32;  // inputs that are decoded at a time: a group of every type

// Rows row, row + 1, .. of W at inputs first .. first+n -> out [rows][kBlock], zeros for what W
// does not have; first is a multiple of kBlock.
inline void decode_block(const Weight& w, int64_t row, int64_t rows, int64_t first, int64_t n,
                         float* out) {
    for (int64_t o = 0; o < rows; ++o, out += kBlock) {
        if (row + o < w.n_out) decode_row(w.type, w.data + (row + o) * w.row_bytes, first, n, out);
        const int64_t m = row + o < w.n_out ? n : 0;
        __builtin_memset(out + m, 0, 4 * (kBlock - m));
    }
}

// Inputs out0 .. out0+n of W at its outputs first .. first+k -> panel [words][kDenseOutputs].
template <typename E>
inline void pack_panel_dense(const Transposed& w, int64_t out0, int64_t n, int64_t first, int64_t k,
                             uint32_t* panel) {
    float rows[E::per_word][kBlock], mixed[E::per_word * kBlock];
    for (int64_t o = 0; o < k; o += E::per_word, panel += kDenseOutputs) {
        // A vector may be half of a block.
        for (int64_t j = out0 / kBlock * kBlock; j < out0 + n; j += kBlock) {
            const int64_t had = min_of(kBlock, w.n_out - j);
            for (int p = 0; p < E::per_word; ++p)
                decode_block(w.of, first + o + p, o + p < k ? 1 : 0, j, had, rows[p]);
            if (E::per_word == 2 && o + 1 == k)
                __builtin_memset(rows[E::per_word - 1], 0, 4 * kBlock);
            for (int i = 0; i < kBlock; ++i)
                for (int p = 0; p < E::per_word; ++p) mixed[E::per_word * i + p] = rows[p][i];
            const int64_t skipped = max_of<int64_t>(0, out0 - j);
            const int64_t kept = min_of(kDenseOutputs - (j + skipped - out0), kBlock - skipped);
            E::words(mixed + E::per_word * skipped, E::per_word * kept, panel + j + skipped - out0);
        }
    }
}

// 32 outputs of 32 inputs, float [32][kBlock], as panels of 16 inputs each: codes round(w / scale),
// scale = max|w| / 127 for each input, NaN if one of its weights is not finite.
template <typename Codec>
inline void quantize_block(const float* block, PanelGroup<Codec>* const* panels, int n_panels) {
    const int32_t flip = signed_codes<Codec>() ? 0 : 0x80;
    for (int64_t j = 0; j < n_panels * kInt8Outputs; j += kWidth) {
        VI top = {};
        for (int o = 0; o < 32; ++o) {
            const VI bits = as_int(load(block + o * kBlock + j)) & 0x7FFFFFFF;
            const VI larger = top > bits;
            top = (top & larger) | (bits & ~larger);
        }
        const VI finite = top < 0x7F800000;
        const VF largest = as_float(top & finite);
        const VF inverse = select(largest >= 0x1p-100f, splat(127.0f) / largest, splat(0.0f));
        PanelGroup<Codec>* panel = panels[j / kInt8Outputs];
        const int64_t at = j % kInt8Outputs;
        store(panel->scale[0] + at,
              select(finite, largest * splat(1.0f / 127.0f), splat(__builtin_nanf(""))));
        for (int i = 0; i < kDots; ++i) {
            // Rounded to even; what is not finite becomes zero.
            int32_t words[kDotBytes / 4][kWidth];
            for (int part = 0; part < kDotBytes / 4; ++part) {
                VI word = {};
                for (int b = 0; b < 4; ++b) {
                    const VF w = load(block + (kDotBytes * i + 4 * part + b) * kBlock + j);
                    const VI bits = as_int(fmadd(w, inverse, splat(12582912.0f))) - 0x4B400000;
                    word |= (((bits & finite) ^ flip) & 0xFF) << (8 * b);
                }
                store((float*)words[part], as_float(word));
            }
            for (int l = 0; l < kWidth; ++l)
                for (int part = 0; part < kDotBytes / 4; ++part)
                    __builtin_memcpy(panel->code[i][at + l] + 4 * part, &words[part][l], 4);
        }
    }
}

// Panels of inputs out0 .. out0+n of W, zero inputs at the end.
template <typename Codec, typename Blocks>
inline void pack_panels_int8(const TransposedBlocks<Blocks>& w, int64_t out0, int64_t n,
                             PanelGroup<Codec>* panels) {
    const int64_t groups = w.n_in / 32, n_panels = ceil_div(n, kInt8Outputs);
    alignas(64) float block[32 * kBlock];
    PanelGroup<Codec>* to[kBlock / kInt8Outputs];
    for (int64_t g = 0; g < groups; ++g) {
        // A panel may begin in the middle of a block.
        for (int64_t j = out0 / kBlock * kBlock; j < out0 + n; j += kBlock) {
            for (int o = 0; o < 32; ++o) {
                Group codes;
                const uint8_t* row = w.of.data + (32 * g + o) * w.of.row_bytes;
                Blocks::group(row, j / 32, &codes);
                float* out = block + o * kBlock;
                for (int i = 0; i < 32; ++i) {
                    const int s = i * Blocks::scales / 32;
                    const float v = codes.scale[s] * (float)(codes.code[i] - Blocks::offset);
                    out[i] = Blocks::has_min ? v + codes.min[s] : v;
                }
            }
            const int64_t first = max_of<int64_t>(0, (j - out0) / kInt8Outputs);
            const int64_t skipped = max_of<int64_t>(0, out0 - j);
            const int count =
                (int)min_of<int64_t>((kBlock - skipped) / kInt8Outputs, n_panels - first);
            for (int p = 0; p < count; ++p) to[p] = panels + (first + p) * groups + g;
            quantize_block<Codec>(block + skipped, to, count);
        }
    }
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
