// The random stream of a seed: element i of v(seed) is component i % 4 of Triton's
// tl.randn4x(seed, i / 4), i.e. Philox-4x32-10 (Salmon et al., SC'11) and Box-Muller.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

struct Philox4 {
    VU word[4];
};

inline Philox4 philox_block(uint64_t seed, uint64_t counter) {  // counters counter + 0..kWidth-1
    VU lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = (uint32_t)i;
    const VU low = VU{} + (uint32_t)counter;
    VU c0 = low + lane;
    VU c1 = (uint32_t)(counter >> 32) - (VU)(c0 < low);  // a true comparison is -1: the carry
    VU c2 = {}, c3 = {};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const VU n0 = umulhi(c2, 0xCD9E8D57u) ^ c1 ^ k0;
        const VU n2 = umulhi(c0, 0xD2511F53u) ^ c3 ^ k1;
        c1 = c2 * 0xCD9E8D57u;
        c3 = c0 * 0xD2511F53u;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

inline VF uniform(VU bits) {  // tl.uint_to_uniform_float
    const VI x = (VI)bits;
    return to_float(x ^ (x >> 31)) * splat(4.6566127342e-10f);
}

inline void box_muller(VU a, VU b, VF* n0, VF* n1) {  // tl.pair_uniform_to_normal
    const VF radius = vsqrt(splat(-2.0f) * vlog(vmax(splat(1.0e-7f), uniform(a))));
    VF s, c;
    vsincos(splat(6.283185307179586f) * uniform(b), &s, &c);
    *n0 = radius * c;
    *n1 = radius * s;
}

inline VF sign_of(VU bits) { return as_float((VI)((bits & 0x80000000u) | 0x3F800000u)); }

// out[4 i + j] = n[j][i]
inline void interleave(const VF* n, float* out) {
#if defined(__AVX2__)
    // In each lane of 128 bits transpose 4 x 4; element 4 L + m is then lane L of row m.
    typedef float Lane __attribute__((vector_size(16)));
    const auto unpack = [&](int a, int b, bool high) {
#if defined(__AVX512F__)
        return high ? _mm512_unpackhi_ps((__m512)n[a], (__m512)n[b])
                    : _mm512_unpacklo_ps((__m512)n[a], (__m512)n[b]);
    };
    const auto pair = [](__m512 a, __m512 b, bool high) {
        return high ? _mm512_unpackhi_pd((__m512d)a, (__m512d)b)
                    : _mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#else
        return high ? _mm256_unpackhi_ps((__m256)n[a], (__m256)n[b])
                    : _mm256_unpacklo_ps((__m256)n[a], (__m256)n[b]);
    };
    const auto pair = [](__m256 a, __m256 b, bool high) {
        return high ? _mm256_unpackhi_pd((__m256d)a, (__m256d)b)
                    : _mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#endif
    };
    for (int m = 0; m < 4; ++m) {
        const auto row = pair(unpack(0, 1, m >= 2), unpack(2, 3, m >= 2), m % 2 == 1);
        Lane lanes[kWidth / 4];
        __builtin_memcpy(lanes, &row, sizeof lanes);
        for (int l = 0; l < kWidth / 4; ++l)
            __builtin_memcpy(out + 4 * (4 * l + m), &lanes[l], sizeof(Lane));
    }
#else
    for (int i = 0; i < kWidth; ++i)
        for (int j = 0; j < 4; ++j) out[4 * i + j] = n[j][i];
#endif
}

constexpr int kRandomBlock = 4 * kWidth;  // elements made at a time

inline void random_block(int distribution, uint64_t seed, uint64_t counter, float* out) {
    const Philox4 p = philox_block(seed, counter);
    VF n[4];
    if (distribution == kRademacher) {
        for (int j = 0; j < 4; ++j) n[j] = sign_of(p.word[j]);
    } else {
        box_muller(p.word[0], p.word[1], &n[0], &n[1]);
        box_muller(p.word[2], p.word[3], &n[2], &n[3]);
    }
    interleave(n, out);
}

// Elements start .. start+count of v(seed). Callers keep count to what fits the L1 cache.
inline void fill_random(int distribution, uint64_t seed, uint64_t start, int64_t count,
                        float* out) {
    float block[kRandomBlock];
    int64_t done = 0;
    while (done < count) {
        const uint64_t at = start + done;
        const int64_t skip = (int64_t)(at % 4);
        if (skip == 0 && count - done >= kRandomBlock) {
            random_block(distribution, seed, at / 4, out + done);
            done += kRandomBlock;
            continue;
        }
        random_block(distribution, seed, at / 4, block);
        const int64_t n = min_of<int64_t>(kRandomBlock - skip, count - done);
        __builtin_memcpy(out + done, block + skip, 4 * n);
        done += n;
    }
}

constexpr int64_t kTile = 1024;        // elements of v alive at once: 4 KiB, an eighth of L1
constexpr int64_t kTask = 16 * kTile;  // elements of theta one task owns

void philox(uint64_t seed, uint64_t start, int64_t count, uint32_t* out) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const Philox4 p = philox_block(seed, start + i);
        for (int64_t j = 0; j < min_of<int64_t>(kWidth, count - i); ++j)
            for (int w = 0; w < 4; ++w) out[4 * (i + j) + w] = p.word[w][j];
    }
}

void random_values(int distribution, uint64_t seed, uint64_t start, int64_t count, float* out) {
    parallel_for(ceil_div(count, kTask), [&](int64_t task) {
        const int64_t first = task * kTask;
        fill_random(distribution, seed, start + first, min_of(kTask, count - first), out + first);
    });
}

// theta[i] += sum_k coefficients[k] v(seeds[k])[offset + i], summed in the order of k.
void seeded_axpy(float* theta, int64_t n, const uint64_t* seeds, const float* coefficients,
                 int64_t k, uint64_t offset, int distribution) {
    parallel_for(ceil_div(n, kTask), [&](int64_t task) {
        float z[kTile];
        const int64_t end = min_of(n, (task + 1) * kTask);
        for (int64_t i = task * kTask; i < end; i += kTile) {
            const int64_t count = min_of(kTile, end - i);
            for (int64_t s = 0; s < k; ++s) {
                fill_random(distribution, seeds[s], offset + i, count, z);
                const VF c = splat(coefficients[s]);
                for (int64_t j = 0; j < count; j += kWidth) {
                    const int64_t m = min_of<int64_t>(kWidth, count - j);
                    float* t = theta + i + j;
                    store_first(t, fmadd(c, load_first(z + j, m), load_first(t, m)), m);
                }
            }
        }
    });
}

// out[k] = g . v(seeds[k])[offset : offset + n]; tiles in fp32, their sums in fp64.
void seeded_dot(const float* g, int64_t n, const uint64_t* seeds, int64_t k, uint64_t offset,
                int distribution, double* out) {
    parallel_for(k, [&](int64_t s) {
        float z[kTile];
        double total = 0;
        for (int64_t i = 0; i < n; i += kTile) {
            const int64_t count = min_of(kTile, n - i);
            fill_random(distribution, seeds[s], offset + i, count, z);
            VF acc = {};
            for (int64_t j = 0; j < count; j += kWidth) {
                const int64_t m = min_of<int64_t>(kWidth, count - j);
                acc = fmadd(load_first(g + i + j, m), load_first(z + j, m), acc);
            }
            total += sum(acc);
        }
        out[s] = total;
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
