// A few threads that run one function together, with a barrier. Who waits spins, then gives way, then sleeps in the kernel.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base.h"

namespace baton {

BATON_INLINE void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// A number that one side advances and others wait for. `wait` returns once the value is no longer `seen`.
class Epoch {
 public:
  uint32_t load() const { return value_.load(std::memory_order_acquire); }
  void advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst)) {
      syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
    }
  }
  void wait(uint32_t seen) {
    for (int i = 0; i < kSpins + kYields; i++) {
      if (load() != seen) return;
      if (i < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    while (load() == seen) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  // About 5 us of pauses, then 150 us in which others may have the core: longer than phases differ, and than Python takes
  // between two layers. Waking a sleeper takes tens of microseconds; hundreds of phases make a step.
  static constexpr int kSpins = 100, kYields = 400;

  alignas(128) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> num_sleeping_{0};
};

// Thread 0 is whoever calls `run`; the others belong to the pool. With one thread everything below costs nothing.
class Pool {
 public:
  // `cores`: one per thread, or null. The caller's own core is the caller's business.
  Pool(int num_threads, const int32_t* cores) : size_(num_threads) {
    for (int id = 1; id < num_threads; id++) {
      const int core = cores ? cores[id] : -1;
      threads_.emplace_back([this, id, core] { serve(id, core); });
    }
  }
  ~Pool() {
    stop_ = true;
    start_.advance();
    for (auto& thread : threads_) thread.join();
  }
  int size() const { return size_; }

  // Calls fn(context, thread) on every thread; returns when all have returned.
  void run(void (*fn)(void*, int), void* context) {
    if (size_ == 1) return fn(context, 0);
    fn_ = fn;
    context_ = context;
    start_.advance();
    fn(context, 0);
    barrier();
  }

  // All threads of `run` meet here; what each wrote before is visible to all after.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t seen = met_.load();
    if (num_here_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      num_here_.store(0, std::memory_order_relaxed);
      met_.advance();
    } else {
      met_.wait(seen);
    }
  }

 private:
  void serve(int id, int core) {
    if (core >= 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(core, &set);
      pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    }
    for (uint32_t seen = 0;; seen++) {
      start_.wait(seen);
      if (stop_) return;
      fn_(context_, id);
      barrier();
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  void (*fn_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  Epoch start_, met_;
  alignas(128) std::atomic<int> num_here_{0};
};

}  // namespace baton
