#include "dispatch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
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

// The tables this machine can run, mostly best first.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(FWDLLM_AMX)
    if (has_amx()) found.push_back(&amx::table);
#endif
    if (has_avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512_vnni::table);
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

const Kernels& find(const std::string& wanted) {
    std::string names;
    for (const Kernels* table : supported()) {
        if (wanted == table->name) return *table;
        names += std::string(names.empty() ? "" : ", ") + table->name;
    }
    throw std::runtime_error("FWDLLM_ISA is " + wanted + "; this machine has " + names);
}

const Kernels*& chosen() {
    static const Kernels* table = [] {
        const char* wanted = std::getenv("FWDLLM_ISA");
        return wanted == nullptr || *wanted == 0 ? supported()[0] : &find(wanted);
    }();
    return table;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

void use_isa(const std::string& name) { chosen() = &find(name); }

std::vector<double> product_seconds(const std::vector<std::string>& names) {
    constexpr int64_t n = 1024, rows = 128, row_bytes = n / 32 * 18;
    constexpr int rounds = 5;  // and one before, which reads what it needs for the first time
    const std::vector<uint8_t> blocks(n * row_bytes);
    const std::vector<float> x(rows * n, 1.0f);
    std::vector<float> y(rows * n);
    const Weight w{blocks.data(), Q4_0, n, n, row_bytes};
    std::vector<double> best(names.size(), HUGE_VAL);
    for (int round = 0; round <= rounds; ++round) {
        for (size_t i = 0; i < names.size(); ++i) {
            const auto began = std::chrono::steady_clock::now();
            find(names[i]).matmul(x.data(), rows, nullptr, w, nullptr, nullptr, Lanes{}, false,
                                  y.data());
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
            if (round > 0) best[i] = std::min(best[i], took.count());
        }
    }
    return best;
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const Kernels* table : supported()) names.emplace_back(table->name);
    return names;
}

}  // namespace fwdllm
