// The micro-kernel of the int8 route: dot products of bytes per group of 32, scaled and summed in
// fp32, group after group. The instruction sets differ in dot_quads only.

// sum + the dot product of 4 unsigned codes and 4 signed activations, for kWidth outputs. kSigned:
// the codes are signed.
template <bool kSigned>
inline VI dot_quads(VI sum, VI codes, VI x) {
#if defined(__AVX512VNNI__)
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (VI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i w = (__m256i)codes, a = (__m256i)x;
    const __m256i pairs = kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
                                  : _mm256_maddubs_epi16(w, a);
    return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
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

// c [kRows][kInt8Outputs] = tile . panel^T over all groups.
template <typename Codec>
inline void multiply_int8(const TileGroup<Codec>* tile, const PanelGroup<Codec>* panel,
                          int64_t groups, float* c) {
    constexpr int quads = 8 / Codec::scales;
    for (int out = 0; out < kInt8Outputs; out += kWidth) {
        VF acc[kRows] = {};
        for (int64_t g = 0; g < groups; ++g) {
            const TileGroup<Codec>& t = tile[g];
            const PanelGroup<Codec>& p = panel[g];
#pragma GCC unroll 2
            for (int s = 0; s < Codec::scales; ++s) {
                VI dot[kRows];
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r)
                    dot[r] = Codec::has_min ? VI{} : VI{} + t.start[s][r];
#pragma GCC unroll 8
                for (int i = s * quads; i < (s + 1) * quads; ++i) {
                    const VI codes = as_int(load((const float*)p.code[i][out]));
#pragma GCC unroll 12
                    for (int r = 0; r < kRows; ++r) {
                        int32_t x;
                        __builtin_memcpy(&x, t.x[i][r], 4);
                        dot[r] = dot_quads<signed_codes<Codec>()>(dot[r], codes, VI{} + x);
                    }
                }
                const VF scale = load(p.scale[s] + out);
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r)
                    acc[r] = fmadd(to_float(dot[r]), scale * splat(t.scale[r]), acc[r]);
            }
            if (Codec::has_min) {
                const VF min = load(p.min + out);
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r) acc[r] = fmadd(min, splat(t.sum[r]), acc[r]);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) store(c + r * kInt8Outputs + out, acc[r]);
    }
}
