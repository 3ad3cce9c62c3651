// Seeded LoRA: y_l += scale (x_l A_l^T) B_l^T for every lane l, where A_l = A + c_l dA(seed_l) and
// B_l likewise; for a tangent lane its derivative,
//   scale (u_l B^T + c_l u_0 dB^T),  u_l = x_l A^T + c_l x_0 dA^T,  u_0 = x_0 A^T.
// Directions exist only as tiles in the L1 cache: each is generated once per seed, turned into the
// factor of each lane that shares the seed (+epsilon and -epsilon), used for all rows of those
// lanes and overwritten.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "pack.h"
#include "random.h"
#include "simd.h"
#include "threads.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

constexpr int kRankBlock = 4;  // ranks accumulated together: 4 rows x 4 ranks fill 16 registers
constexpr int64_t kLoraDepth = 256;   // columns of A per tile: 4 ranks x 256 = 4 KiB
constexpr int64_t kLoraOutputs = 64;  // outputs per tile of B

struct SeedGroup {  // a part of consecutive lanes that share its seed
    int64_t first, count, part;
    uint64_t seed;
};

// Returns the number of groups written, at most lanes.n * lanes.n_parts.
inline int64_t group_lanes(const Lanes& lanes, SeedGroup* groups) {
    int64_t n = 0;
    for (int64_t p = 0; p < lanes.n_parts; ++p) {
        for (int64_t l = 0; l < lanes.n; ++l) {
            const uint64_t seed = lanes.seeds[l * lanes.n_parts + p];
            if (l > 0 && seed == groups[n - 1].seed)
                ++groups[n - 1].count;
            else
                groups[n++] = {l, 1, p, seed};
        }
    }
    return n;
}

inline bool moves(const FactorDirection& d) { return !d.in_subspace || d.n_basis > 0; }

inline bool perturbed(const Lanes& lanes, const SeedGroup& g, const FactorDirection& d) {
    if (!moves(d)) return false;
    for (int64_t l = g.first; l < g.first + g.count; ++l)
        if (lanes.coefficients[l] != 0) return true;
    return false;
}

// Row r, columns at .. at+n of a direction in a subspace: out[i] = sum_q z[q] basis[q][at + i].
inline void fill_in_subspace(const FactorDirection& d, int distribution, uint64_t seed,
                             int64_t width, int64_t r, int64_t at, int64_t n, float* out) {
    constexpr int64_t kNumbers = kRandomBlock;
    float z[kNumbers];
    __builtin_memset(out, 0, 4 * n);
    for (int64_t q0 = 0; q0 < d.n_basis; q0 += kNumbers) {
        const int64_t count = min_of(kNumbers, d.n_basis - q0);
        fill_random(distribution, seed, d.offset + (uint64_t)(r * d.n_basis + q0), count, z);
        for (int64_t q = 0; q < count; ++q) {
            const float* from = d.basis + (q0 + q) * width + at;
            for (int64_t i = 0; i < n; ++i) out[i] += z[q] * from[i];
        }
    }
}

// Elements at .. at+n of a direction that has its own number for each.
inline void fill_dense(const FactorDirection& d, int distribution, uint64_t seed, int64_t at,
                       int64_t n, float* out) {
    fill_random(distribution, seed, d.offset + (uint64_t)at, n, out);
    for (int64_t i = 0; d.mask != nullptr && i < n; ++i) out[i] *= d.mask[at + i];
}

// sums [kRankBlock][kWidth] of one row += x . a over n columns; a [kRankBlock][kLoraDepth].
template <int kBlock>
inline void multiply_a(const float* x, int64_t x_stride, const float* a, int64_t n, float* sums) {
    VF acc[kBlock][kRankBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kRankBlock; ++r) acc[i][r] = load(sums + (i * kRankBlock + r) * kWidth);
    for (int64_t k = 0; k < n; k += kWidth) {
        const int64_t m = min_of<int64_t>(kWidth, n - k);
        VF factor[kRankBlock];
#pragma GCC unroll 4
        for (int r = 0; r < kRankBlock; ++r) factor[r] = load(a + r * kLoraDepth + k);
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) {
            const VF v =
                m == kWidth ? load(x + i * x_stride + k) : load_first(x + i * x_stride + k, m);
#pragma GCC unroll 4
            for (int r = 0; r < kRankBlock; ++r) acc[i][r] = fmadd(v, factor[r], acc[i][r]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kRankBlock; ++r) store(sums + (i * kRankBlock + r) * kWidth, acc[i][r]);
}

// sums [rows][kRankBlock][kWidth] += x . a over n columns.
inline void multiply_a(const float* x, int64_t rows, int64_t x_stride, const float* a, int64_t n,
                       float* sums) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
        multiply_a<4>(x + i * x_stride, x_stride, a, n, sums + i * kRankBlock * kWidth);
    for (; i < rows; ++i)
        multiply_a<1>(x + i * x_stride, x_stride, a, n, sums + i * kRankBlock * kWidth);
}

// u [rows][u_stride] of the lanes of one group, for ranks rank0 .. rank0+kRankBlock.
inline void project_down(const float* x, int64_t rows_per_lane, int64_t n_in, const LoRA& lora,
                         const Lanes& lanes, const SeedGroup& group, int64_t rank0, float* u,
                         int64_t u_stride) {
    const FactorDirection& direction = lora.direction_a;
    const int64_t ranks = min_of<int64_t>(kRankBlock, lora.rank - rank0);
    const int64_t row0 = lanes.starts[group.part];
    const int64_t rows = lanes.starts[group.part + 1] - row0;
    const bool seeded = perturbed(lanes, group, direction);
    const int64_t sums_size = rows * kRankBlock * kWidth;
    float* sums = (float*)thread_scratch(4 * group.count * sums_size);
    __builtin_memset(sums, 0, 4 * group.count * sums_size);
    float z[kRankBlock][kLoraDepth] = {}, a[kRankBlock][kLoraDepth] = {};
    for (int64_t k0 = 0; k0 < n_in; k0 += kLoraDepth) {
        const int64_t k = min_of(kLoraDepth, n_in - k0);
        if (k < kLoraDepth) {  // vectors past the end read zeros
            __builtin_memset(a, 0, sizeof a);
            __builtin_memset(z, 0, sizeof z);
        }
        for (int64_t r = rank0; seeded && r < rank0 + ranks; ++r) {
            if (direction.in_subspace)
                fill_in_subspace(direction, lanes.distribution, group.seed, n_in, r, k0, k,
                                 z[r - rank0]);
            else
                fill_dense(direction, lanes.distribution, group.seed, r * n_in + k0, k,
                           z[r - rank0]);
        }
        for (int64_t i = 0; i < group.count; ++i) {
            const int64_t l = group.first + i;
            const bool tangent = lanes.tangents && l > 0;
            const float c = seeded ? lanes.coefficients[l] : 0.0f;
            float* to = sums + i * sums_size;
            for (int64_t r = 0; r < ranks; ++r) {
                const float* plain = lora.a + (rank0 + r) * n_in + k0;
                if (c == 0 || tangent)
                    __builtin_memcpy(a[r], plain, 4 * k);
                else
                    for (int64_t j = 0; j < k; ++j) a[r][j] = plain[j] + c * z[r][j];
            }
            multiply_a(x + (l * rows_per_lane + row0) * n_in + k0, rows, n_in, a[0], k, to);
            if (!tangent || c == 0) continue;
            for (int64_t r = 0; r < ranks; ++r)
                for (int64_t j = 0; j < k; ++j) a[r][j] = c * z[r][j];
            multiply_a(x + row0 * n_in + k0, rows, n_in, a[0], k, to);
        }
    }
    for (int64_t i = 0; i < group.count; ++i) {
        float* to = u + ((group.first + i) * rows_per_lane + row0) * u_stride + rank0;
        for (int64_t j = 0; j < rows; ++j)
            for (int64_t r = 0; r < ranks; ++r)
                to[j * u_stride + r] =
                    sum(load(sums + i * sums_size + (j * kRankBlock + r) * kWidth));
    }
}

// y [kBlock rows, n] += u b; b [rank][kLoraOutputs], of which kLoraOutputs may be read.
template <int kBlock>
inline void multiply_b(const float* u, int64_t u_stride, int64_t rank, const float* b, float* y,
                       int64_t y_stride, int64_t n) {
    constexpr int kVectors = 2;  // with 4 rows 8 sums: enough to hide a multiply-add's 4 cycles
    for (int64_t j = 0; j < n; j += kVectors * kWidth) {
        VF acc[kBlock][kVectors] = {};
        for (int64_t r = 0; r < rank; ++r) {
            VF factor[kVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
                factor[v] = load(b + r * kLoraOutputs + j + v * kWidth);
#pragma GCC unroll 4
            for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v)
                    acc[i][v] = fmadd(splat(u[i * u_stride + r]), factor[v], acc[i][v]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const int64_t m = min_of<int64_t>(kWidth, n - j - v * kWidth);
                float* to = y + i * y_stride + j + v * kWidth;
                if (m > 0) store_first(to, load_first(to, m) + acc[i][v], m);
            }
    }
}

// y[rows, out0 .. out0+n] += scale u B^T for the lanes of one group; n <= kLoraOutputs. Rows of u
// have u_stride numbers, for tangents those of the primal behind their own.
inline void project_up(const float* u, int64_t u_stride, int64_t rows_per_lane, int64_t n_out,
                       const LoRA& lora, const Lanes& lanes, const SeedGroup& group, int64_t out0,
                       int64_t n, float* y) {
    const FactorDirection& direction = lora.direction_b;
    const int64_t rank = lora.rank, size = kLoraOutputs * rank;
    float* z = (float*)thread_scratch(4 * 4 * size);  // [rank][kLoraOutputs]
    float* numbers = z + size;                        // [n][rank]
    float* b = numbers + size;                        // [2 rank][kLoraOutputs]
    const bool seeded = perturbed(lanes, group, direction);
    __builtin_memset(b, 0, 4 * 2 * size);
    if (seeded && direction.in_subspace) {
        for (int64_t r = 0; r < rank; ++r)
            fill_in_subspace(direction, lanes.distribution, group.seed, n_out, r, out0, n,
                             z + r * kLoraOutputs);
    } else if (seeded) {
        fill_dense(direction, lanes.distribution, group.seed, out0 * rank, n * rank, numbers);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t r = 0; r < rank; ++r) z[r * kLoraOutputs + j] = numbers[j * rank + r];
    }
    for (int64_t l = group.first; l < group.first + group.count; ++l) {
        const bool tangent = lanes.tangents && l > 0;
        const float c = seeded ? lanes.coefficients[l] : 0.0f;
        const float* plain = lora.b + out0 * rank;
        for (int64_t r = 0; r < rank; ++r) {
            float* own = b + r * kLoraOutputs;
            const float* dz = z + r * kLoraOutputs;
            if (c == 0 || tangent)
                for (int64_t j = 0; j < n; ++j) own[j] = lora.scale * plain[j * rank + r];
            else
                for (int64_t j = 0; j < n; ++j)
                    own[j] = lora.scale * (plain[j * rank + r] + c * dz[j]);
            if (c != 0 && tangent)
                for (int64_t j = 0; j < n; ++j) own[size + j] = lora.scale * (c * dz[j]);
        }
        const int64_t ranks = c != 0 && tangent ? 2 * rank : rank;
        const int64_t end = l * rows_per_lane + lanes.starts[group.part + 1];
        int64_t i = l * rows_per_lane + lanes.starts[group.part];
        for (; i + 4 <= end; i += 4)
            multiply_b<4>(u + i * u_stride, u_stride, ranks, b, y + i * n_out + out0, n_out, n);
        for (; i < end; ++i)
            multiply_b<1>(u + i * u_stride, u_stride, ranks, b, y + i * n_out + out0, n_out, n);
    }
}

// The LoRA term of a product: made with u = x A^T of every lane, it adds u B^T to any range of
// outputs. The matmul does that to outputs it has just written, while they are in the cache.
struct LoraTerm {
    const LoRA& lora;
    const Lanes& lanes;
    int64_t rows_per_lane, n_out, u_stride;
    Buffer groups, u_buffer;
    int64_t n_groups;

    LoraTerm(const float* x, int64_t rows, int64_t n_in, int64_t n_out, const LoRA& lora,
             const Lanes& lanes)
        : lora(lora),
          lanes(lanes),
          rows_per_lane(rows / lanes.n),
          n_out(n_out),
          u_stride(lanes.tangents ? 2 * lora.rank : lora.rank),
          groups(lanes.n * lanes.n_parts * (int64_t)sizeof(SeedGroup)),
          u_buffer(rows * u_stride * 4),
          n_groups(group_lanes(lanes, (SeedGroup*)groups.data)) {
        const int64_t rank_blocks = ceil_div(lora.rank, kRankBlock);
        parallel_for(n_groups * rank_blocks, [&](int64_t task) {
            project_down(x, rows_per_lane, n_in, lora, lanes, group(task / rank_blocks),
                         task % rank_blocks * kRankBlock, u(), u_stride);
        });
        for (int64_t i = rows_per_lane; lanes.tangents && i < rows; ++i)
            __builtin_memcpy(u() + i * u_stride + lora.rank, u() + i % rows_per_lane * u_stride,
                             4 * lora.rank);
    }

    const SeedGroup& group(int64_t i) const { return ((const SeedGroup*)groups.data)[i]; }
    float* u() const { return (float*)u_buffer.data; }

    void add(int64_t out0, int64_t n, float* y) const {
        for (int64_t i = 0; i < n_groups; ++i)
            for (int64_t j = 0; j < n; j += kLoraOutputs)
                project_up(u(), u_stride, rows_per_lane, n_out, lora, lanes, group(i), out0 + j,
                           min_of(kLoraOutputs, n - j), y);
    }
};

// y += LoRA, of a product that was computed elsewhere.
void add_lora(const float* x, int64_t rows, int64_t n_in, int64_t n_out, const LoRA& lora,
              const Lanes& lanes, float* y) {
    const LoraTerm term(x, rows, n_in, n_out, lora, lanes);
    parallel_for(ceil_div(n_out, kLoraOutputs), [&](int64_t task) {
        const int64_t out0 = task * kLoraOutputs;
        term.add(out0, min_of(kLoraOutputs, n_out - out0), y);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
