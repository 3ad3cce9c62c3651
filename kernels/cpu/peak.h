// This machine's own peak rates, for benchmarks to compare with: the multiply-adds the matmul is
// made of, issued from registers on all threads, and a stream read from memory.
#pragma once

#include <time.h>

#include <cstdint>

#include "amx.h"
#include "dense.h"
#include "dispatch.h"
#include "int8_dot.h"
#include "pack.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

inline double seconds_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Independent sums: enough to hide 4 cycles on 2 units, on ARM on 4; no spills.
#if defined(__aarch64__)
constexpr int kChains = 16;
#else
constexpr int kChains = 12;
#endif

// Lets the compiler assume nothing about a vector but that it is wanted in a register.
template <typename V>
inline void conceal(V& v) {
#if defined(__aarch64__)
    __asm__ volatile("" : "+w"(v));
#else
    __asm__ volatile("" : "+x"(v));
#endif
}

template <typename V, typename Step>
inline void run_chains(int64_t n, const Step& step) {
    V sums[kChains] = {};
    V x = {}, y = {};
    for (int c = 0; c < kChains; ++c) conceal(sums[c]);  // or all would be one
    conceal(y);
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c) {
            conceal(x);  // or a product that several instructions make would be made once
            sums[c] = step(sums[c], x, y);
        }
    }
    for (int c = 0; c < kChains; ++c) conceal(sums[c]);
}

// The best rate of several runs of body, which does `work` units.
template <typename F>
inline double best_rate(double work, const F& body) {
    double best = 0;
    for (int i = 0; i < 7; ++i) {
        const double start = seconds_now();
        body();
        best = max_of(best, work / (seconds_now() - start));
    }
    return best;
}

template <typename V, typename Step>
inline double multiply_rate(double ops_per_step, const Step& step) {
    const int64_t n = 1000000, threads = num_threads();
    return best_rate(ops_per_step * kChains * (double)(n * threads),
                     [&] { parallel_for(threads, [&](int64_t) { run_chains<V>(n, step); }); });
}

#if defined(FWDLLM_TILES)
inline double tile_rate() {
    const int64_t n = 200000, threads = num_threads();
    constexpr double ops_per_product = 2 * 16 * 16 * 32;
    return best_rate(2 * ops_per_product * (double)(n * threads), [&] {
        parallel_for(threads, [&](int64_t) {
            const Tiles tiles;  // all zero
            for (int64_t i = 0; i < n; ++i) {
                _tile_dpbf16ps(0, 2, 3);
                _tile_dpbf16ps(1, 2, 3);
            }
        });
    });
}
#endif

// Bytes per second read from memory; the buffer is far larger than caches.
inline double read_rate() {
    constexpr int64_t size = 256 << 20, piece = 1 << 20;
    Buffer buffer(size);
    __builtin_memset(buffer.data, 1, size);
    return best_rate((double)size, [&] {
        parallel_for(size / piece, [&](int64_t i) {
            const float* from = (const float*)buffer.data + i * (piece / 4);
            VF sums[4] = {};
            for (int64_t j = 0; j < piece / 4; j += 4 * kWidth)
                for (int c = 0; c < 4; ++c) sums[c] += load(from + j + c * kWidth);
            for (int c = 0; c < 4; ++c) conceal(sums[c]);
        });
    });
}

// Operations (a multiply-add is two) or bytes per second; 0 if this instruction set has no such.
double peak(Peak kind) {
    if (kind == kPeakRead) return read_rate();
    if (kind == kPeakFp32)
        return multiply_rate<VF>(2 * kWidth, [](VF s, VF x, VF y) { return fmadd(x, y, s); });
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
    if (kind == kPeakInt8)  // of codes of 4 bits, see dot_pairs
        return multiply_rate<VI>(2 * kDotBytes * kWidth, [](VI s, VI x, VI y) {
            const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)y);
            return (VI)_mm256_add_epi16((__m256i)s, pairs);
        });
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__aarch64__)
    if (kind == kPeakInt8)
        return multiply_rate<VI>(2 * kDotBytes * kWidth,
                                 [](VI s, VI x, VI y) { return dot_bytes<false>(s, x, y); });
#endif
#if defined(FWDLLM_TILES)
    if (kind == kPeakBf16) return tile_rate();
#elif defined(__AVX512BF16__)
    if (kind == kPeakBf16)
        return multiply_rate<VF>(4 * kWidth,
                                 [](VF s, VF x, VF y) { return BFloat16::multiply_add(x, y, s); });
#endif
    return 0;
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
