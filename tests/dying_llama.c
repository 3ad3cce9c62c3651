// Preloaded, it makes llama.cpp end the process that computes with it, as FWDLLM_TEST_LLAMA says:
// "extra" by a signal once a model was opened with extra buffer types (as GCC's AMX kernels do),
// "always" by a signal, "abort" by abort(), "hang" by never coming back. It stands before ggml's own
// functions, which libllama calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int extra_buffers;

static int is(const char* mode) {
    const char* wanted = getenv("FWDLLM_TEST_LLAMA");
    return wanted != NULL && strcmp(wanted, mode) == 0;
}

static void* real(const char* name) {
    return dlsym(dlopen("libggml-base.so.0", RTLD_LAZY | RTLD_NOLOAD), name);
}

void* ggml_backend_reg_get_proc_address(void* registry, const char* name) {
    if (strcmp(name, "ggml_backend_dev_get_extra_bufts") == 0) extra_buffers = 1;
    void* (*next)(void*, const char*) = real("ggml_backend_reg_get_proc_address");
    return next(registry, name);
}

int ggml_backend_sched_graph_compute_async(void* scheduler, void* graph) {
    if (is("always") || (is("extra") && extra_buffers)) raise(SIGSEGV);
    if (is("abort")) abort();
    while (is("hang")) pause();
    int (*next)(void*, void*) = real("ggml_backend_sched_graph_compute_async");
    return next(scheduler, graph);
}
