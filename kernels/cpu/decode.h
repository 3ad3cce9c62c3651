// GGUF weight blocks (ggml-common.h, block_q4_0 and on) as groups of 32 codes: within a group
// w[i] = scale[s] * (code[i] - offset) + min[s], s = i / (32 / scales), codes unsigned.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

struct Group {
    uint8_t code[32];
    float scale[2];
    float min[2];
};

inline float half_to_float(const uint8_t* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    return (float)__builtin_bit_cast(__fp16, h);
#else
    // The multiplication brings subnormals and normals alike into place.
    uint32_t bits = (uint32_t)(h & 0x7FFF) << 13;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    __builtin_memcpy(&bits, &f, 4);
    if ((h & 0x7C00) == 0x7C00) bits |= 0x7F800000u;
    bits |= (uint32_t)(h & 0x8000) << 16;
    __builtin_memcpy(&f, &bits, 4);
    return f;
#endif
}

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

inline Bytes16 load_bytes(const uint8_t* p) {
    Bytes16 v;
    __builtin_memcpy(&v, p, 16);
    return v;
}
inline void store_bytes(uint8_t* p, Bytes16 v) { __builtin_memcpy(p, &v, 16); }

// n is 16 or 32.
inline void low_nibbles(const uint8_t* q, uint8_t* code, int n) {
    for (int i = 0; i < n; i += 16) store_bytes(code + i, load_bytes(q + i) & 15);
}
inline void high_nibbles(const uint8_t* q, uint8_t* code, int n) {
    for (int i = 0; i < n; i += 16) store_bytes(code + i, load_bytes(q + i) >> 4);
}
// 32 fields of two bits, from bit `at` of each byte.
inline void pairs_of_bits(const uint8_t* q, int at, uint8_t* code) {
    for (int i = 0; i < 32; i += 16) store_bytes(code + i, (load_bytes(q + i) >> at) & 3);
}
// code |= (two or one bits of high, from bit `at`) << shift
inline void add_high_bits(const uint8_t* high, int at, int mask, int shift, uint8_t* code) {
    for (int i = 0; i < 32; i += 16) {
        const Bytes16 bits = (load_bytes(high + i) >> at) & (uint8_t)mask;
        store_bytes(code + i, load_bytes(code + i) | (bits << shift));
    }
}
// code[i] |= bit i of the four bytes of high, << 4
inline void add_fifth_bits(const uint8_t* high, uint8_t* code) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    uint32_t bits;
    __builtin_memcpy(&bits, high, 4);
    const __m256i fifth = _mm256_maskz_mov_epi8(bits, _mm256_set1_epi8(16));
    for (int i = 0; i < 32; i += 16) {
        const Bytes16 half =
            (Bytes16)(i == 0 ? _mm256_castsi256_si128(fifth) : _mm256_extracti128_si256(fifth, 1));
        store_bytes(code + i, load_bytes(code + i) | half);
    }
#else
    constexpr Bytes16 own = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < 32; i += 16, high += 2) {
        const uint64_t bytes[2] = {high[0] * 0x0101010101010101u, high[1] * 0x0101010101010101u};
        const Bytes16 bits = load_bytes((const uint8_t*)bytes) & own;
        store_bytes(code + i, load_bytes(code + i) | ((Bytes16)(bits != 0) & 16));
    }
#endif
}

// code[i] = table[code[i]], for codes up to 15.
inline void look_up(Bytes16 table, uint8_t* code) {
    for (int i = 0; i < 32; i += 16) {
#if defined(__SSSE3__)
        store_bytes(code + i,
                    (Bytes16)_mm_shuffle_epi8((__m128i)table, (__m128i)load_bytes(code + i)));
#elif defined(__aarch64__)
        store_bytes(code + i,
                    (Bytes16)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)load_bytes(code + i)));
#else
        for (int j = i; j < i + 16; ++j) code[j] = table[code[j]];
#endif
    }
}

// 128 more than the values of IQ4_NL and IQ4_XS, Lloyd-Max levels of weights.
constexpr Bytes16 kIQ4 = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
// 12 more than the values of MXFP4 times two: a sign, two bits of exponent, one of fraction.
constexpr Bytes16 kE2M1 = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// The 6-bit scale and min of sub-block j, packed in 12 bytes (get_scale_min_k4).
inline void scale_min_k4(const uint8_t* s, int j, int* scale, int* min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
        *min = (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
    }
}

struct CodecQ4_0 {
    static constexpr int offset = 8, scales = 1, top = 15;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 18;
        g->scale[0] = half_to_float(b);
        low_nibbles(b + 2, g->code, 16);
        high_nibbles(b + 2, g->code + 16, 16);
    }
};

struct CodecQ4_1 {
    static constexpr int offset = 0, scales = 1, top = 15;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 20;
        g->scale[0] = half_to_float(b);
        g->min[0] = half_to_float(b + 2);
        low_nibbles(b + 4, g->code, 16);
        high_nibbles(b + 4, g->code + 16, 16);
    }
};

struct CodecQ5_0 {
    static constexpr int offset = 16, scales = 1, top = 31;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 22;
        g->scale[0] = half_to_float(b);
        low_nibbles(b + 6, g->code, 16);
        high_nibbles(b + 6, g->code + 16, 16);
        add_fifth_bits(b + 2, g->code);
    }
};

struct CodecQ5_1 {
    static constexpr int offset = 0, scales = 1, top = 31;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 24;
        g->scale[0] = half_to_float(b);
        g->min[0] = half_to_float(b + 2);
        low_nibbles(b + 8, g->code, 16);
        high_nibbles(b + 8, g->code + 16, 16);
        add_fifth_bits(b + 4, g->code);
    }
};

struct CodecQ8_0 {
    static constexpr int offset = 128, scales = 1, top = 255;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 34;
        g->scale[0] = half_to_float(b);
        for (int j = 0; j < 32; j += 16) store_bytes(g->code + j, load_bytes(b + 2 + j) ^ 0x80);
    }
};

struct CodecQ2_K {
    static constexpr int offset = 0, scales = 2, top = 3;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 84;
        const int j = (int)(i % 8);
        for (int s = 0; s < 2; ++s) {
            g->scale[s] = half_to_float(b + 80) * (float)(b[2 * j + s] & 15);
            g->min[s] = -(half_to_float(b + 82) * (float)(b[2 * j + s] >> 4));
        }
        pairs_of_bits(b + 16 + j / 4 * 32, j % 4 * 2, g->code);
    }
};

struct CodecQ3_K {
    static constexpr int offset = 4, scales = 2, top = 7;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 110;
        const int j = (int)(i % 8);
        const float d = half_to_float(b + 108);
        for (int s = 0; s < 2; ++s) {
            const int k = 2 * j + s;  // of 16: nibbles of 8 bytes, then pairs of bits of 4
            const int low = b[96 + k % 8] >> (k / 8 * 4) & 15, top = b[104 + k % 4] >> (k / 4 * 2);
            g->scale[s] = d * (float)((low | (top & 3) << 4) - 32);
        }
        pairs_of_bits(b + 32 + j / 4 * 32, j % 4 * 2, g->code);
        add_high_bits(b, j, 1, 2, g->code);
    }
};

struct CodecQ4_K {
    static constexpr int offset = 0, scales = 1, top = 15;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 144;
        const int j = (int)(i % 8);
        int scale, min;
        scale_min_k4(b + 4, j, &scale, &min);
        g->scale[0] = half_to_float(b) * (float)scale;
        g->min[0] = -(half_to_float(b + 2) * (float)min);
        const uint8_t* q = b + 16 + j / 2 * 32;
        if (j % 2 == 0)
            low_nibbles(q, g->code, 32);
        else
            high_nibbles(q, g->code, 32);
    }
};

struct CodecQ5_K {
    static constexpr int offset = 0, scales = 1, top = 31;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 176;
        const int j = (int)(i % 8);
        int scale, min;
        scale_min_k4(b + 4, j, &scale, &min);
        g->scale[0] = half_to_float(b) * (float)scale;
        g->min[0] = -(half_to_float(b + 2) * (float)min);
        const uint8_t* high = b + 16;
        const uint8_t* q = b + 48 + j / 2 * 32;
        if (j % 2 == 0)
            low_nibbles(q, g->code, 32);
        else
            high_nibbles(q, g->code, 32);
        add_high_bits(high, j, 1, 4, g->code);
    }
};

struct CodecQ6_K {
    static constexpr int offset = 32, scales = 2, top = 63;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 210;
        const int half = (int)(i % 8) / 4, quarter = (int)(i % 4);
        const uint8_t* low = b + 64 * half + 32 * (quarter % 2);
        const uint8_t* high = b + 128 + 32 * half;
        const float d = half_to_float(b + 208);
        for (int s = 0; s < 2; ++s)
            g->scale[s] = d * (float)(int8_t)b[192 + 8 * half + 2 * quarter + s];
        if (quarter < 2)
            low_nibbles(low, g->code, 32);
        else
            high_nibbles(low, g->code, 32);
        add_high_bits(high, 2 * quarter, 3, 4, g->code);
    }
};

struct CodecIQ4_NL {
    static constexpr int offset = 128, scales = 1, top = 255;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 18;
        g->scale[0] = half_to_float(b);
        low_nibbles(b + 2, g->code, 16);
        high_nibbles(b + 2, g->code + 16, 16);
        look_up(kIQ4, g->code);
    }
};

struct CodecIQ4_XS {
    static constexpr int offset = 128, scales = 1, top = 255;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 136;
        const int j = (int)(i % 8);
        const int low = b[4 + j / 2] >> (j % 2 * 4) & 15, top = b[2 + j / 4] >> (j % 4 * 2) & 3;
        g->scale[0] = half_to_float(b) * (float)((low | top << 4) - 32);
        low_nibbles(b + 8 + j * 16, g->code, 16);
        high_nibbles(b + 8 + j * 16, g->code + 16, 16);
        look_up(kIQ4, g->code);
    }
};

struct CodecMXFP4 {
    static constexpr int offset = 12, scales = 1, top = 24;
    static constexpr bool has_min = false;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i * 17;
        // Half of 2^(b - 127), for the doubled values; the least two are subnormal.
        const uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : (uint32_t)(b[0] - 1) << 23;
        __builtin_memcpy(g->scale, &bits, 4);
        low_nibbles(b + 1, g->code, 16);
        high_nibbles(b + 1, g->code + 16, 16);
        look_up(kE2M1, g->code);
    }
};

// Calls f with the codec of a quantized type; F32, F16 and BF16 have none and return false.
template <typename F>
inline bool with_codec(int type, const F& f) {
    switch (type) {
        case Q4_0:
            f(CodecQ4_0{});
            return true;
        case Q4_1:
            f(CodecQ4_1{});
            return true;
        case Q5_0:
            f(CodecQ5_0{});
            return true;
        case Q5_1:
            f(CodecQ5_1{});
            return true;
        case Q8_0:
            f(CodecQ8_0{});
            return true;
        case Q2_K:
            f(CodecQ2_K{});
            return true;
        case Q3_K:
            f(CodecQ3_K{});
            return true;
        case Q4_K:
            f(CodecQ4_K{});
            return true;
        case Q5_K:
            f(CodecQ5_K{});
            return true;
        case Q6_K:
            f(CodecQ6_K{});
            return true;
        case IQ4_NL:
            f(CodecIQ4_NL{});
            return true;
        case IQ4_XS:
            f(CodecIQ4_XS{});
            return true;
        case MXFP4:
            f(CodecMXFP4{});
            return true;
        default:
            return false;
    }
}

// Elements first .. first+n of a row as floats; first is a multiple of 32 in a quantized row.
inline void decode_row(int type, const uint8_t* row, int64_t first, int64_t n, float* out) {
    const bool quantized = with_codec(type, [&](auto codec) {
        using C = decltype(codec);
        Group g;
        for (int64_t i = 0; i < n; i += 32) {
            C::group(row, (first + i) / 32, &g);
            for (int j = 0; j < 32; ++j) {
                const int s = j * C::scales / 32;
                const float w = g.scale[s] * (float)(g.code[j] - C::offset);
                out[i + j] = C::has_min ? w + g.min[s] : w;
            }
        }
    });
    if (quantized) return;
    if (type == F32) {
        __builtin_memcpy(out, row + 4 * first, 4 * n);
    } else if (type == F16) {
        for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(row + 2 * (first + i));
    } else {  // BF16
        for (int64_t i = 0; i < n; ++i) {
            uint16_t h;
            __builtin_memcpy(&h, row + 2 * (first + i), 2);
            const uint32_t bits = (uint32_t)h << 16;
            __builtin_memcpy(out + i, &bits, 4);
        }
    }
}

// out[i] = row ids[i] of w, decoded.
void gather(const Weight& w, const int32_t* ids, int64_t rows, float* out) {
    parallel_for(rows, [&](int64_t i) {
        decode_row(w.type, w.data + ids[i] * w.row_bytes, 0, w.n_in, out + i * w.n_in);
    });
}

}  // namespace
}  // namespace fwdllm::FWDLLM_ISA
