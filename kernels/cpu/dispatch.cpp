#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fwdllm {

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
#endif
namespace portable {
extern const Kernels table;
}

namespace {

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
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::table);
    if (has_avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2_vnni::table);
    if (has_avx2) found.push_back(&avx2::table);
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
