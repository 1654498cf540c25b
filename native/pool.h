// Threads that a network keeps between images. They spin for a moment, then sleep.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace effnet {

constexpr int IDLE_SPINS = 10000;  // a few hundred microseconds, before an idle thread sleeps
constexpr int WAIT_SPINS = 1000;  // some tens of microseconds, before a thread that waits for another yields its core

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `ready()`, and yields the core if that takes long, since there may be more threads than cores.
template <class Ready> void spin(Ready ready) {
  for (int spins = 0; !ready(); spins++) {
    if (spins < WAIT_SPINS)
      relax();
    else
      std::this_thread::yield();
  }
}

class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      spin([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// The threads that compute an image together: a leader, and others that join when they have nothing else to do. They
// are admitted between steps, so none waits for a thread that the system has not scheduled.
class Members {
 public:
  // Called by threads other than the first: the place (1 and up) as soon as it is admitted, or 0 if nothing is left to
  // do.
  int join() {
    int place = present_.load(std::memory_order_relaxed), size = 0;
    do {
      if (place == CLOSED) return 0;
    } while (!present_.compare_exchange_weak(place, place + 1, std::memory_order_acq_rel));
    spin([&] { return (size = size_.load(std::memory_order_acquire)) > place || size == CLOSED; });
    return size == CLOSED ? 0 : place;
  }

  // Called by the first thread.
  void open() {
    size_.store(1, std::memory_order_relaxed);
    present_.store(1, std::memory_order_release);
  }
  // The number of threads present, including the first.
  int present() const { return present_.load(std::memory_order_relaxed); }
  // Waits until `threads` are present, but not long.
  void wait(int threads) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (present() < threads && std::chrono::steady_clock::now() < end) relax();
  }
  void admit(int threads) { size_.store(threads, std::memory_order_release); }
  void close() {
    present_.store(CLOSED, std::memory_order_relaxed);
    admit(CLOSED);
  }

 private:
  static constexpr int CLOSED = -1;
  alignas(64) std::atomic<int> present_{CLOSED}, size_{CLOSED};
};

class Pool {
 public:
  typedef void (*Task)(void* argument, int thread);

  std::mutex busy;  // held while something runs

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      leaving_ = true;
      turn_.fetch_add(1, std::memory_order_release);
    }
    awake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // Runs task(argument, 0) in this thread and task(argument, 1) ... task(argument, threads - 1) in others, concurrently
  void run(int threads, Task task, void* argument) {
    while ((int)threads_.size() < threads - 1) {
      const int number = (int)threads_.size() + 1;
      threads_.emplace_back([this, number, seen = turn_.load()] { work(number, seen); });
    }
    if (threads == 1) return task(argument, 0);
    task_ = task;
    argument_ = argument;
    active_ = threads;
    left_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      turn_.fetch_add(1, std::memory_order_release);
    }
    awake_.notify_all();
    task(argument, 0);
    spin([&] { return left_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void work(int number, uint32_t seen) {
    for (;;) {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < IDLE_SPINS; spins++) relax();
      if (turn_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        awake_.wait(lock, [&] { return turn_.load() != seen; });
      }
      seen = turn_.load(std::memory_order_acquire);
      if (leaving_) return;
      if (number >= active_) continue;
      task_(argument_, number);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex sleep_;
  std::condition_variable awake_;
  std::atomic<uint32_t> turn_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> leaving_{false};
  std::atomic<int> active_{0};
  Task task_ = nullptr;
  void* argument_ = nullptr;
};

}  // namespace effnet
