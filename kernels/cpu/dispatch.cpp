#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fwdllm {

#if defined(__x86_64__)
namespace avx512 {
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

struct Candidate {
    const Kernels* table;
    bool supported;
};

const Kernels& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
    const Candidate candidates[] = {
        {&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&portable::table, true}};
#else
    const Candidate candidates[] = {{&portable::table, true}};
#endif
    const char* wanted = std::getenv("FWDLLM_ISA");
    std::string names;
    for (const Candidate& c : candidates) {
        if (!c.supported) continue;
        if (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, c.table->name) == 0)
            return *c.table;
        names += names.empty() ? c.table->name : std::string(", ") + c.table->name;
    }
    throw std::runtime_error(std::string("FWDLLM_ISA is ") + wanted + "; this machine has " +
                             names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace fwdllm
