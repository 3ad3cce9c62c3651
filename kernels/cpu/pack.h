// What the routes of the matmul share in laying out their operands.
#pragma once

#include <cstdint>

#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// Rows of a tile of activations. With two vectors of outputs, on NEON four, their sums fill the
// registers but for the operands: 12 x 2 of 32 zmm, 6 x 2 of 16 ymm, 4 x 4 of 32 NEON registers.
constexpr int kRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : 4;

struct Buffer {  // freed at the end of the call
    void* data;
    explicit Buffer(int64_t bytes) : data(allocate(bytes)) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { release(data); }
};

inline bool is_difference(const int32_t* references, int64_t row) {
    return references != nullptr && references[row] != row;
}

// Elements first .. first+n of a row of x [., k], less those of its reference row.
inline void row_or_difference(const float* x, int64_t k, int64_t row, const int32_t* references,
                              int64_t first, int64_t n, float* out) {
    const float* from = x + row * k + first;
    if (!is_difference(references, row)) {
        __builtin_memcpy(out, from, 4 * n);
        return;
    }
    const float* base = x + references[row] * k + first;
    for (int64_t i = 0; i < n; ++i) out[i] = from[i] - base[i];
}

// out[l][j] = in[j][l] for 16 rows of 8 words; strides in words. out is aligned to 64 bytes.
inline void transpose_16x8(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
#if defined(__AVX512F__)
    for (int half = 0; half < 2; ++half) {
        // Lane t of v[m] is row 4 t + m: transposing 4 x 4 words in each lane sorts the rows.
        __m512i v[4];
        for (int m = 0; m < 4; ++m) {
            const uint32_t* from = in + m * stride + 4 * half;
            v[m] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
            v[m] =
                _mm512_inserti32x4(v[m], _mm_loadu_si128((const __m128i*)(from + 4 * stride)), 1);
            v[m] =
                _mm512_inserti32x4(v[m], _mm_loadu_si128((const __m128i*)(from + 8 * stride)), 2);
            v[m] =
                _mm512_inserti32x4(v[m], _mm_loadu_si128((const __m128i*)(from + 12 * stride)), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        uint32_t* to = out + 4 * half * out_stride;
        _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
        _mm512_store_si512(to + out_stride, _mm512_unpackhi_epi64(a, c));
        _mm512_store_si512(to + 2 * out_stride, _mm512_unpacklo_epi64(b, d));
        _mm512_store_si512(to + 3 * out_stride, _mm512_unpackhi_epi64(b, d));
    }
#elif defined(__aarch64__)
    for (int j = 0; j < 16; j += 4) {
        for (int l = 0; l < 8; l += 4) {
            uint32x4_t v[4];
            for (int m = 0; m < 4; ++m) v[m] = vld1q_u32(in + (j + m) * stride + l);
            // Pairs of rows: words 0 and 2 of both, and words 1 and 3.
            const uint64x2_t a = (uint64x2_t)vtrn1q_u32(v[0], v[1]);
            const uint64x2_t b = (uint64x2_t)vtrn2q_u32(v[0], v[1]);
            const uint64x2_t c = (uint64x2_t)vtrn1q_u32(v[2], v[3]);
            const uint64x2_t d = (uint64x2_t)vtrn2q_u32(v[2], v[3]);
            uint32_t* to = out + l * out_stride + j;
            vst1q_u32(to, (uint32x4_t)vtrn1q_u64(a, c));
            vst1q_u32(to + out_stride, (uint32x4_t)vtrn1q_u64(b, d));
            vst1q_u32(to + 2 * out_stride, (uint32x4_t)vtrn2q_u64(a, c));
            vst1q_u32(to + 3 * out_stride, (uint32x4_t)vtrn2q_u64(b, d));
        }
    }
#else
    for (int l = 0; l < 8; ++l)
        for (int j = 0; j < 16; ++j) out[l * out_stride + j] = in[j * stride + l];
#endif
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
