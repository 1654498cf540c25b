// A training step of one segment of a network (its stem, a block, its head) as plain sizes and pointers.
//
// Maps are NHWC without gaps, in fp32 or bf16; weights, statistics and their gradients are fp32. Weights have torch's
// layout: [output][input][row][column]. What the forward pass keeps for the backward pass are the input and the outputs
// of the convolutions before their normalisation; everything between is computed again.
#pragma once
#include <cstddef>
#include <cstdint>

#include "network.h"

namespace effnet {

struct TrainingNorm {
  const float *weight, *bias;
  float *running_mean, *running_variance;  // updated by the forward pass, or null
  float* saved;  // [4][channel]: the batch's mean, 1 / standard deviation, and by which the map is scaled and shifted
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
  float *pooled, *squeezed, *gate;  // [image][channel]: means, their squeezed sums before the activation, factors
  const void* x;  // [image][height][width][input]
  void* y;  // or null where a forward pass is only to make the maps again
  const float* drop;  // [image]: factors of stochastic depth, or null
  const void* y_gradient;
  void* x_gradient;  // or null where it is not wanted
  void *scaled_gradient, *expanded_gradient;  // room for gradients as large as the depthwise's and the expand's maps
  void* scratch;  // as many bytes as effnet_training_scratch() says
  int32_t images, height, width, inputs;
  int32_t out_height, out_width;
  int32_t kernel, stride, pad_top, pad_left;  // of the depthwise convolution, or of the single layer
  int32_t squeeze;  // squeezed channels; 0: no squeeze-and-excitation
  int32_t shortcut;

  EFFNET_INLINE bool is_layer() const { return depthwise.channels == 0; }
  EFFNET_INLINE ptrdiff_t in_pixels() const { return (ptrdiff_t)height * width; }
  EFFNET_INLINE ptrdiff_t out_pixels() const { return (ptrdiff_t)out_height * out_width; }
};

// Throws std::invalid_argument where the numbers of a segment do not fit each other.
void check_segment(const TrainingSegment&, bool bf16);

// Threads that share work: part 0 ... parts - 1 of it, each part by one thread.
struct Team {
  int parts;
  void run(void (*work)(void*, int part), void* data) const;
};

// The work of an instruction set in a precision. `bytes` is how much scratch a pass needs.
struct TrainingKernels {
  void (*forward)(const TrainingSegment&, const Team&);
  void (*backward)(const TrainingSegment&, const Team&);
  ptrdiff_t (*bytes)(const TrainingSegment&, const Team&);
};

}  // namespace effnet
