// GGUF weight blocks (ggml-common.h, block_q4_0 and on) as groups of 32 codes: within a group
// w[i] = scale[i / (32 / scales)] * (code[i] - offset) + min, codes unsigned.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "simd.h"

namespace fwdllm::FWDLLM_ISA {
namespace {

struct Group {
    uint8_t code[32];
    float scale[2];
    float min;
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
// code |= (two or one bits of high, from bit `at`) << 4
inline void add_high_bits(const uint8_t* high, int at, int mask, uint8_t* code) {
    for (int i = 0; i < 32; i += 16) {
        const Bytes16 bits = (load_bytes(high + i) >> at) & (uint8_t)mask;
        store_bytes(code + i, load_bytes(code + i) | (bits << 4));
    }
}

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
        g->min = half_to_float(b + 2);
        low_nibbles(b + 4, g->code, 16);
        high_nibbles(b + 4, g->code + 16, 16);
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

struct CodecQ4_K {
    static constexpr int offset = 0, scales = 1, top = 15;
    static constexpr bool has_min = true;
    static void group(const uint8_t* row, int64_t i, Group* g) {
        const uint8_t* b = row + i / 8 * 144;
        const int j = (int)(i % 8);
        int scale, min;
        scale_min_k4(b + 4, j, &scale, &min);
        g->scale[0] = half_to_float(b) * (float)scale;
        g->min = -(half_to_float(b + 2) * (float)min);
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
        g->min = -(half_to_float(b + 2) * (float)min);
        const uint8_t* high = b + 16;
        const uint8_t* q = b + 48 + j / 2 * 32;
        if (j % 2 == 0)
            low_nibbles(q, g->code, 32);
        else
            high_nibbles(q, g->code, 32);
        add_high_bits(high, j, 1, g->code);
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
        add_high_bits(high, 2 * quarter, 3, g->code);
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
        case Q8_0:
            f(CodecQ8_0{});
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
        default:
            return false;
    }
}

// Elements first .. first+n of a row as floats; first is a multiple of 32 in a quantized row.
inline void decode_row(int type, const uint8_t* row, int64_t first, int64_t n, float* out) {
    const bool quantized = with_codec(type, [&](auto codec) {
        using C = decltype(codec);
        Group g;
        g.min = 0;
        for (int64_t i = 0; i < n; i += 32) {
            C::group(row, (first + i) / 32, &g);
            for (int j = 0; j < 32; ++j) {
                const float w = g.scale[j * C::scales / 32] * (float)(g.code[j] - C::offset);
                out[i + j] = C::has_min ? w + g.min : w;
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
