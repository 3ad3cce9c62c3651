// Seeded LoRA: y_l += scale (x_l A_l^T) B_l^T for every lane l, where A_l = A + c_l z(seed_l) and
// B_l likewise. z exists only as tiles in the L1 cache: each is generated once per seed, turned
// into the factor of each lane that shares the seed (+epsilon and -epsilon), used for all rows of
// those lanes and overwritten.

constexpr int kRankBlock = 4;  // ranks accumulated together: 4 rows x 4 ranks fill 16 registers
constexpr int64_t kLoraDepth = 256;   // columns of A per tile: 4 ranks x 256 = 4 KiB
constexpr int64_t kLoraOutputs = 64;  // outputs per tile of B

struct SeedGroup {  // consecutive lanes that share a seed
    int64_t first, count;
};

// Returns the number of groups written.
inline int64_t group_lanes(const Lanes& lanes, SeedGroup* groups) {
    int64_t n = 0;
    for (int64_t l = 0; l < lanes.n; ++l) {
        if (n > 0 && lanes.seeds[l] == lanes.seeds[l - 1])
            ++groups[n - 1].count;
        else
            groups[n++] = {l, 1};
    }
    return n;
}

inline bool perturbed(const Lanes& lanes, const SeedGroup& g) {
    for (int64_t l = g.first; l < g.first + g.count; ++l)
        if (lanes.coefficients[l] != 0) return true;
    return false;
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

// u [rows, rank] of the lanes of one group, for ranks rank0 .. rank0+kRankBlock.
inline void project_down(const float* x, int64_t rows_per_lane, int64_t n_in, const LoRA& lora,
                         const Lanes& lanes, const SeedGroup& group, int64_t rank0, float* u) {
    const int64_t ranks = min_of<int64_t>(kRankBlock, lora.rank - rank0);
    const int64_t row0 = group.first * rows_per_lane, rows = group.count * rows_per_lane;
    const bool seeded = perturbed(lanes, group);
    const int64_t sums_size = rows * kRankBlock * kWidth;
    float* sums = (float*)thread_scratch(4 * sums_size);
    __builtin_memset(sums, 0, 4 * sums_size);
    float z[kRankBlock][kLoraDepth], a[kRankBlock][kLoraDepth] = {};
    for (int64_t k0 = 0; k0 < n_in; k0 += kLoraDepth) {
        const int64_t k = min_of(kLoraDepth, n_in - k0);
        if (k < kLoraDepth) __builtin_memset(a, 0, sizeof a);
        for (int64_t r = 0; seeded && r < ranks; ++r)
            fill_random(lanes.distribution, lanes.seeds[group.first],
                        lora.offset + (rank0 + r) * n_in + k0, k, z[r]);
        for (int64_t l = 0; l < group.count; ++l) {
            const float c = lanes.coefficients[group.first + l];
            for (int64_t r = 0; r < ranks; ++r) {
                const float* plain = lora.a + (rank0 + r) * n_in + k0;
                if (c == 0)
                    __builtin_memcpy(a[r], plain, 4 * k);
                else
                    for (int64_t i = 0; i < k; ++i) a[r][i] = plain[i] + c * z[r][i];
            }
            const float* from = x + (row0 + l * rows_per_lane) * n_in + k0;
            float* to = sums + l * rows_per_lane * kRankBlock * kWidth;
            int64_t i = 0;
            for (; i + 4 <= rows_per_lane; i += 4)
                multiply_a<4>(from + i * n_in, n_in, a[0], k, to + i * kRankBlock * kWidth);
            for (; i < rows_per_lane; ++i)
                multiply_a<1>(from + i * n_in, n_in, a[0], k, to + i * kRankBlock * kWidth);
        }
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < ranks; ++r)
            u[(row0 + i) * lora.rank + rank0 + r] = sum(load(sums + (i * kRankBlock + r) * kWidth));
}

// y [kBlock rows, n] += u b; b [rank][kLoraOutputs], of which kLoraOutputs may be read.
template <int kBlock>
inline void multiply_b(const float* u, int64_t rank, const float* b, float* y, int64_t y_stride,
                       int64_t n) {
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
                    acc[i][v] = fmadd(splat(u[i * rank + r]), factor[v], acc[i][v]);
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

// y[rows, out0 .. out0+n] += scale u B^T for the lanes of one group; n <= kLoraOutputs.
inline void project_up(const float* u, int64_t rows_per_lane, int64_t n_in, int64_t n_out,
                       const LoRA& lora, const Lanes& lanes, const SeedGroup& group, int64_t out0,
                       int64_t n, float* y) {
    const int64_t rank = lora.rank;
    float* z = (float*)thread_scratch(4 * 2 * kLoraOutputs * rank);  // [n][rank]
    float* b = z + kLoraOutputs * rank;                              // [rank][kLoraOutputs]
    if (perturbed(lanes, group))
        fill_random(lanes.distribution, lanes.seeds[group.first],
                    lora.offset + (uint64_t)(rank * (n_in + out0)), n * rank, z);
    __builtin_memset(b, 0, 4 * kLoraOutputs * rank);
    for (int64_t l = group.first; l < group.first + group.count; ++l) {
        const float c = lanes.coefficients[l];
        const float* plain = lora.b + out0 * rank;
        for (int64_t j = 0; j < n; ++j)
            for (int64_t r = 0; r < rank; ++r) {
                const int64_t at = j * rank + r;
                b[r * kLoraOutputs + j] = lora.scale * (c == 0 ? plain[at] : plain[at] + c * z[at]);
            }
        const int64_t end = (l + 1) * rows_per_lane;
        int64_t i = l * rows_per_lane;
        for (; i + 4 <= end; i += 4)
            multiply_b<4>(u + i * rank, rank, b, y + i * n_out + out0, n_out, n);
        for (; i < end; ++i) multiply_b<1>(u + i * rank, rank, b, y + i * n_out + out0, n_out, n);
    }
}

// The LoRA term of a product: made with u = x A^T of every lane, it adds u B^T to any range of
// outputs. The matmul does that to outputs it has just written, while they are in the cache.
struct LoraTerm {
    const LoRA& lora;
    const Lanes& lanes;
    int64_t rows, n_in, n_out;
    Buffer groups, u;
    int64_t n_groups;

    LoraTerm(const float* x, int64_t rows, int64_t n_in, int64_t n_out, const LoRA& lora,
             const Lanes& lanes)
        : lora(lora),
          lanes(lanes),
          rows(rows),
          n_in(n_in),
          n_out(n_out),
          groups(lanes.n * (int64_t)sizeof(SeedGroup)),
          u(rows * lora.rank * 4),
          n_groups(group_lanes(lanes, (SeedGroup*)groups.data)) {
        const int64_t rank_blocks = ceil_div(lora.rank, kRankBlock);
        parallel_for(n_groups * rank_blocks, [&](int64_t task) {
            project_down(x, rows / lanes.n, n_in, lora, lanes, group(task / rank_blocks),
                         task % rank_blocks * kRankBlock, (float*)u.data);
        });
    }

    const SeedGroup& group(int64_t i) const { return ((const SeedGroup*)groups.data)[i]; }

    void add(int64_t out0, int64_t n, float* y) const {
        for (int64_t i = 0; i < n_groups; ++i)
            for (int64_t j = 0; j < n; j += kLoraOutputs)
                project_up((const float*)u.data, rows / lanes.n, n_in, n_out, lora, lanes, group(i),
                           out0 + j, min_of(kLoraOutputs, n - j), y);
    }
};
