// The C interface of the library. Python opens it with ctypes; src/effnet/native.py defines the order of numbers and
// arrays.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define EFFNET_API extern "C" __declspec(dllexport)
#else
#define EFFNET_API extern "C" __attribute__((visibility("default")))
#endif

struct effnet_network;
namespace effnet {
struct TrainingSegment;
}
typedef effnet::TrainingSegment effnet_training_segment;

// Incremented with every change of this file or of the order of numbers and arrays.
EFFNET_API int32_t effnet_abi();

// A hash of the sources that this library was compiled from.
EFFNET_API const char* effnet_build();

// The instruction sets of this library that this processor supports, best first, separated by commas.
EFFNET_API const char* effnet_instruction_sets();

// Fills sizes[3]: bytes of packed weights, bytes of each thread's working memory, and lanes of the instruction set.
// Allocates nothing. Returns 0 on success, else writes the reason to `error`.
EFFNET_API int32_t effnet_sizes(const char* instruction_set, int32_t bf16, const int32_t* numbers, int64_t count,
                                int64_t* sizes, char* error, int64_t error_bytes);

// Creates a network that owns packed weights and `threads` threads. Returns null and writes the reason to `error` if
// the numbers or the lengths of the arrays do not describe a network. The arrays are not needed afterwards.
EFFNET_API effnet_network* effnet_create(const char* instruction_set, int32_t bf16, int32_t threads,
                                         const int32_t* numbers, int64_t count, const float* const* arrays,
                                         const int64_t* lengths, int64_t array_count, char* error, int64_t error_bytes);

// Computes logits [images][class] of pixels [images][height][width][channel], and the head's feature map
// [images][height][width][channel] unless `features` is null. Several threads may call it; calls run one at a time.
// Returns 0 on success, 1 if a thread could not be started.
EFFNET_API int32_t effnet_run(effnet_network*, const uint8_t* pixels, int64_t images, float* logits, float* features);

// Seconds per phase of the first thread's last image: the image (with the stem, if it has a map of its own); for each
// block the expansion with the depthwise convolution, squeeze-and-excitation and the projection; the head and the
// classifier. Returns the number of phases.
EFFNET_API int64_t effnet_phases(const effnet_network*, double* seconds, int64_t count);

EFFNET_API void effnet_free(effnet_network*);

// Sets the functions that run training passes in threads: OpenMP's GOMP_parallel, omp_get_thread_num and
// omp_get_num_threads.
EFFNET_API void effnet_use_openmp(void* parallel, void* thread, void* threads);

// The best instruction set for training on this processor.
EFFNET_API const char* effnet_training_instruction_set();

// Bytes of scratch that the passes of a segment (training.h) need if work is divided into `parts`. Returns -1 and
// writes the reason to `error` if the segment's numbers are inconsistent. Its pointers are not read.
EFFNET_API int64_t effnet_training_scratch(const char* instruction_set, int32_t bf16, int32_t parts,
                                           const effnet_training_segment*, char* error, int64_t error_bytes);

// Runs the forward or backward pass of a segment. Results depend on `parts`, not on the number of threads. Returns 0 on
// success, else writes the reason to `error`.
EFFNET_API int32_t effnet_train(const char* instruction_set, int32_t bf16, int32_t parts, int32_t backward,
                                const effnet_training_segment*, char* error, int64_t error_bytes);
