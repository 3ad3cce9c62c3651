// A small persistent thread pool. FWDLLM_NUM_THREADS sets its size; the default is all cores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwdllm {

int num_threads();
void set_num_threads(int n);

using TaskFn = void (*)(void* context, int64_t task);

// Runs fn(context, 0 .. n_tasks-1) once each on the pool and the calling thread; returns when all
// are done, or throws what one of them threw. Which thread runs a task is not fixed, so its result
// may depend on its number only.
void run_tasks(int64_t n_tasks, TaskFn fn, void* context);

// A 64-byte aligned buffer of the calling thread; its content is lost at the next call.
void* thread_scratch(size_t bytes);

// 64-byte aligned memory; throws std::bad_alloc.
void* allocate(int64_t bytes);
void release(void* data);

// Size of a core's L2 cache, or a common 512 KiB where the system does not tell.
int64_t l2_bytes();

}  // namespace fwdllm
