// The vector type of one instruction set, by the compiler's vector extensions, and the few
// operations those lack.
#pragma once

#include <cstdint>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fwdllm::FWDLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float VF __attribute__((vector_size(4 * kWidth)));
typedef int32_t VI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VU __attribute__((vector_size(4 * kWidth)));

template <typename T>
constexpr T min_of(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr T max_of(T a, T b) {
    return a < b ? b : a;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline VF load(const float* p) {
    VF v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }
inline VF load_first(const float* p, int64_t n) {  // the rest is zero
    if (n == kWidth) return load(p);
    VF v = {};
    __builtin_memcpy(&v, p, 4 * n);
    return v;
}
inline void store_first(float* p, VF v, int64_t n) {
    if (n == kWidth) return store(p, v);
    __builtin_memcpy(p, &v, 4 * n);
}
inline VF splat(float x) {  // VF{} + x would cost an addition: 0 + x is not x if that is -0
#if defined(__AVX512F__)
    return (VF)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (VF)_mm256_set1_ps(x);
#else
    return VF{x, x, x, x};
#endif
}
inline VF as_float(VI v) { return (VF)v; }
inline VI as_int(VF v) { return (VI)v; }
inline VF to_float(VI v) { return __builtin_convertvector(v, VF); }
inline VF select(VI mask, VF a, VF b) { return mask ? a : b; }
inline VF vmax(VF a, VF b) {  // b if one is NaN; here and below compilers need several instructions
#if defined(__AVX512F__)
    return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
inline VF vmin(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}

// a * b + c. Explicit, because batch invariance needs every instance of a kernel to round alike,
// and the compiler is told not to contract on its own.
inline VF fmadd(VF a, VF b, VF c) {
#if defined(__AVX512F__)
    return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline VF vsqrt(VF a) {
#if defined(__AVX512F__)
    return (VF)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (VF)_mm256_sqrt_ps((__m256)a);
#elif defined(__aarch64__)
    return (VF)vsqrtq_f32((float32x4_t)a);
#else
    VF r;
    for (int i = 0; i < kWidth; ++i) r[i] = __builtin_sqrtf(a[i]);
    return r;
#endif
}

// High 32 bits of the 64-bit products.
inline VU umulhi(VU a, uint32_t b) {
#if defined(__AVX512F__)
    const __m512i vb = _mm512_set1_epi32((int)b);
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)a, vb), 32);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), vb);
    return (VU)_mm512_mask_blend_epi32(0xAAAA, even, odd);
#elif defined(__AVX2__)
    const __m256i vb = _mm256_set1_epi32((int)b);
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32((__m256i)a, vb), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), vb);
    return (VU)_mm256_blend_epi32(even, odd, 0xAA);
#elif defined(__aarch64__)
    const uint32x4_t all = (uint32x4_t)a;
    const uint32x4_t low = (uint32x4_t)vmull_n_u32(vget_low_u32(all), b);
    return (VU)vuzp2q_u32(low, (uint32x4_t)vmull_high_n_u32(all, b));
#else
    VU r;
    for (int i = 0; i < kWidth; ++i) r[i] = (uint32_t)(((uint64_t)a[i] * b) >> 32);
    return r;
#endif
}

#if defined(__AVX512BF16__) || defined(FWDLLM_TILES)
// Rounded to even; what is not finite stays so.
inline auto to_bf16(VF v) {
#if defined(__AVX512BF16__)
    return _mm512_cvtneps_pbh((__m512)v);
#else  // AMX under emulation
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
    const VU bits = (VU)v, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const VU nan = (VU)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), Halves);
#endif
}
#endif

// f of the halves of a vector, of the halves of that, and so on: always in the same order.
#if defined(__AVX2__)
template <typename F>
inline float reduce(VF v, const F& f) {
#if defined(__AVX512F__)
    __m256 half =
        f(_mm512_castps512_ps256((__m512)v), (__m256)_mm512_extractf64x4_pd((__m512d)v, 1));
#else
    __m256 half = (__m256)v;
#endif
    __m128 quarter = f(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = f(quarter, _mm_movehl_ps(quarter, quarter));
    return f(quarter, _mm_movehdup_ps(quarter))[0];
}
inline float sum(VF v) {
    return reduce(v, [](auto a, auto b) { return a + b; });
}
inline float largest(VF v) {
    return reduce(v, [](auto a, auto b) { return (decltype(a))(a > b ? a : b); });
}
#else
template <typename F>
inline float reduce(VF v, const F& f) {
    float s[kWidth];
    store(s, v);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) s[i] = f(s[i], s[i + half]);
    return s[0];
}
inline float sum(VF v) {
    return reduce(v, [](float a, float b) { return a + b; });
}
inline float largest(VF v) {
    return reduce(v, [](float a, float b) { return a > b ? a : b; });
}
#endif

// exp to about 1 ulp on [-87, 88]; smaller arguments give 0, NaN stays NaN. Cephes expf.
inline VF vexp(VF x) {
    const VF clamped = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
    const VF biased = fmadd(clamped, splat(1.44269504f), splat(12582912.0f));  // round to integer
    const VF n = biased - splat(12582912.0f);
    VF r = fmadd(n, splat(-0.693359375f), clamped);
    r = fmadd(n, splat(2.12194440e-4f), r);
    VF p = splat(1.9875691500e-4f);
    p = fmadd(p, r, splat(1.3981999507e-3f));
    p = fmadd(p, r, splat(8.3334519073e-3f));
    p = fmadd(p, r, splat(4.1665795894e-2f));
    p = fmadd(p, r, splat(1.6666665459e-1f));
    p = fmadd(p, r, splat(5.0000001201e-1f));
    p = fmadd(p, r * r, r) + splat(1.0f);
    const VI exponent = (as_int(biased) - 0x4B400000) << 23;
    const VF y = as_float(as_int(p) + exponent);
    return select(x != x, x, select(x < -87.3f, splat(0.0f), y));
}

// tanh, to 4e-7 of it; NaN stays NaN, and infinity becomes it, so that overflow is seen. Near 0,
// where 1 - 2 / (1 + exp(2 x)) cancels, its series.
inline VF vtanh(VF x) {
    const VF z = x * x;
    VF p = splat(62.0f / 2835.0f);
    p = fmadd(p, z, splat(-17.0f / 315.0f));
    p = fmadd(p, z, splat(2.0f / 15.0f));
    p = fmadd(p, z, splat(-1.0f / 3.0f));
    const VF series = fmadd(p * z, x, x);
    const VF whole = splat(1.0f) - splat(2.0f) / (splat(1.0f) + vexp(x + x));
    return fmadd(x, splat(0.0f), select(z < 0.09f, series, whole));
}

// log on positive normal numbers, accurate relative to the result near 1. Cephes logf.
inline VF vlog(VF x) {
    const VI bits = as_int(x);
    VI e = (bits >> 23) - 126;
    VF m = as_float((bits & 0x007FFFFF) | 0x3F000000);  // in [0.5, 1)
    const VI small = m < 0.707106781186547524f;
    e += small;
    m = m + select(small, m, splat(0.0f)) - splat(1.0f);
    const VF z = m * m;
    VF p = splat(7.0376836292e-2f);
    p = fmadd(p, m, splat(-1.1514610310e-1f));
    p = fmadd(p, m, splat(1.1676998740e-1f));
    p = fmadd(p, m, splat(-1.2420140846e-1f));
    p = fmadd(p, m, splat(1.4249322787e-1f));
    p = fmadd(p, m, splat(-1.6668057665e-1f));
    p = fmadd(p, m, splat(2.0000714765e-1f));
    p = fmadd(p, m, splat(-2.4999993993e-1f));
    p = fmadd(p, m, splat(3.3333331174e-1f));
    const VF fe = to_float(e);
    VF y = p * m * z;
    y = fmadd(fe, splat(-2.12194440e-4f), y);
    y = fmadd(z, splat(-0.5f), y);
    return fmadd(fe, splat(0.693359375f), m + y);
}

// sin and cos on [0, 2 pi]. Cephes sinf/cosf after a three-part reduction by pi/2.
inline void vsincos(VF x, VF* sin_out, VF* cos_out) {
    const VF biased = fmadd(x, splat(0.636619772f), splat(12582912.0f));
    const VF n = biased - splat(12582912.0f);
    const VI quadrant = as_int(biased);
    VF r = fmadd(n, splat(-1.5703125f), x);
    r = fmadd(n, splat(-4.837512969970703125e-4f), r);
    r = fmadd(n, splat(-7.549789948768648e-8f), r);
    const VF z = r * r;
    VF s = splat(-1.9515295891e-4f);
    s = fmadd(s, z, splat(8.3321608736e-3f));
    s = fmadd(s, z, splat(-1.6666654611e-1f));
    s = fmadd(s * z, r, r);
    VF c = splat(2.443315711809948e-5f);
    c = fmadd(c, z, splat(-1.388731625493765e-3f));
    c = fmadd(c, z, splat(4.166664568298827e-2f));
    c = fmadd(c * z, z, fmadd(z, splat(-0.5f), splat(1.0f)));
    const VI swap = (quadrant & 1) != 0;
    const VI sin_sign = (quadrant & 2) << 30;
    const VI cos_sign = ((quadrant + 1) & 2) << 30;
    *sin_out = as_float(as_int(select(swap, c, s)) ^ sin_sign);
    *cos_out = as_float(as_int(select(swap, s, c)) ^ cos_sign);
}

template <typename F>
inline void parallel_for(int64_t n, const F& body) {
    run_tasks(n, [](void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, (void*)&body);
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
