#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fwdllm {
namespace {

int default_threads() {
    if (const char* text = std::getenv("FWDLLM_NUM_THREADS")) {
        const int n = std::atoi(text);
        if (n > 0) return n;
    }
    const unsigned n = std::thread::hardware_concurrency();
    return n > 0 ? static_cast<int>(n) : 1;
}

class Pool {
  public:
    explicit Pool(int n_threads) : pid_(getpid()) {
        for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this] { work(); });
    }

    // Threads do not survive fork(): the child forgets them instead of joining.
    bool usable() const { return pid_ == getpid(); }
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void stop() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    void run(int64_t n_tasks, TaskFn fn, void* context) {
        {
            std::lock_guard lock(mutex_);
            fn_ = fn;
            context_ = context;
            n_tasks_ = n_tasks;
            next_.store(0);
            busy_ = static_cast<int>(workers_.size());
            error_ = nullptr;
            ++job_;
        }
        wake_.notify_all();
        take_tasks();
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void take_tasks() {
        try {
            for (int64_t i = next_++; i < n_tasks_; i = next_++) fn_(context_, i);
        } catch (...) {  // out of memory; the caller raises it
            next_.store(n_tasks_);
            std::lock_guard lock(mutex_);
            error_ = std::current_exception();
        }
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || job_ != seen; });
                if (stopping_) return;
                seen = job_;
            }
            take_tasks();
            std::lock_guard lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    const pid_t pid_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int64_t> next_{0};
    TaskFn fn_ = nullptr;
    void* context_ = nullptr;
    int64_t n_tasks_ = 0;
    uint64_t job_ = 0;
    int busy_ = 0;
    std::exception_ptr error_;
    bool stopping_ = false;
};

// One caller at a time: Python threads that call kernels concurrently queue here.
std::mutex g_mutex;
Pool* g_pool = nullptr;
int g_threads = default_threads();

}  // namespace

int num_threads() { return g_threads; }

void set_num_threads(int n) {
    std::lock_guard lock(g_mutex);
    g_threads = n;
}

void run_tasks(int64_t n_tasks, TaskFn fn, void* context) {
    std::lock_guard lock(g_mutex);
    if (g_threads == 1 || n_tasks == 1) {
        for (int64_t i = 0; i < n_tasks; ++i) fn(context, i);
        return;
    }
    if (g_pool == nullptr || !g_pool->usable() || g_pool->size() != g_threads) {
        if (g_pool != nullptr && g_pool->usable()) {
            g_pool->stop();
            delete g_pool;
        }
        g_pool = new Pool(g_threads);
    }
    g_pool->run(n_tasks, fn, context);
}

void* allocate(int64_t bytes) {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
    return data;
}

void release(void* data) { std::free(data); }

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    static const int64_t bytes = 0;
#endif
    return bytes > 0 ? bytes : 512 * 1024;
}

void* thread_scratch(size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { release(data); }
    };
    thread_local Buffer buffer;
    if (buffer.size < bytes) {
        release(buffer.data);
        buffer = {};
        buffer.data = allocate(bytes);
        buffer.size = bytes;
    }
    return buffer.data;
}

}  // namespace fwdllm
