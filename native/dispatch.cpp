// The C interface, and the choice of instruction set.
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "effnet.h"
#include "engine.h"
#include "training.h"

// build.py defines which instruction sets this library has (EFFNET_HAS_...) and the hash of its sources (EFFNET_BUILD).

namespace effnet {
namespace portable {
extern const Kernels FP32, BF16;
extern const TrainingKernels TRAINING_FP32, TRAINING_BF16;
}  // namespace portable
#if EFFNET_HAS_AVX2
namespace avx2 {
extern const Kernels FP32, BF16;
extern const TrainingKernels TRAINING_FP32, TRAINING_BF16;
}  // namespace avx2
#endif
#if EFFNET_HAS_AVX512
namespace avx512 {
extern const Kernels FP32, BF16;
extern const TrainingKernels TRAINING_FP32, TRAINING_BF16;
}  // namespace avx512
#endif
#if EFFNET_HAS_AVX512 && EFFNET_HAS_AVX512BF16
namespace avx512bf16 {
extern const Kernels BF16;
extern const TrainingKernels TRAINING_BF16;
}  // namespace avx512bf16
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels *fp32, *bf16;
  const TrainingKernels *training_fp32, *training_bf16;
  bool (*runs)();
};

#if EFFNET_X86
// The compiler's runtime checks the processor (cpuid) and the operating system (xgetbv).
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

const Isa ISAS[] = {
// best first
#if EFFNET_HAS_AVX512 && EFFNET_HAS_AVX512BF16
    {"avx512bf16", &avx512::FP32, &avx512bf16::BF16, &avx512::TRAINING_FP32, &avx512bf16::TRAINING_BF16,
     has_avx512bf16},
#endif
#if EFFNET_HAS_AVX512
    {"avx512", &avx512::FP32, &avx512::BF16, &avx512::TRAINING_FP32, &avx512::TRAINING_BF16, has_avx512},
#endif
#if EFFNET_HAS_AVX2
    {"avx2", &avx2::FP32, &avx2::BF16, &avx2::TRAINING_FP32, &avx2::TRAINING_BF16, has_avx2},
#endif
    {"portable", &portable::FP32, &portable::BF16, &portable::TRAINING_FP32, &portable::TRAINING_BF16, always},
};

const Isa& find(const char* name) {
  for (const Isa& isa : ISAS)
    if (!strcmp(isa.name, name) && isa.runs()) return isa;
  throw std::invalid_argument(std::string("instruction_set=") + name + " is not one of " + effnet_instruction_sets());
}

void write(const char* text, char* error, int64_t bytes) {
  if (bytes <= 0) return;
  strncpy(error, text, bytes - 1);
  error[bytes - 1] = 0;
}

const Kernels& find(const char* name, bool bf16) { return bf16 ? *find(name).bf16 : *find(name).fp32; }

// OpenMP's threads, which torch has already started: a second pool would compete with them for the cores.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)(), (*threads)();
} openmp;

struct Job {
  void (*work)(void*, int part);
  void* data;
  int parts;
};

}  // namespace

void Team::run(void (*work)(void*, int part), void* data) const {
  Job job{work, data, parts};
  if (parts == 1 || !openmp.parallel) {
    for (int part = 0; part < parts; part++) work(data, part);
    return;
  }
  openmp.parallel(
      [](void* it) {  // there may be fewer threads than parts; inside another parallel region there is only one
        const Job& job = *(Job*)it;
        const int threads = openmp.threads();
        for (int part = openmp.thread(); part < job.parts; part += threads) job.work(job.data, part);
      },
      &job, (unsigned)parts, 0);
}

}  // namespace effnet

using effnet::Arena;
using effnet::Context;
using effnet::Engine;
using effnet::Layout;
using effnet::Workspace;

int32_t effnet_abi() { return 4; }

const char* effnet_build() { return EFFNET_BUILD; }

const char* effnet_instruction_sets() {
  static const std::string names = [] {
    std::string found;
    for (const effnet::Isa& isa : effnet::ISAS)
      if (isa.runs()) found += (found.empty() ? "" : ",") + std::string(isa.name);
    return found;
  }();
  return names.c_str();
}

int32_t effnet_sizes(const char* instruction_set, int32_t bf16, const int32_t* numbers, int64_t count, int64_t* sizes,
                     char* error, int64_t error_bytes) {
  try {
    Layout layout(effnet::find(instruction_set, bf16), numbers, count);
    Arena weights, work;
    Context context;
    Workspace space;
    layout.place_weights(weights);
    layout.place_context(work, context);
    layout.place_workspace(work, space);
    sizes[0] = (int64_t)weights.used();
    sizes[1] = (int64_t)work.used();
    sizes[2] = layout.kernels->lanes;
    return 0;
  } catch (const std::exception& problem) {
    effnet::write(problem.what(), error, error_bytes);
    return 1;
  }
}

effnet_network* effnet_create(const char* instruction_set, int32_t bf16, int32_t threads, const int32_t* numbers,
                              int64_t count, const float* const* arrays, const int64_t* lengths, int64_t array_count,
                              char* error, int64_t error_bytes) {
  try {
    if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be from 1 to 4096");
    Layout layout(effnet::find(instruction_set, bf16), numbers, count);
    return (effnet_network*)new Engine(std::move(layout), threads, arrays, lengths, array_count);
  } catch (const std::exception& problem) {
    effnet::write(problem.what(), error, error_bytes);
    return nullptr;
  }
}

int32_t effnet_run(effnet_network* network, const uint8_t* pixels, int64_t images, float* logits, float* features) {
  try {
    ((Engine*)network)->run(pixels, images, logits, features);
    return 0;
  } catch (const std::exception&) {  // a thread could not be started
    return 1;
  }
}

int64_t effnet_phases(const effnet_network* network, double* seconds, int64_t count) {
  return ((const Engine*)network)->phases(seconds, count);
}

void effnet_free(effnet_network* network) { delete (Engine*)network; }

void effnet_use_openmp(void* parallel, void* thread, void* threads) {
  effnet::openmp = {(void (*)(void (*)(void*), void*, unsigned, unsigned))parallel, (int (*)())thread,
                    (int (*)())threads};
}

namespace {

const effnet::TrainingKernels& training_kernels(const char* instruction_set, bool bf16, int32_t parts,
                                                const effnet::TrainingSegment& segment) {
  if (parts < 1 || parts > 4096) throw std::invalid_argument("parts must be from 1 to 4096");
  effnet::check_segment(segment, bf16);
  const effnet::Isa& isa = effnet::find(instruction_set);
  return bf16 ? *isa.training_bf16 : *isa.training_fp32;
}

}  // namespace

const char* effnet_training_instruction_set() {
  const effnet::Isa* best = effnet::ISAS;
  while (!best->runs()) best++;
#if EFFNET_X86
  // Intel processors multiply pairs of bf16 no faster than floats, AMD processors twice as fast
  if (!strcmp(best->name, "avx512bf16") && !__builtin_cpu_is("amd")) return "avx512";
#endif
  return best->name;
}

int64_t effnet_training_scratch(const char* instruction_set, int32_t bf16, int32_t parts,
                                const effnet_training_segment* segment, char* error, int64_t error_bytes) {
  try {
    return training_kernels(instruction_set, bf16, parts, *segment).bytes(*segment, effnet::Team{parts});
  } catch (const std::exception& problem) {
    effnet::write(problem.what(), error, error_bytes);
    return -1;
  }
}

int32_t effnet_train(const char* instruction_set, int32_t bf16, int32_t parts, int32_t backward,
                     const effnet_training_segment* segment, char* error, int64_t error_bytes) {
  try {
    const effnet::TrainingKernels& kernels = training_kernels(instruction_set, bf16, parts, *segment);
    (backward ? kernels.backward : kernels.forward)(*segment, effnet::Team{parts});
    return 0;
  } catch (const std::exception& problem) {
    effnet::write(problem.what(), error, error_bytes);
    return 1;
  }
}
