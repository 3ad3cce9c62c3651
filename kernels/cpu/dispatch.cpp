#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(FWDLLM_AMX) && !defined(FWDLLM_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fwdllm {

#if defined(FWDLLM_AMX)
namespace amx {
extern const Kernels table;
}
#endif
#if defined(__x86_64__)
namespace avx512_vnni {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx2_vnni {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon_i8mm {
extern const Kernels table;
}
namespace neon_dotprod {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

#if defined(__aarch64__)
struct ArmFeatures {
    bool dot_product, int8_matrix;
};

ArmFeatures arm_features() {
#if defined(__linux__)
    // HWCAP_ASIMDDP and HWCAP2_I8MM of Linux's asm/hwcap.h, which older headers lack
    return {(getauxval(AT_HWCAP) & (1 << 20)) != 0, (getauxval(AT_HWCAP2) & (1 << 13)) != 0};
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#else
    return {};
#endif
}
#endif

#if defined(FWDLLM_EMULATE_AMX)
bool has_amx() { return true; }
#elif defined(FWDLLM_AMX)
// Whether the processor has tiles of bf16 and the system lets this process use them: it has to be
// asked once, before the first use (Linux 5.16, Documentation/arch/x86/xstate.rst).
bool has_amx() {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d & (1u << 22), tiles = d & (1u << 24);
    constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    return bf16 && tiles && syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}
#endif

// The tables this machine can run, best first.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512_vnni::table);
#if defined(FWDLLM_AMX)
    if (has_amx()) found.push_back(&amx::table);  // not first before its speed has been measured
#endif
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::table);
    if (has_avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2_vnni::table);
    if (has_avx2) found.push_back(&avx2::table);
#elif defined(__aarch64__)
    const ArmFeatures arm = arm_features();
    if (arm.dot_product && arm.int8_matrix) found.push_back(&neon_i8mm::table);
    if (arm.dot_product) found.push_back(&neon_dotprod::table);
#endif
    found.push_back(&portable::table);
    return found;
}

const Kernels& choose() {
    const char* wanted = std::getenv("FWDLLM_ISA");
    for (const Kernels* table : supported())
        if (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, table->name) == 0)
            return *table;
    std::string names;
    for (const Kernels* table : supported())
        names += std::string(names.empty() ? "" : ", ") + table->name;
    throw std::runtime_error(std::string("FWDLLM_ISA is ") + wanted + "; this machine has " +
                             names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const Kernels* table : supported()) names.emplace_back(table->name);
    return names;
}

}  // namespace fwdllm
