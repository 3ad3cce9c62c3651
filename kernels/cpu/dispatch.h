// The operations of one instruction set as a table of functions, and the choice among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fwdllm {

// Numbers of ggml's ggml_type, as they stand in GGUF files.
enum QuantType : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39
};

enum Distribution : int { kNormal = 0, kRademacher = 1 };

enum Peak : int { kPeakInt8, kPeakBf16, kPeakFp32, kPeakRead };

struct Weight {  // W [n_out, n_in], rows of row_bytes in GGUF blocks
    const uint8_t* data;
    int type;
    int64_t n_out, n_in;
    size_t row_bytes;
};

// How the stream of a seed becomes the direction of a factor, seen as [rank][width]: its own
// numbers from offset on, times mask if there is one; or, with a basis [n_basis][width], the
// combinations of it that n_basis numbers for each rank say. B is [width][rank] in memory, and so
// is its mask.
struct FactorDirection {
    uint64_t offset;
    const float* mask;
    bool in_subspace;
    const float* basis;
    int64_t n_basis;
};

struct LoRA {  // y += scale (x A^T) B^T
    const float* a;
    const float* b;
    float scale;
    int64_t rank;
    FactorDirection direction_a, direction_b;
};

// Rows of lane l are the l-th of n equal slices; seeds [n][n_parts], of parts starts[p] ..
// starts[p + 1] of a lane's rows. tangents: lanes from 1 on are derivatives of lane 0.
struct Lanes {
    const uint64_t* seeds;
    const float* coefficients;
    int64_t n;
    int distribution;
    bool tangents;
    const int32_t* starts;
    int64_t n_parts;

    int64_t n_tangents() const { return tangents ? n - 1 : 0; }
};

// references: for every row the earlier row (or itself) it is quantized relative to, or null.
// tangents: rows are 1 + tangents equal slices, a primal and its derivatives; so is the result.
// window: a row sees those less than so many rows away; 0 is all. softcap: c makes c tanh(s / c) of
// a score or logit s; 0 is none.
struct Kernels {
    const char* name;
    void (*philox)(uint64_t seed, uint64_t start, int64_t count, uint32_t* out);
    void (*random_values)(int distribution, uint64_t seed, uint64_t start, int64_t count,
                          float* out);
    void (*seeded_axpy)(float* theta, int64_t n, const uint64_t* seeds, const float* coefficients,
                        int64_t k, uint64_t offset, int distribution);
    void (*seeded_dot)(const float* g, int64_t n, const uint64_t* seeds, int64_t k, uint64_t offset,
                       int distribution, double* out);
    void (*gather)(const Weight& w, const int32_t* ids, int64_t rows, float* out);
    void (*matmul)(const float* x, int64_t rows, const int32_t* references, const Weight& w,
                   const float* bias, const LoRA* lora, const Lanes& lanes, bool exact, float* y);
    void (*add_lora)(const float* x, int64_t rows, int64_t n_in, int64_t n_out, const LoRA& lora,
                     const Lanes& lanes, float* y);
    void (*to_relative)(float* x, int64_t rows, int64_t d, const int32_t* references,
                        float* scales);
    void (*from_relative)(float* y, int64_t rows, int64_t d, const int32_t* references,
                          const float* scales);
    void (*cross_entropy)(const float* x, int64_t rows, const int32_t* references, int64_t tangents,
                          const Weight& w, const int32_t* labels, float softcap, bool exact,
                          double* nll);
    void (*matmul_vjp)(const float* dy, int64_t rows, const Weight& w, const LoRA* lora, bool exact,
                       float* dx);
    void (*lora_vjp)(const float* x, const float* dy, int64_t rows, int64_t n_in, int64_t n_out,
                     const LoRA& lora, float* da, float* db);
    void (*cross_entropy_vjp)(const float* x, int64_t rows, const Weight& w, const int32_t* labels,
                              float softcap, bool exact, double* nll, float* dx);
    void (*rms_norm)(const float* x, int64_t rows, int64_t d, const float* weight, float eps,
                     int64_t tangents, float* y);
    void (*layer_norm)(const float* x, int64_t rows, int64_t d, const float* weight,
                       const float* bias, float eps, int64_t tangents, float* y);
    void (*rope)(const float* x, int64_t rows, int64_t width, int64_t head_dim, int64_t half,
                 const int32_t* positions, const float* cos, const float* sin, bool interleaved,
                 float* y);
    void (*swiglu)(const float* gate, const float* up, int64_t n, int64_t tangents, float* y);
    void (*geglu)(const float* gate, const float* up, int64_t n, int64_t tangents, float* y);
    void (*gelu)(const float* x, int64_t n, int64_t tangents, float* y);
    void (*attention)(const float* q, const float* k, const float* v, const int32_t* starts,
                      int64_t n_seq, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                      float scale, bool causal, int64_t window, float softcap, int64_t tangents,
                      float* y);
    void (*rms_norm_vjp)(const float* x, const float* dy, int64_t rows, int64_t d,
                         const float* weight, float eps, float* dx);
    void (*layer_norm_vjp)(const float* x, const float* dy, int64_t rows, int64_t d,
                           const float* weight, float eps, float* dx);
    void (*swiglu_vjp)(const float* gate, const float* up, const float* dy, int64_t n, float* dgate,
                       float* dup);
    void (*geglu_vjp)(const float* gate, const float* up, const float* dy, int64_t n, float* dgate,
                      float* dup);
    void (*gelu_vjp)(const float* x, const float* dy, int64_t n, float* dx);
    void (*attention_vjp)(const float* q, const float* k, const float* v, const float* dy,
                          const int32_t* starts, int64_t n_seq, int64_t n_heads, int64_t n_kv_heads,
                          int64_t head_dim, float scale, bool causal, int64_t window, float softcap,
                          float* dq, float* dk, float* dv);
    double (*peak)(Peak kind);
};

// The table in use: of the instruction set that FWDLLM_ISA names, or else of the first.
// Throws std::runtime_error if FWDLLM_ISA names one that is unknown or not supported here.
const Kernels& kernels();

// Uses another from here on. Throws as kernels() does.
void use_isa(const std::string& name);

// Names of the instruction sets this machine can run, mostly best first.
std::vector<std::string> isa_names();

// Seconds of a product as large as those of a small model, by each of some instruction sets: the
// shortest of several, in turn.
std::vector<double> product_seconds(const std::vector<std::string>& names);

}  // namespace fwdllm
