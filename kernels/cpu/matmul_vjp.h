// Cotangents of y = x W^T + bias + scale (x A^T) B^T, for one plain lane: of x,
//   dx = dy W + v A,  v = scale dy B,
// and of the factors, summed over rows,
//   dA = v^T x,  dB = scale dy^T u,  u = x A^T.
// Rows are added one after the other to what is there, so that rows in several calls give the bits
// of rows in one.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "lora.h"
#include "matmul.h"
#include "pack.h"
#include "simd.h"
#include "threads.h"
#include "transposed.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

// A matrix [width][rank] as [rank][width] and back.
inline void transpose(const float* in, int64_t rows, int64_t columns, float* out) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = in[i * columns + j];
}

// out [rows][rank] = x factor^T; factor [rank][width].
inline void project(const float* x, int64_t rows, int64_t width, const float* factor, int64_t rank,
                    float* out) {
    const uint64_t seed = 0;
    const float still = 0;
    const int32_t starts[] = {0, (int32_t)rows};
    const Lanes plain{&seed, &still, 1, kNormal, false, starts, 1};
    const LoRA lora{factor, nullptr, 1.0f, rank, {}, {}};
    const SeedGroup all{0, 1, 0, seed};
    parallel_for(ceil_div(rank, kRankBlock), [&](int64_t task) {
        project_down(x, rows, width, lora, plain, all, task * kRankBlock, out, rank);
    });
}

// v = scale dy B: [rows][rank].
struct BottleneckCotangents {
    Buffer numbers;
    BottleneckCotangents(const float* dy, int64_t rows, int64_t n_out, const LoRA& lora)
        : numbers(4 * rows * lora.rank) {
        Buffer b(4 * lora.rank * n_out);
        transpose(lora.b, n_out, lora.rank, (float*)b.data);
        project(dy, rows, n_out, (const float*)b.data, lora.rank, v());
        for (int64_t i = 0; i < rows * lora.rank; ++i) v()[i] *= lora.scale;
    }
    float* v() const { return (float*)numbers.data; }
};

// dx [rows, n_in] = dy W + v A.
void matmul_vjp(const float* dy, int64_t rows, const Weight& w, const LoRA* lora, bool exact,
                float* dx) {
    with_transposed(dy, rows, w, exact,
                    [&](const auto& product) { multiply(product, nullptr, 0, nullptr, dx); });
    if (lora == nullptr) return;
    const BottleneckCotangents cotangents(dy, rows, w.n_out, *lora);
    const int64_t rank = lora->rank;
    parallel_for(ceil_div(w.n_in, kLoraOutputs), [&](int64_t task) {
        const int64_t at = task * kLoraOutputs, n = min_of(kLoraOutputs, w.n_in - at);
        float* a = (float*)thread_scratch(4 * rank * kLoraOutputs);
        for (int64_t r = 0; r < rank; ++r) {
            __builtin_memset(a + r * kLoraOutputs, 0, 4 * kLoraOutputs);
            __builtin_memcpy(a + r * kLoraOutputs, lora->a + r * w.n_in + at, 4 * n);
        }
        const float* v = cotangents.v();
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4)
            multiply_b<4>(v + i * rank, rank, rank, a, dx + i * w.n_in + at, w.n_in, n);
        for (; i < rows; ++i)
            multiply_b<1>(v + i * rank, rank, rank, a, dx + i * w.n_in + at, w.n_in, n);
    });
}

// sums [kRankBlock][2 kWidth] += coefficients [rows][stride]^T x, columns 0 .. n of x
// [rows][width].
inline void outer_products(const float* coefficients, int64_t stride, int64_t ranks, const float* x,
                           int64_t width, int64_t rows, int64_t n, float* sums) {
    const int64_t first = min_of<int64_t>(kWidth, n), second = n - first;
    VF acc[kRankBlock][2];
    for (int r = 0; r < kRankBlock; ++r)
        for (int v = 0; v < 2; ++v) acc[r][v] = load(sums + (2 * r + v) * kWidth);
    for (int64_t i = 0; i < rows; ++i, coefficients += stride, x += width) {
        const VF low = load_first(x, first);
        const VF high = second > 0 ? load_first(x + kWidth, second) : VF{};
#pragma GCC unroll 4
        for (int r = 0; r < kRankBlock; ++r) {
            const VF c = splat(r < ranks ? coefficients[r] : 0.0f);
            acc[r][0] = fmadd(c, low, acc[r][0]);
            acc[r][1] = fmadd(c, high, acc[r][1]);
        }
    }
    for (int r = 0; r < kRankBlock; ++r)
        for (int v = 0; v < 2; ++v) store(sums + (2 * r + v) * kWidth, acc[r][v]);
}

// out += coefficients [rows][rank]^T x [rows][width], where out is [rank][width], or [width][rank]
// if it is ``transposed``.
inline void add_outer_products(const float* coefficients, int64_t rank, const float* x,
                               int64_t width, int64_t rows, bool transposed, float* out) {
    constexpr int64_t columns = 2 * kWidth;
    parallel_for(ceil_div(width, columns), [&](int64_t task) {
        const int64_t at = task * columns, n = min_of(columns, width - at);
        const int64_t of_rank = transposed ? 1 : width, of_column = transposed ? rank : 1;
        for (int64_t r0 = 0; r0 < rank; r0 += kRankBlock) {
            const int64_t ranks = min_of<int64_t>(kRankBlock, rank - r0);
            alignas(64) float sums[kRankBlock * columns] = {};
            float* to = out + r0 * of_rank + at * of_column;
            for (int64_t r = 0; r < ranks; ++r)
                for (int64_t j = 0; j < n; ++j)
                    sums[r * columns + j] = to[r * of_rank + j * of_column];
            outer_products(coefficients + r0, rank, ranks, x + at, width, rows, n, sums);
            for (int64_t r = 0; r < ranks; ++r)
                for (int64_t j = 0; j < n; ++j)
                    to[r * of_rank + j * of_column] = sums[r * columns + j];
        }
    });
}

// da [rank, n_in] += dA and db [n_out, rank] += dB.
void lora_vjp(const float* x, const float* dy, int64_t rows, int64_t n_in, int64_t n_out,
              const LoRA& lora, float* da, float* db) {
    const BottleneckCotangents cotangents(dy, rows, n_out, lora);
    add_outer_products(cotangents.v(), lora.rank, x, n_in, rows, false, da);
    Buffer bottleneck(4 * rows * lora.rank);
    float* u = (float*)bottleneck.data;
    project(x, rows, n_in, lora.a, lora.rank, u);
    for (int64_t i = 0; i < rows * lora.rank; ++i) u[i] *= lora.scale;
    add_outer_products(u, lora.rank, dy, n_out, rows, true, db);
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
