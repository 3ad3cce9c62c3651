// The int8 route of the matmul: activations as int8 with a scale per 32 values, weights as the
// unsigned codes of their blocks. Weight panels of 16 outputs are decoded once and used for every
// tile of activations. A row's result depends on that row and the weights only, and its reduction
// order is fixed: that is batch invariance.
#pragma once

#include <cstdint>

#include "decode.h"
#include "dispatch.h"
#include "pack.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

constexpr int kInt8Outputs = 16;  // 4 bytes of each fill one zmm, or four NEON registers

// Bytes along K that one instruction multiplies and sums for an output.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kDotBytes = 8;
#else
constexpr int kDotBytes = 4;
#endif
constexpr int kDots = 32 / kDotBytes;  // in a group

// Without a dot product of unsigned by signed bytes, products of bytes are summed in pairs in 16
// bits, which holds codes up to 63 but not the 255 of Q8_0 and IQ4: those stay signed and go
// through |w| * (x sign(w)). NEON's products are of signed bytes, which hold codes up to 63 as
// well.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kSignedQ8 = false;
#else
constexpr bool kSignedQ8 = true;
#endif

template <typename Codec>
constexpr bool signed_codes() {
    return kSignedQ8 && Codec::offset == 128;
}

// A packed group of 32 activations of kRows rows: bytes [kDots][kRows][kDotBytes], the scale of
// each row, and per weight scale a correction of each row: the start of the integer sum, -offset *
// sum(x), or for types with minima the float scale * sum(x).
template <typename Codec>
struct TileGroup {
    int8_t x[kDots][kRows][kDotBytes];
    float scale[kRows];
    union {
        int32_t start[Codec::scales][kRows];
        float sum[Codec::scales][kRows];
    };
};

// A packed group of 32 weights of 16 outputs: codes [kDots][16][kDotBytes].
template <typename Codec>
struct alignas(64) PanelGroup {
    uint8_t code[kDots][kInt8Outputs][kDotBytes];
    float scale[Codec::scales][kInt8Outputs];
    float min[Codec::has_min ? Codec::scales : 0][kInt8Outputs];
};

// 32 activations as round(x / scale), scale = max|x| / 127, and their sums, one for each weight
// scale; a non-finite x makes scale NaN. Returns the scale.
template <int kSums>
inline float quantize_group(const float* x, int8_t* q, int32_t* sums) {
#if defined(__AVX512F__)
    const __m512 v[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    const int32_t top_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(
        _mm512_castps_si512(_mm512_abs_ps(v[0])), _mm512_castps_si512(_mm512_abs_ps(v[1]))));
#else
    int32_t top_bits = 0;
    for (int i = 0; i < 32; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        top_bits = max_of(top_bits, bits & 0x7FFFFFFF);
    }
#endif
    if (top_bits >= 0x7F800000) {
        __builtin_memset(q, 0, 32);
        for (int s = 0; s < kSums; ++s) sums[s] = 0;
        return __builtin_nanf("");
    }
    float largest;
    __builtin_memcpy(&largest, &top_bits, 4);
    const float inverse = largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
#if defined(__AVX512F__)
    __m512i n[2];
    for (int h = 0; h < 2; ++h) {
        n[h] = _mm512_cvtps_epi32(_mm512_mul_ps(v[h], _mm512_set1_ps(inverse)));
        _mm_storeu_si128((__m128i*)(q + 16 * h), _mm512_cvtepi32_epi8(n[h]));
    }
    if (kSums == 1) n[0] = _mm512_add_epi32(n[0], n[1]);
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_reduce_add_epi32(n[s]);
#else
    for (int s = 0; s < kSums; ++s) {
        sums[s] = 0;
        for (int i = s * 32 / kSums; i < (s + 1) * 32 / kSums; ++i) {
            const float shifted = x[i] * inverse + 12582912.0f;  // rounds to even
            int32_t n;
            __builtin_memcpy(&n, &shifted, 4);
            n -= 0x4B400000;
            sums[s] += n;
            q[i] = (int8_t)n;
        }
    }
#endif
    return largest * (1.0f / 127.0f);
}

// Quantizes 32 values into row r of a group.
template <typename Codec>
inline void pack_group_int8(const float* values, int64_t r, TileGroup<Codec>* out) {
    int8_t q[32];
    int32_t sums[Codec::scales];
    out->scale[r] = quantize_group<Codec::scales>(values, q, sums);
    for (int i = 0; i < kDots; ++i) __builtin_memcpy(out->x[i][r], q + kDotBytes * i, kDotBytes);
    for (int s = 0; s < Codec::scales; ++s) {
        if (Codec::has_min)
            out->sum[s][r] = out->scale[r] * (float)sums[s];
        else
            out->start[s][r] = signed_codes<Codec>() ? 0 : -Codec::offset * sums[s];
    }
}

// values -= what row r of a group holds of them.
template <typename Codec>
inline void subtract_packed(const TileGroup<Codec>& t, int64_t r, float* values) {
    for (int i = 0; i < 32; ++i)
        values[i] -= t.scale[r] * (float)t.x[i / kDotBytes][r][i % kDotBytes];
}

// Rows row0 .. row0+rows of x [., k], zero rows at the end; a row with an earlier reference row is
// packed as its difference to that one, with the difference's own scale. What rounding takes from
// the first ``refined`` of them goes to a second tile, rest.
template <typename Codec>
inline void pack_tile_int8(const float* x, int64_t row0, int64_t rows, const int32_t* references,
                           int64_t k, TileGroup<Codec>* out, int64_t refined,
                           TileGroup<Codec>* rest) {
    __builtin_memset(out, 0, rows < kRows ? k / 32 * sizeof *out : 0);
    if (0 < refined && refined < kRows) __builtin_memset(rest, 0, k / 32 * sizeof *rest);
    constexpr int64_t run = 8;  // groups of a row at a time: 1 KiB read, 4 KiB of the tile written
    for (int64_t first = 0; first < k / 32; first += run) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t g = first; g < min_of(first + run, k / 32); ++g) {
                float values[32];
                row_or_difference(x, k, row0 + r, references, 32 * g, 32, values);
                pack_group_int8(values, r, out + g);
                if (r >= refined) continue;
                subtract_packed(out[g], r, values);
                pack_group_int8(values, r, rest + g);
            }
        }
    }
}

// The codes of 16 outputs side by side.
template <typename Codec>
inline void interleave_codes(const Group* groups, PanelGroup<Codec>* out) {
    if (kDotBytes == 4) {
        transpose_16x8((const uint32_t*)groups, sizeof(Group) / 4, (uint32_t*)out->code,
                       kInt8Outputs);
        return;
    }
    for (int j = 0; j < kInt8Outputs; ++j)
        for (int i = 0; i < kDots; ++i)
            __builtin_memcpy(out->code[i][j], groups[j].code + kDotBytes * i, kDotBytes);
}

// W [out0 .. out0+n, :] -> panel [n_in / 32], zero outputs at the end.
template <typename Codec>
inline void pack_panel_int8(const Weight& w, int64_t out0, int64_t n, PanelGroup<Codec>* panel) {
    alignas(64) Group groups[kInt8Outputs] = {};
    for (int64_t i = 0; i < w.n_in / 32; ++i) {
        PanelGroup<Codec>& p = panel[i];
        for (int64_t j = 0; j < n; ++j) {
            Group& g = groups[j];
            Codec::group(w.data + (out0 + j) * w.row_bytes, i, &g);
            if (signed_codes<Codec>())
                for (int l = 0; l < 32; ++l) g.code[l] ^= 0x80;
        }
        interleave_codes(groups, &p);
        for (int j = 0; j < kInt8Outputs; ++j) {
            for (int s = 0; s < Codec::scales; ++s) {
                p.scale[s][j] = groups[j].scale[s];
                if (Codec::has_min) p.min[s][j] = groups[j].min[s];
            }
        }
    }
}

// The panels of outputs out0 .. out0+n, one after the other.
template <typename Codec>
inline void pack_panels_int8(const Weight& w, int64_t out0, int64_t n, PanelGroup<Codec>* panels) {
    for (int64_t j = 0; j < n; j += kInt8Outputs, panels += w.n_in / 32)
        pack_panel_int8<Codec>(w, out0 + j, min_of<int64_t>(kInt8Outputs, n - j), panels);
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
