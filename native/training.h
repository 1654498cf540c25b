// A training step of one segment of a network (stem, block or head) as plain sizes and pointers.
//
// Maps are contiguous NHWC, in fp32 or bf16; weights, statistics and their gradients are fp32. Weights have torch's
// layout: [output][input][row][column]. For the backward pass, the forward pass keeps only the input and the outputs of
// the convolutions before normalisation; everything between is recomputed.
#pragma once
#include <cstddef>
#include <cstdint>

#include "network.h"

namespace effnet {

struct TrainingNorm {
  const float *weight, *bias;
  float *running_mean, *running_variance;  // updated by the forward pass, or null
  float* saved;  // [4][channel]: batch mean, 1 / standard deviation, and the scale and shift applied to the map
  float *weight_gradient, *bias_gradient;
  float eps, momentum;
};

struct TrainingLayer {  // a convolution, its normalisation, and an activation
  const float* weights;
  float* gradient;
  void* map;  // the convolution's output
  TrainingNorm norm;
  int32_t channels;  // of its output; 0: the segment does not have this layer
  Activation activation;
};

// A block: [expand] depthwise [squeeze-and-excitation] project [shortcut]; or a single layer, which is `project` alone.
struct TrainingSegment {
  TrainingLayer expand, depthwise, project;
  const float *squeeze_weights, *squeeze_bias, *excite_weights, *excite_bias;
  float *squeeze_gradient, *squeeze_bias_gradient, *excite_gradient, *excite_bias_gradient;
  float *pooled, *squeezed, *gate;  // [image][channel]: means, squeezed values before the activation, gate
  const void* x;  // [image][height][width][input]
  void* y;  // or null if the forward pass only recomputes the maps
  const float* drop;  // [image]: factors of stochastic depth, or null
  const void* y_gradient;
  void* x_gradient;  // or null if not wanted
  void *scaled_gradient, *expanded_gradient;  // room for gradients of the size of depthwise.map and expand.map
  void* scratch;  // effnet_training_scratch() bytes
  int32_t images, height, width, inputs;
  int32_t out_height, out_width;
  int32_t kernel, stride, pad_top, pad_left;  // of the depthwise convolution, or of the single layer
  int32_t squeeze;  // squeezed channels; 0: no squeeze-and-excitation
  int32_t shortcut;

  EFFNET_INLINE bool is_layer() const { return depthwise.channels == 0; }
  EFFNET_INLINE ptrdiff_t in_pixels() const { return (ptrdiff_t)height * width; }
  EFFNET_INLINE ptrdiff_t out_pixels() const { return (ptrdiff_t)out_height * out_width; }
};

// Throws std::invalid_argument if the numbers of a segment are inconsistent.
void check_segment(const TrainingSegment&, bool bf16);

// Threads that share work: each of the parts 0 ... parts - 1 is run by one thread.
struct Team {
  int parts;
  void run(void (*work)(void*, int part), void* data) const;
};

// The kernels of an instruction set in one precision. `bytes` returns the scratch that the passes need.
struct TrainingKernels {
  void (*forward)(const TrainingSegment&, const Team&);
  void (*backward)(const TrainingSegment&, const Team&);
  ptrdiff_t (*bytes)(const TrainingSegment&, const Team&);
};

}  // namespace effnet
