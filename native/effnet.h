// The C interface of the library. Python opens it by ctypes; see src/effnet/native.py for the order of numbers and
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

// Raised with every change of this file or of the order of numbers and arrays.
EFFNET_API int32_t effnet_abi();

// What the sources were when this library was compiled.
EFFNET_API const char* effnet_build();

// The instruction sets that this library has and this processor runs, best first, separated by commas.
EFFNET_API const char* effnet_instruction_sets();

// Bytes of packed weights, of what each thread works in, and the instruction set's lanes: sizes[3]. 0 where it is fine;
// else the reason is in `error`. Nothing is allocated.
EFFNET_API int32_t effnet_sizes(const char* instruction_set, int32_t bf16, const int32_t* numbers, int64_t count,
                                int64_t* sizes, char* error, int64_t error_bytes);

// A network that keeps its weights packed and `threads` threads; null where the numbers or the lengths of the arrays do
// not describe one. The arrays are not needed afterwards.
EFFNET_API effnet_network* effnet_create(const char* instruction_set, int32_t bf16, int32_t threads,
                                         const int32_t* numbers, int64_t count, const float* const* arrays,
                                         const int64_t* lengths, int64_t array_count, char* error, int64_t error_bytes);

// Logits [images][class] of pixels [images][height][width][channel], and the head's feature map [images][height][width]
// [channel] where `features` is not null. Several threads may call it; one call is computed at a time. 0 where it is
// fine; 1 where the system has no threads left.
EFFNET_API int32_t effnet_run(effnet_network*, const uint8_t* pixels, int64_t images, float* logits, float* features);

// Seconds of the phases of the last image of the first thread: the image; for each block the expansion with the
// depthwise convolution, squeeze-and-excitation and the projection; the head and the classifier. Returns how many there
// are.
EFFNET_API int64_t effnet_phases(const effnet_network*, double* seconds, int64_t count);

EFFNET_API void effnet_free(effnet_network*);

// The threads of the training passes: OpenMP's GOMP_parallel, omp_get_thread_num and omp_get_num_threads.
EFFNET_API void effnet_use_openmp(void* parallel, void* thread, void* threads);

// The best instruction set for training on this processor.
EFFNET_API const char* effnet_training_instruction_set();

// Bytes of scratch that the passes of a segment (training.h) need when work is divided into `parts`; -1 where its
// numbers do not fit each other, and the reason is in `error`. Its pointers are not read.
EFFNET_API int64_t effnet_training_scratch(const char* instruction_set, int32_t bf16, int32_t parts,
                                           const effnet_training_segment*, char* error, int64_t error_bytes);

// The forward or backward pass of a segment. Results depend on `parts`, not on how many threads there are. 0 where it
// is fine; else the reason is in `error`.
EFFNET_API int32_t effnet_train(const char* instruction_set, int32_t bf16, int32_t parts, int32_t backward,
                                const effnet_training_segment*, char* error, int64_t error_bytes);
