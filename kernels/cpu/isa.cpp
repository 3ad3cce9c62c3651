// All kernels for one instruction set. CMake compiles this file once per set, with its flags and
// FWDLLM_ISA naming it; everything lives in that namespace and is reached through one table.
#include <time.h>

#include <cstdint>

#include "dispatch.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FWDLLM_TEXT_(x) #x
#define FWDLLM_TEXT(x) FWDLLM_TEXT_(x)

namespace fwdllm::FWDLLM_ISA {
namespace {

#include "simd.h"
//
#include "random.h"
//
#include "decode.h"
//
#include "pack.h"
//
#include "dense.h"
//
#include "int8_pack.h"
//
#include "int8_dot.h"
//
#include "int8.h"
//
#include "lora.h"
//
#include "matmul.h"
//
#include "layers.h"
//
#include "relative.h"
//
#include "attention.h"
//
#include "peak.h"

}  // namespace

extern const Kernels table;
const Kernels table = {FWDLLM_TEXT(FWDLLM_ISA),
                       philox,
                       random_values,
                       seeded_axpy,
                       seeded_dot,
                       gather,
                       matmul,
                       add_lora,
                       to_relative,
                       from_relative,
                       cross_entropy,
                       rms_norm,
                       layer_norm,
                       rope,
                       swiglu,
                       gelu,
                       attention,
                       peak};

}  // namespace fwdllm::FWDLLM_ISA
