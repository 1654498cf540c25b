// Checks the numbers of a training segment. The lengths of its arrays follow from them and are checked by the caller.
#include "training.h"

#include <stdexcept>
#include <string>

namespace effnet {
namespace {

constexpr int32_t MOST = 1 << 20;  // largest size, so that products of sizes cannot overflow an index

void within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + " must be from " +
                              std::to_string(least) + " to " + std::to_string(most));
}

void check_layer(const char* name, const TrainingLayer& layer, int64_t least, bool bf16) {
  within((std::string(name) + ".channels").c_str(), layer.channels, least, MOST);
  within((std::string(name) + ".activation").c_str(), (int32_t)layer.activation, 0, (int32_t)Activation::relu);
  if (bf16 && layer.channels % 2)
    throw std::invalid_argument(std::string(name) + ".channels=" + std::to_string(layer.channels) +
                                " must be even in bf16");
}

}  // namespace

void check_segment(const TrainingSegment& s, bool bf16) {
  const bool layer = s.is_layer();
  check_layer("expand", s.expand, 0, bf16);
  check_layer("depthwise", s.depthwise, 0, bf16);
  check_layer("project", s.project, 1, bf16);
  within("images", s.images, 1, MOST);
  within("inputs", s.inputs, 1, MOST);
  within("height", s.height, 1, MOST);
  within("width", s.width, 1, MOST);
  within("stride", s.stride, 1, layer ? 16 : 2);
  within("out_height", s.out_height, (s.height + s.stride - 1) / s.stride, (s.height + s.stride - 1) / s.stride);
  within("out_width", s.out_width, (s.width + s.stride - 1) / s.stride, (s.width + s.stride - 1) / s.stride);
  within("kernel", s.kernel, layer ? 1 : 3, layer ? 63 : 7);
  if (!layer && s.kernel % 2 == 0) throw std::invalid_argument("kernel=" + std::to_string(s.kernel) + " must be odd");
  within("pad_top", s.pad_top, 0, s.kernel / 2);
  within("pad_left", s.pad_left, 0, s.kernel / 2);
  within("squeeze", s.squeeze, 0, layer ? 0 : MOST);
  within("shortcut", s.shortcut, 0, !layer && s.stride == 1 && s.inputs == s.project.channels);
  if (layer) within("expand.channels", s.expand.channels, 0, 0);
  if (!layer && !s.expand.channels) within("depthwise.channels", s.depthwise.channels, s.inputs, s.inputs);
  if (s.expand.channels) within("expand.channels", s.expand.channels, s.depthwise.channels, s.depthwise.channels);
  if (bf16 && s.inputs % 2 && !(layer && (s.kernel > 1 || s.stride > 1)))
    throw std::invalid_argument("inputs=" + std::to_string(s.inputs) + " must be even in bf16");
  const int64_t elements = (int64_t)s.images * s.height * s.width;
  within("images x height x width", elements, 1, (int64_t)1 << 40);
}

}  // namespace effnet
