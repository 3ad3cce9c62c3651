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

#if defined(__AVX512VNNI__)
static_assert(kRows == 12 && kDotBytes == 4);

// The bits of the largest |x| of 32 numbers of each of the kRows rows; as integers, so that NaN is
// the largest of all. Two vectors become one of the maxima of neighbours, until a lane is a row.
inline __m512i largest_bits(const float* const* rows) {
    const auto pairs = [](__m512i a, __m512i b) {
        const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
        return _mm512_max_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                                _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD)));
    };
    const auto quarters = [](__m512i a, __m512i b) {
        return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    __m512i four[3];
    for (int i = 0; i < 3; ++i) {
        __m512i top[4];
        for (int j = 0; j < 4; ++j) {
            const float* x = rows[4 * i + j];
            top[j] = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x))),
                                      _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + 16))));
        }
        four[i] = pairs(pairs(top[0], top[1]), pairs(top[2], top[3]));
    }
    return quarters(quarters(four[0], four[1]), quarters(four[2], four[2]));
}

// The four quarters of a vector, each to 16 bytes.
inline void store_quarters(__m512i v, int8_t* to, int64_t stride) {
    _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(v));
    _mm_storeu_si128((__m128i*)(to + stride), _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128((__m128i*)(to + 2 * stride), _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128((__m128i*)(to + 3 * stride), _mm512_extracti32x4_epi32(v, 3));
}

// 32 activations of each row as round(x / scale), scale = max|x| / 127, and their sums, one for
// each weight scale; a non-finite x makes a row zeros and its scale NaN.
template <int kSums>
inline void quantize_rows(const float* const* rows, int8_t (*x)[kRows][kDotBytes], float* scale,
                          int32_t (*sums)[kRows]) {
    constexpr __mmask16 all = (1 << kRows) - 1;
    const __m512i bits = largest_bits(rows);
    const __m512 largest = _mm512_castsi512_ps(bits);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
    const __mmask16 above = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ);
    alignas(64) float inverse[16];
    _mm512_store_ps(inverse, _mm512_maskz_div_ps(finite & above, _mm512_set1_ps(127.0f), largest));
    _mm512_mask_storeu_ps(scale, all,
                          _mm512_mask_mul_ps(_mm512_set1_ps(__builtin_nanf("")), finite, largest,
                                             _mm512_set1_ps(1.0f / 127.0f)));
    for (int r = 0; r < kRows; r += 4) {
        __m512i words[4], two[2];  // bytes of two rows: quarter i has words i, 4 + i of each
        for (int j = 0; j < 4; ++j) {
            const __m512 by = _mm512_set1_ps(inverse[r + j]);
            const float* from = rows[r + j];
            words[j] = _mm512_packs_epi32(
                _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), by)),
                _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 16), by)));
        }
        for (int j = 0; j < 2; ++j) two[j] = _mm512_packs_epi16(words[2 * j], words[2 * j + 1]);
        const __m512 a = _mm512_castsi512_ps(two[0]), b = _mm512_castsi512_ps(two[1]);
        const int64_t stride = kRows * kDotBytes;
        store_quarters(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), x[0][r], stride);
        store_quarters(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)), x[4][r], stride);
    }
    for (int r = 0; (finite & all) != all && r < kRows; ++r)
        for (int i = 0; !(finite >> r & 1) && i < kDots; ++i) __builtin_memset(x[i][r], 0, 4);
    for (int s = 0; s < kSums; ++s) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = s * kDots / kSums; i < (s + 1) * kDots / kSums; ++i)
            sum =
                _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi32(all, x[i]));
        _mm512_mask_storeu_epi32(sums[s], all, sum);
    }
}
#else
// 32 activations as round(x / scale), scale = max|x| / 127, and their sums, one for each weight
// scale; a non-finite x makes all zero and scale NaN. Returns the scale.
template <int kSums>
inline float quantize_group(const float* x, int8_t* q, int32_t* sums) {
    int32_t top_bits = 0;
    for (int i = 0; i < 32; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        top_bits = max_of(top_bits, bits & 0x7FFFFFFF);
    }
    if (top_bits >= 0x7F800000) {
        __builtin_memset(q, 0, 32);
        for (int s = 0; s < kSums; ++s) sums[s] = 0;
        return __builtin_nanf("");
    }
    float largest;
    __builtin_memcpy(&largest, &top_bits, 4);
    const float inverse = largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
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
    return largest * (1.0f / 127.0f);
}

// The same for kRows rows, their bytes side by side.
template <int kSums>
inline void quantize_rows(const float* const* rows, int8_t (*x)[kRows][kDotBytes], float* scale,
                          int32_t (*sums)[kRows]) {
    for (int r = 0; r < kRows; ++r) {
        int8_t q[32];
        int32_t own[kSums];
        scale[r] = quantize_group<kSums>(rows[r], q, own);
        for (int i = 0; i < kDots; ++i) __builtin_memcpy(x[i][r], q + kDotBytes * i, kDotBytes);
        for (int s = 0; s < kSums; ++s) sums[s][r] = own[s];
    }
}
#endif

// Quantizes 32 values of each of kRows rows.
template <typename Codec>
inline void pack_group_int8(const float* const* rows, TileGroup<Codec>* out) {
    int32_t sums[Codec::scales][kRows];
    quantize_rows<Codec::scales>(rows, out->x, out->scale, sums);
    for (int s = 0; s < Codec::scales; ++s)
        for (int r = 0; r < kRows; ++r) {
            if (Codec::has_min)
                out->sum[s][r] = out->scale[r] * (float)sums[s][r];
            else
                out->start[s][r] = signed_codes<Codec>() ? 0 : -Codec::offset * sums[s][r];
        }
}

// rest = values - what row r of a group holds of them.
template <typename Codec>
inline void subtract_packed(const TileGroup<Codec>& t, int64_t r, const float* values,
                            float* rest) {
    int8_t q[32];
    for (int i = 0; i < kDots; ++i) __builtin_memcpy(q + kDotBytes * i, t.x[i][r], kDotBytes);
    for (int i = 0; i < 32; ++i) rest[i] = values[i] - t.scale[r] * (float)q[i];
}

// Rows row0 .. row0+rows of x [., k], zero rows at the end; a row with an earlier reference row is
// packed as its difference to that one, with the difference's own scale. What rounding takes from
// the first ``refined`` of them goes to a second tile, rest.
template <typename Codec>
inline void pack_tile_int8(const float* x, int64_t row0, int64_t rows, const int32_t* references,
                           int64_t k, TileGroup<Codec>* out, int64_t refined,
                           TileGroup<Codec>* rest) {
    static constexpr float zeros[32] = {};
    float differences[kRows][32], rests[kRows][32];
    for (int64_t g = 0; g < k / 32; ++g) {
        const float *values[kRows], *of_rest[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            values[r] = r < rows ? x + (row0 + r) * k + 32 * g : zeros;
            if (r >= rows || !is_difference(references, row0 + r)) continue;
            row_or_difference(x, k, row0 + r, references, 32 * g, 32, differences[r]);
            values[r] = differences[r];
        }
        pack_group_int8(values, out + g);
        if (refined <= 0) continue;
        for (int64_t r = 0; r < kRows; ++r) {
            of_rest[r] = r < refined ? rests[r] : zeros;
            if (r < refined) subtract_packed(out[g], r, values[r], rests[r]);
        }
        pack_group_int8(of_rest, rest + g);
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
