// All kernels for one instruction set. CMake compiles this file once per set, with its flags and
// FWDLLM_ISA naming it: the headers put everything into that namespace, unnamed within it, and it
// is reached through one table.
//
// The headers use no templates of the standard library: the linker could keep the AVX-512 copy of
// a shared inline function for every instruction set.
#include "attention.h"
#include "attention_vjp.h"
#include "cross_entropy.h"
#include "cross_entropy_vjp.h"
#include "decode.h"
#include "dispatch.h"
#include "layers.h"
#include "lora.h"
#include "matmul.h"
#include "matmul_vjp.h"
#include "peak.h"
#include "random.h"
#include "relative.h"

#define FWDLLM_TEXT_(x) #x
#define FWDLLM_TEXT(x) FWDLLM_TEXT_(x)

namespace fwdllm::FWDLLM_ISA {

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
                       matmul_vjp,
                       lora_vjp,
                       cross_entropy_vjp,
                       rms_norm,
                       layer_norm,
                       rope,
                       gated<silu>,
                       gated<tanh_gelu>,
                       gelu,
                       attention,
                       rms_norm_vjp,
                       layer_norm_vjp,
                       gated_vjp<silu>,
                       gated_vjp<tanh_gelu>,
                       gelu_vjp,
                       attention_vjp,
                       peak};

}  // namespace fwdllm::FWDLLM_ISA
