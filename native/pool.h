// Threads that a network keeps between its images. They wait in a loop for a moment, then asleep.
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

constexpr int IDLE_SPINS = 10000;  // a few hundred microseconds, before a thread sleeps
constexpr int WAIT_SPINS = 1000;  // some tens, before one that waits for another gives its core away

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `ready()`; gives the core away where that takes long, since there may be more threads than cores.
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

// The threads that compute an image together: those that are awake when it begins. One that the system lets wait,
// because other programs are busy, would hold up all others at every barrier.
class Meeting {
 public:
  // In a thread other than the first: its place from 1 on, or 0 where the others have begun without it.
  int join() {
    int place = present_.load(std::memory_order_relaxed);
    do {
      if (place == CLOSED) return 0;
    } while (!present_.compare_exchange_weak(place, place + 1, std::memory_order_acq_rel));
    spin([&] { return size_.load(std::memory_order_acquire) != 0; });
    return place;
  }
  // In the first thread: how many have come, itself included; it waits for `threads` of them, but not long.
  int begin(int threads) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (present_.load(std::memory_order_relaxed) < threads && std::chrono::steady_clock::now() < end) relax();
    const int size = present_.exchange(CLOSED, std::memory_order_acq_rel);
    size_.store(size, std::memory_order_release);
    return size;
  }
  int size() const { return size_.load(std::memory_order_relaxed); }

 private:
  static constexpr int CLOSED = -1;
  std::atomic<int> present_{1}, size_{0};
};

class Pool {
 public:
  typedef void (*Task)(void* argument, int thread);

  std::mutex busy;  // held by who runs something

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      leaving_ = true;
      turn_.fetch_add(1, std::memory_order_release);
    }
    awake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // task(argument, 0) in this thread and task(argument, 1) ... task(argument, threads - 1) in others, all at once
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
