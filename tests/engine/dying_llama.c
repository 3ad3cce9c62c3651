// Preloaded, it makes llama.cpp end the process that computes with it, as FWDLLM_TEST_LLAMA says:
// "extra" by a signal once weights are in a buffer of an extra type (as GCC's AMX kernels do),
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

void* ggml_backend_alloc_ctx_tensors_from_buft(void* context, void* type) {
    const char* (*name)(void*) = real("ggml_backend_buft_name");
    // Not "CPU", nor "CPU_Mapped", which adapters take over from a mapped weight.
    if (strcmp(name(type), "CPU_REPACK") == 0 || strcmp(name(type), "AMX") == 0) extra_buffers = 1;
    void* (*next)(void*, void*) = real("ggml_backend_alloc_ctx_tensors_from_buft");
    return next(context, type);
}

int ggml_backend_sched_graph_compute_async(void* scheduler, void* graph) {
    if (is("always") || (is("extra") && extra_buffers)) raise(SIGSEGV);
    if (is("abort")) abort();
    while (is("hang")) pause();
    int (*next)(void*, void*) = real("ggml_backend_sched_graph_compute_async");
    return next(scheduler, graph);
}
