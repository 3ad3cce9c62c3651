// The inner kernels of the quantized matmul: a tile of kRows activations against a panel of
// outputs, over all of K. Activations are packed once per call, weight panels are decoded once
// and used for every tile. A row's result depends on that row and the weights only, and its
// reduction order is fixed: that is batch invariance.

// fp32 route: kRows x kF32Outputs accumulators fill the registers but for the operands:
// 12 x 2 of 32 zmm, 6 x 2 of 16 ymm, 4 x 2 of 16 xmm (32 on NEON).
constexpr int kRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : 4;
constexpr int kF32Outputs = 2 * kWidth;
constexpr int kInt8Outputs = 16;  // 4 bytes of each fill one zmm

// x [rows, k] -> tiles [k][kRows], zero rows at the end.
inline void pack_tile_f32(const float* x, int64_t rows, int64_t k, float* out) {
    for (int r = 0; r < kRows; ++r)
        for (int64_t i = 0; i < k; ++i) out[i * kRows + r] = r < rows ? x[r * k + i] : 0.0f;
}

// W rows [n, first .. first+k] -> panel [k][kF32Outputs], zero outputs at the end.
inline void pack_panel_f32(const Weight& w, int64_t out0, int64_t n, int64_t first, int64_t k,
                           float* panel) {
    float row[256];  // whole groups of every type
    for (int j = 0; j < kF32Outputs; ++j) {
        for (int64_t i = 0; i < k; i += 256) {
            const int64_t m = min_of<int64_t>(256, k - i);
            if (j < n)
                decode_row(w.type, w.data + (out0 + j) * w.row_bytes, first + i, m, row);
            else
                __builtin_memset(row, 0, sizeof row);
            for (int64_t l = 0; l < m; ++l) panel[(i + l) * kF32Outputs + j] = row[l];
        }
    }
}

// c [kRows][kF32Outputs] += tile . panel^T, one product after the other along k.
inline void multiply_f32(const float* tile, const float* panel, int64_t k, float* c) {
    VF acc[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        acc[r][0] = load(c + r * kF32Outputs);
        acc[r][1] = load(c + r * kF32Outputs + kWidth);
    }
    for (int64_t i = 0; i < k; ++i) {
        const VF w0 = load(panel + i * kF32Outputs), w1 = load(panel + i * kF32Outputs + kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const VF x = splat(tile[i * kRows + r]);
            acc[r][0] = fmadd(x, w0, acc[r][0]);
            acc[r][1] = fmadd(x, w1, acc[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        store(c + r * kF32Outputs, acc[r][0]);
        store(c + r * kF32Outputs + kWidth, acc[r][1]);
    }
}

// int8 route. Without VNNI the products of bytes are summed in pairs in 16 bits, which holds
// codes up to 63 but not Q8_0's 255: those stay signed and go through |w| * (x sign(w)).
#if defined(__AVX512VNNI__)
constexpr bool kSignedQ8 = false;
#else
constexpr bool kSignedQ8 = true;
#endif

template <typename Codec>
constexpr bool signed_codes() {
    return kSignedQ8 && Codec::offset == 128;
}

// A packed group of 32 activations of kRows rows: bytes [8][kRows][4], the scale of each row,
// and per weight scale a correction of each row: the start of the integer sum, -offset * sum(x),
// or for types with a min the float scale * sum(x).
template <typename Codec>
struct TileGroup {
    int8_t x[8][kRows][4];
    float scale[kRows];
    union {
        int32_t start[Codec::scales][kRows];
        float sum[kRows];
    };
};

// A packed group of 32 weights of 16 outputs: codes [8][16][4].
template <typename Codec>
struct PanelGroup {
    uint8_t code[8][kInt8Outputs][4];
    float scale[Codec::scales][kInt8Outputs];
    float min[Codec::has_min ? kInt8Outputs : 1];
};

inline bool is_difference(const int32_t* references, int64_t row) {
    return references != nullptr && references[row] != row;
}

// 32 activations as round(x / scale), scale = max|x| / 127; a non-finite x makes scale NaN.
inline float quantize_group(const float* x, int8_t* q) {
    uint32_t top = 0;
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        top = max_of(top, bits & 0x7FFFFFFFu);
    }
    float largest;
    __builtin_memcpy(&largest, &top, 4);
    const bool finite = top < 0x7F800000u;
    const float inverse = finite && largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < 32; ++i) {
        const float shifted = (finite ? x[i] : 0.0f) * inverse + 12582912.0f;  // rounds to even
        int32_t bits;
        __builtin_memcpy(&bits, &shifted, 4);
        q[i] = (int8_t)(bits - 0x4B400000);
    }
    return finite ? largest / 127.0f : __builtin_nanf("");
}

// Rows row0 .. row0+rows of x [., k]; a row with an earlier reference row is packed as its
// difference to that one, with the difference's own scale.
template <typename Codec>
inline void pack_tile_int8(const float* x, int64_t row0, int64_t rows, const int32_t* references,
                           int64_t k, TileGroup<Codec>* out) {
    constexpr int n_per_scale = 32 / Codec::scales;
    for (int64_t g = 0; g < k / 32; ++g) {
        TileGroup<Codec>& t = out[g];
        for (int r = 0; r < kRows; ++r) {
            int8_t q[32] = {};
            float values[32] = {};
            if (r < rows) {
                const float* row = x + (row0 + r) * k + g * 32;
                __builtin_memcpy(values, row, sizeof values);
                if (is_difference(references, row0 + r)) {
                    const float* base = x + references[row0 + r] * k + g * 32;
                    for (int i = 0; i < 32; ++i) values[i] -= base[i];
                }
            }
            t.scale[r] = quantize_group(values, q);
            for (int i = 0; i < 8; ++i) __builtin_memcpy(t.x[i][r], q + 4 * i, 4);
            for (int s = 0; s < Codec::scales; ++s) {
                int32_t total = 0;
                for (int i = 0; i < n_per_scale; ++i) total += q[s * n_per_scale + i];
                if (Codec::has_min)
                    t.sum[r] = t.scale[r] * (float)total;
                else
                    t.start[s][r] = signed_codes<Codec>() ? 0 : -Codec::offset * total;
            }
        }
    }
}

template <typename Codec>
inline void pack_panel_int8(const Weight& w, int64_t out0, int64_t n, PanelGroup<Codec>* panel) {
    Group g;
    for (int64_t i = 0; i < w.n_in / 32; ++i) {
        PanelGroup<Codec>& p = panel[i];
        for (int j = 0; j < kInt8Outputs; ++j) {
            if (j < n)
                Codec::group(w.data + (out0 + j) * w.row_bytes, i, &g);
            else
                g = Group{};
            if (signed_codes<Codec>())
                for (int l = 0; l < 32; ++l) g.code[l] ^= 0x80;
            for (int l = 0; l < 8; ++l) __builtin_memcpy(p.code[l][j], g.code + 4 * l, 4);
            for (int s = 0; s < Codec::scales; ++s) p.scale[s][j] = g.scale[s];
            if (Codec::has_min) p.min[j] = g.min;
        }
    }
}

#if defined(__AVX512VNNI__)

template <typename Codec>
inline void multiply_int8(const TileGroup<Codec>* tile, const PanelGroup<Codec>* panel,
                          int64_t groups, float* c) {
    constexpr int quads = 8 / Codec::scales;
    __m512 acc[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
        const TileGroup<Codec>& t = tile[g];
        const PanelGroup<Codec>& p = panel[g];
#pragma GCC unroll 2
        for (int s = 0; s < Codec::scales; ++s) {
            __m512i dot[kRows];
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
                dot[r] = Codec::has_min ? _mm512_setzero_si512() : _mm512_set1_epi32(t.start[s][r]);
#pragma GCC unroll 8
            for (int i = s * quads; i < (s + 1) * quads; ++i) {
                const __m512i codes = _mm512_loadu_si512(p.code[i]);
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r) {
                    int32_t x;
                    __builtin_memcpy(&x, t.x[i][r], 4);
                    dot[r] = _mm512_dpbusd_epi32(dot[r], codes, _mm512_set1_epi32(x));
                }
            }
            const __m512 scale = _mm512_loadu_ps(p.scale[s]);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]),
                                         _mm512_mul_ps(scale, _mm512_set1_ps(t.scale[r])), acc[r]);
        }
        if (Codec::has_min) {
            const __m512 min = _mm512_loadu_ps(p.min);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
                acc[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(t.sum[r]), acc[r]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(c + r * kInt8Outputs, acc[r]);
}

#elif defined(__AVX2__)

template <typename Codec>
inline __m256i dot_quads(__m256i sum, __m256i codes, __m256i x) {
    const __m256i pairs = signed_codes<Codec>() ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes),
                                                                       _mm256_sign_epi8(x, codes))
                                                : _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <typename Codec>
inline void multiply_int8(const TileGroup<Codec>* tile, const PanelGroup<Codec>* panel,
                          int64_t groups, float* c) {
    constexpr int quads = 8 / Codec::scales;
    for (int half = 0; half < 2; ++half) {
        __m256 acc[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) {
            const TileGroup<Codec>& t = tile[g];
            const PanelGroup<Codec>& p = panel[g];
            for (int s = 0; s < Codec::scales; ++s) {
                __m256i dot[kRows];
#pragma GCC unroll 6
                for (int r = 0; r < kRows; ++r)
                    dot[r] =
                        Codec::has_min ? _mm256_setzero_si256() : _mm256_set1_epi32(t.start[s][r]);
#pragma GCC unroll 8
                for (int i = s * quads; i < (s + 1) * quads; ++i) {
                    const __m256i codes = _mm256_loadu_si256((const __m256i*)p.code[i][8 * half]);
#pragma GCC unroll 6
                    for (int r = 0; r < kRows; ++r) {
                        int32_t x;
                        __builtin_memcpy(&x, t.x[i][r], 4);
                        dot[r] = dot_quads<Codec>(dot[r], codes, _mm256_set1_epi32(x));
                    }
                }
                const __m256 scale = _mm256_loadu_ps(p.scale[s] + 8 * half);
#pragma GCC unroll 6
                for (int r = 0; r < kRows; ++r)
                    acc[r] =
                        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]),
                                        _mm256_mul_ps(scale, _mm256_set1_ps(t.scale[r])), acc[r]);
            }
            if (Codec::has_min) {
                const __m256 min = _mm256_loadu_ps(p.min + 8 * half);
#pragma GCC unroll 6
                for (int r = 0; r < kRows; ++r)
                    acc[r] = _mm256_fmadd_ps(min, _mm256_set1_ps(t.sum[r]), acc[r]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(c + r * kInt8Outputs + 8 * half, acc[r]);
    }
}

#else

template <typename Codec>
inline void multiply_int8(const TileGroup<Codec>* tile, const PanelGroup<Codec>* panel,
                          int64_t groups, float* c) {
    constexpr int quads = 8 / Codec::scales;
    __builtin_memset(c, 0, sizeof(float) * kRows * kInt8Outputs);
    for (int64_t g = 0; g < groups; ++g) {
        const TileGroup<Codec>& t = tile[g];
        const PanelGroup<Codec>& p = panel[g];
        for (int r = 0; r < kRows; ++r) {
            float* row = c + r * kInt8Outputs;
            for (int s = 0; s < Codec::scales; ++s) {
                int32_t dot[kInt8Outputs];
                for (int j = 0; j < kInt8Outputs; ++j) dot[j] = Codec::has_min ? 0 : t.start[s][r];
                for (int i = s * quads; i < (s + 1) * quads; ++i)
                    for (int j = 0; j < kInt8Outputs; ++j)
                        for (int l = 0; l < 4; ++l) {
                            const int code =
                                signed_codes<Codec>() ? (int8_t)p.code[i][j][l] : p.code[i][j][l];
                            dot[j] += code * t.x[i][r][l];
                        }
                for (int j = 0; j < kInt8Outputs; ++j)
                    row[j] += (float)dot[j] * (p.scale[s][j] * t.scale[r]);
            }
            if (Codec::has_min)
                for (int j = 0; j < kInt8Outputs; ++j) row[j] += p.min[j] * t.sum[r];
        }
    }
}

#endif
