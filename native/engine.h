// A network with packed weights, working memory and threads, ready to run.
#pragma once
#include <memory>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace effnet {

struct Memory {
  explicit Memory(size_t bytes);
  ~Memory();
  char* begin;

 private:
  void* pages_;
  size_t mapped_ = 0;  // bytes
};

class Engine {
 public:
  // See effnet_create; throws std::invalid_argument.
  Engine(Layout layout, int threads, const float* const* arrays, const int64_t* lengths, int64_t count);
  ~Engine();
  void run(const uint8_t* pixels, int64_t images, float* logits, float* features);
  int64_t phases(double* seconds, int64_t count) const;

 private:
  struct Team;
  struct Batch;
  static void work(void* batch, int thread);
  void forward(Batch& batch, Team& team, int space, int place, int begin);

  Layout layout_;
  int threads_;
  int64_t process_;
  std::unique_ptr<Pool> pool_;
  std::unique_ptr<Memory> weights_;
  std::vector<std::unique_ptr<Memory>> work_;
  std::vector<std::unique_ptr<Team>> teams_;
  std::vector<Workspace> spaces_;
};

}  // namespace effnet
