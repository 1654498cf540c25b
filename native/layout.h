// The layout of a network: its sizes, read from numbers and checked, and its places in memory.
#pragma once
#include <string>
#include <vector>

#include "network.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace effnet {

constexpr size_t ALIGNMENT = 64;  // bytes: a cache line, and the widest vector

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GAP = ALIGNMENT;  // between pieces of an arena, to detect accesses beyond a piece
inline void guard(char* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void unguard(void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
constexpr size_t GAP = 0;
inline void guard(char*, size_t) {}
inline void unguard(void*, size_t) {}
#endif

// Hands out a block of memory piece by piece; without a block it only counts.
class Arena {
 public:
  explicit Arena(char* begin = nullptr) : begin_(begin) {}
  template <class T> T* take(size_t count) { return (T*)bytes(count * sizeof(T)); }
  void* bytes(size_t count) {
    char* piece = begin_ ? begin_ + used_ : nullptr;
    const size_t taken = (count + GAP + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (piece) guard(piece + count, taken - count);
    used_ += taken;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

struct Layout {
  const Kernels* kernels = nullptr;
  Activation activation = Activation::silu;
  Stem stem;
  bool stem_map = false;  // whether the stem's output is a map of its own
  int stem_lanes = 0;
  std::vector<Block> blocks;
  Head head;

  // Throws std::invalid_argument if the numbers do not describe a network.
  Layout(const Kernels& kernels, const int32_t* numbers, int64_t count);

  void place_weights(Arena& arena);
  void fill_weights(const float* const* arrays, const int64_t* lengths, int64_t count);
  void place_context(Arena& arena, Context& context) const;
  void place_workspace(Arena& arena, Workspace& space) const;
  int phases() const { return 3 + 3 * (int)blocks.size(); }
};

}  // namespace effnet
