// The micro-kernel of the int8 route: dot products of bytes per group of 32, scaled and summed in
// fp32, group after group. The instruction sets differ in the shape of a vector of sums and in the
// functions before multiply_int8.
#pragma once

#include <cstdint>

#include "int8_pack.h"
#include "pack.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// A vector of sums covers kSumRows rows by kSumOutputs outputs, row after row. kPassOutputs x kRows
// sums are alive at a time: mostly one vector of outputs, which leaves as many registers to the
// fp32 sums; but ARM's dot products take all 16 outputs, 16 of 32 registers, enough to keep 4 units
// of 4 cycles busy, and the fp32 sums, used once per group, are spilled.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kSumRows = 2, kSumOutputs = 2;
#else
constexpr int kSumRows = 1, kSumOutputs = kWidth;
#endif
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kPassOutputs = kInt8Outputs;
#else
constexpr int kPassOutputs = kWidth;
#endif

// Without an instruction for dot products of bytes, AVX2 has products of bytes added in pairs in 16
// bits. That many of them, a power of two, of small codes, can be added before they are widened to
// 32 bits, which costs as much as the products do.
template <typename Codec>
constexpr int pairs_at_once() {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
    if (signed_codes<Codec>()) return 1;
    int n = 1;
    while (n < kDots && 2 * n * 2 * 127 * Codec::top <= 32767) n *= 2;
    return n;
#else
    return 1;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Keeps GCC from adding up in another order: it takes all products first then, and spills them.
template <typename V>
inline void in_order(V& sum) {
    __asm__("" : "+x"(sum));
}
#endif

// sum + the dot products of kDotBytes unsigned codes and signed activations. kSigned: the codes
// are signed.
template <bool kSigned>
inline VI dot_bytes(VI sum, VI codes, VI x) {
#if defined(__AVX512VNNI__)
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (VI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i w = (__m256i)codes, a = (__m256i)x;
    const __m256i pairs = kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
                                  : _mm256_maddubs_epi16(w, a);
    sum += (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    in_order(sum);
    return sum;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (VI)vmmlaq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)codes);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
#elif defined(__aarch64__)
    const int8x16_t w = (int8x16_t)codes, a = (int8x16_t)x;
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    const int16x8_t pairs = vpaddq_s16(low, high);  // at most 2 x 128 x 127
    return (VI)vpadalq_s16((int32x4_t)sum, pairs);
#elif defined(__SSE2__) && !defined(__AVX2__)
    const __m128i zero = _mm_setzero_si128(), w = (__m128i)codes, a = (__m128i)x;
    const __m128i w0 =
        kSigned ? _mm_srai_epi16(_mm_unpacklo_epi8(w, w), 8) : _mm_unpacklo_epi8(w, zero);
    const __m128i w1 =
        kSigned ? _mm_srai_epi16(_mm_unpackhi_epi8(w, w), 8) : _mm_unpackhi_epi8(w, zero);
    const __m128i a0 = _mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8);
    const __m128i a1 = _mm_srai_epi16(_mm_unpackhi_epi8(a, a), 8);
    const __m128 low = (__m128)_mm_madd_epi16(w0, a0), high = (__m128)_mm_madd_epi16(w1, a1);
    return sum + (VI)_mm_shuffle_ps(low, high, 0x88) + (VI)_mm_shuffle_ps(low, high, 0xDD);
#else
    uint8_t w[4 * kWidth];
    int8_t a[4 * kWidth];
    __builtin_memcpy(w, &codes, sizeof w);
    __builtin_memcpy(a, &x, sizeof a);
    for (int j = 0; j < kWidth; ++j)
        for (int l = 4 * j; l < 4 * j + 4; ++l) sum[j] += (kSigned ? (int8_t)w[l] : w[l]) * a[l];
    return sum;
#endif
}

// The same for rows r .. r+kSumRows of x [kRows][kDotBytes].
template <bool kSigned>
inline VI dot_rows(VI sum, VI codes, const int8_t (*x)[kDotBytes], int r) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return dot_bytes<kSigned>(sum, codes, as_int(load((const float*)x[r])));
#elif defined(__ARM_FEATURE_DOTPROD)
    // One load for all rows, of which each takes its lane; intrinsics want that as a constant.
    static_assert(kRows == 4);
    const int32x4_t s = (int32x4_t)sum;
    const int8x16_t w = (int8x16_t)codes, rows = vld1q_s8(x[0]);
    switch (r) {
        case 0:
            return (VI)vdotq_laneq_s32(s, w, rows, 0);
        case 1:
            return (VI)vdotq_laneq_s32(s, w, rows, 1);
        case 2:
            return (VI)vdotq_laneq_s32(s, w, rows, 2);
        default:
            return (VI)vdotq_laneq_s32(s, w, rows, 3);
    }
#else
    int32_t word;
    __builtin_memcpy(&word, x[r], 4);
    return dot_bytes<kSigned>(sum, codes, VI{} + word);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// dots += the dot products of codes [n][kInt8Outputs] of an output vector and of rows x.
template <int n>
inline void dot_pairs(VI* dots, const uint8_t (*codes)[kInt8Outputs][kDotBytes], int out,
                      const int8_t (*x)[kRows][kDotBytes]) {
    __m256i pairs[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const __m256i code = (__m256i)load((const float*)codes[i][out]);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            int32_t word;
            __builtin_memcpy(&word, x[i][r], 4);
            const __m256i pair = _mm256_maddubs_epi16(code, _mm256_set1_epi32(word));
            pairs[r] = i == 0 ? pair : _mm256_add_epi16(pairs[r], pair);
            in_order(pairs[r]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
        dots[r] += (VI)_mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1));
}
#else
template <int n>
inline void dot_pairs(VI*, const uint8_t (*)[kInt8Outputs][kDotBytes], int,
                      const int8_t (*)[kRows][kDotBytes]) {}
#endif

// Numbers of rows or outputs, one for each of a vector of sums; and a vector of sums into
// c [kRows][kInt8Outputs].
#if defined(__ARM_FEATURE_MATMUL_INT8)
inline VF of_rows(const float* p) { return VF{p[0], p[0], p[1], p[1]}; }
inline VI of_rows(const int32_t* p) { return VI{p[0], p[0], p[1], p[1]}; }
inline VF of_outputs(const float* p) {
    const float32x2_t pair = vld1_f32(p);
    return (VF)vcombine_f32(pair, pair);
}
inline void store_sums(float* c, VF sums) {
    vst1_f32(c, vget_low_f32((float32x4_t)sums));
    vst1_f32(c + kInt8Outputs, vget_high_f32((float32x4_t)sums));
}
#else
inline VF of_rows(const float* p) { return splat(*p); }
inline VI of_rows(const int32_t* p) { return VI{} + *p; }
inline VF of_outputs(const float* p) { return load(p); }
inline void store_sums(float* c, VF sums) { store(c, sums); }
#endif

// c [kRows][kInt8Outputs] = tile . panel^T over all groups.
template <typename Codec>
inline void multiply_int8(const TileGroup<Codec>* tile, const PanelGroup<Codec>* panel,
                          int64_t groups, float* c) {
    constexpr int dots = kDots / Codec::scales;
    constexpr int n_r = kRows / kSumRows, n_v = kPassOutputs / kSumOutputs;
    for (int out = 0; out < kInt8Outputs; out += kPassOutputs) {
        VF acc[n_v][n_r] = {};
        for (int64_t g = 0; g < groups; ++g) {
            const TileGroup<Codec>& t = tile[g];
            const PanelGroup<Codec>& p = panel[g];
#pragma GCC unroll 2
            for (int s = 0; s < Codec::scales; ++s) {
                VI dot[n_v][n_r];
#pragma GCC unroll 8
                for (int v = 0; v < n_v; ++v)
#pragma GCC unroll 12
                    for (int r = 0; r < n_r; ++r)
                        dot[v][r] = Codec::has_min ? VI{} : of_rows(t.start[s] + r * kSumRows);
                constexpr int at_once = min_of(pairs_at_once<Codec>(), dots);
                static_assert(dots % at_once == 0);
#pragma GCC unroll 8
                for (int i = s * dots; at_once > 1 && i < (s + 1) * dots; i += at_once)
                    dot_pairs<at_once>(dot[0], p.code + i, out, t.x + i);
#pragma GCC unroll 8
                for (int i = s * dots; at_once == 1 && i < (s + 1) * dots; ++i)
#pragma GCC unroll 8
                    for (int v = 0; v < n_v; ++v) {
                        const VI codes =
                            as_int(load((const float*)p.code[i][out + v * kSumOutputs]));
#pragma GCC unroll 12
                        for (int r = 0; r < n_r; ++r)
                            dot[v][r] = dot_rows<signed_codes<Codec>()>(dot[v][r], codes, t.x[i],
                                                                        r * kSumRows);
                    }
#pragma GCC unroll 8
                for (int v = 0; v < n_v; ++v) {
                    const VF scale = of_outputs(p.scale[s] + out + v * kSumOutputs);
#pragma GCC unroll 12
                    for (int r = 0; r < n_r; ++r)
                        acc[v][r] = fmadd(to_float(dot[v][r]),
                                          scale * of_rows(t.scale + r * kSumRows), acc[v][r]);
                }
            }
#pragma GCC unroll 2
            for (int s = 0; Codec::has_min && s < Codec::scales; ++s) {
#pragma GCC unroll 8
                for (int v = 0; v < n_v; ++v) {
                    const VF min = of_outputs(p.min[s] + out + v * kSumOutputs);
#pragma GCC unroll 12
                    for (int r = 0; r < n_r; ++r)
                        acc[v][r] = fmadd(min, of_rows(t.sum[s] + r * kSumRows), acc[v][r]);
                }
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < n_v; ++v)
#pragma GCC unroll 12
            for (int r = 0; r < n_r; ++r)
                store_sums(c + r * kSumRows * kInt8Outputs + out + v * kSumOutputs, acc[v][r]);
    }
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
