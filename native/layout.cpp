#include "layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace effnet {
namespace {

constexpr int64_t LARGEST = 1 << 20;  // of any number
constexpr int LARGEST_KERNEL = 63;
constexpr int64_t LARGEST_MAP = int64_t(1) << 31;  // elements, so that an int can count them

int round_up(int64_t value, int step) { return (int)((value + step - 1) / step * step); }

[[noreturn]] void refuse(const std::string& what, int64_t value, const std::string& rule) {
  throw std::invalid_argument(what + "=" + std::to_string(value) + " " + rule);
}

// Reads numbers in order and checks that each is in its range.
class Numbers {
 public:
  Numbers(const int32_t* numbers, int64_t count) : next_(numbers), end_(numbers + count) {}
  int take(const char* name, int64_t least, int64_t most = LARGEST) {
    if (next_ == end_) throw std::invalid_argument(std::string("the numbers end before ") + name);
    const int32_t value = *next_++;
    if (value < least || value > most)
      refuse(name, value, "must be from " + std::to_string(least) + " to " + std::to_string(most));
    return value;
  }
  void end() const {
    if (next_ != end_) refuse("numbers", end_ - next_, "are left over");
  }

 private:
  const int32_t *next_, *end_;
};

int take_kernel(Numbers& numbers, const char* name) {
  const int kernel = numbers.take(name, 1, LARGEST_KERNEL);
  if (kernel % 2 == 0) refuse(name, kernel, "must be odd");
  return kernel;
}

void check_map(const char* name, int64_t size, int64_t channels) {
  if (size * size * channels >= LARGEST_MAP) refuse(name, size * size * channels, "elements are more than 2^31");
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float to_float(uint16_t bf16) {
  const uint32_t bits = (uint32_t)bf16 << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Reads the arrays in the order of the network and checks the length of each.
class Arrays {
 public:
  Arrays(const float* const* arrays, const int64_t* lengths, int64_t count)
      : arrays_(arrays), lengths_(lengths), count_(count) {}
  const float* take(const std::string& name, int64_t length) {
    if (next_ == count_) throw std::invalid_argument("the arrays end before " + name);
    if (lengths_[next_] != length) refuse(name, lengths_[next_], "values must be " + std::to_string(length));
    if (!arrays_[next_]) throw std::invalid_argument(name + " is missing");
    return plain(arrays_[next_++], length);
  }
  void end() const {
    if (next_ != count_) refuse("arrays", count_ - next_, "are left over");
  }

 private:
  // The values with every NaN replaced by the quiet NaN: rounding to bf16 is integer addition, which would turn a NaN
  // with all bits set into 0, so a damaged network would give answers.
  const float* plain(const float* values, int64_t length) {
    bool any = false;
    for (int64_t i = 0; i < length; i++) any |= values[i] != values[i];
    if (!any) return values;
    plain_.emplace_back(values, values + length);
    for (float& value : plain_.back())
      if (value != value) value = std::numeric_limits<float>::quiet_NaN();
    return plain_.back().data();
  }

  const float* const* arrays_;
  const int64_t* lengths_;
  int64_t count_, next_ = 0;
  std::vector<std::vector<float>> plain_;
};

// A convolution with its normalisation: each output is the sum times a scale, plus a bias.
struct Convolution {
  const float *weight, *scale, *bias;
  Convolution(Arrays& arrays, const std::string& name, int64_t outputs, int64_t inputs)
      : weight(arrays.take(name + ".weight", outputs * inputs)),
        scale(arrays.take(name + ".scale", outputs)),
        bias(arrays.take(name + ".bias", outputs)) {}
};

// Writes weights in the precision of the kernels.
class Writer {
 public:
  explicit Writer(int element) : element_(element) {}
  // Returns the rounding error.
  float put(void* to, size_t at, float value) const {
    if (element_ == 4) {
      ((float*)to)[at] = value;
      return 0.f;
    }
    const uint16_t written = to_bf16(value);
    ((uint16_t*)to)[at] = written;
    return value - to_float(written);
  }
  // [rows][columns] into rows of `apart` elements, times `scale`
  void rows(void* to, const float* from, int rows, int columns, int apart, float scale) const {
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns; c++) put(to, (size_t)r * apart + c, from[(size_t)r * columns + c] * scale);
  }

 private:
  int element_;
};

// Packs weight(output, k) for k < depth into tiles; padding stays zero. `keeps_sums` adds the rounding error of each
// weight to the next one, which is better if neighbouring inputs are similar, and worse otherwise.
template <class Weight> void pack(const Product& p, const Kernels& k, const Writer& writer, Weight weight,
                                  bool keeps_sums = false) {
  for (int t = 0; t < p.tiles; t++) {
    const int first = p.first(t) * k.lanes, width = (p.first(t + 1) - p.first(t)) * k.lanes;
    const size_t begin = (size_t)first * p.depth;
    for (int n = first; n < std::min(first + width, p.outputs); n++) {
      float left = 0;
      for (int i = 0; i < p.depth; i++) {
        const int place = i & (k.pair - 1);
        const float value = weight(n, i);
        if (value == 0) continue;  // a zero or padding
        const size_t at = begin + (size_t)(i - place) * width + (size_t)(n - first) * k.pair + place;
        const float rest = writer.put(p.weights, at, value + left);
        if (keeps_sums) left = rest;
      }
    }
  }
}

// Packs a 1x1 convolution, with weights times `scale` and biases times `shift`.
void pack(const Product& p, const Kernels& k, const Writer& writer, const Convolution& c, float scale, float shift) {
  for (int n = 0; n < p.outputs; n++) p.bias[n] = c.bias[n] * shift;
  pack(p, k, writer, [&](int n, int i) {
    return i < p.inputs ? c.weight[(size_t)n * p.inputs + i] * (c.scale[n] * scale) : 0.f;
  });
}

}  // namespace

Layout::Layout(const Kernels& table, const int32_t* values, int64_t count) : kernels(&table) {
  const int lanes = table.lanes;
  Numbers numbers(values, count);
  stem.size = numbers.take("size", 1);
  stem.channels = numbers.take("channels", 1, 4096);
  stem.kernel = take_kernel(numbers, "stem_kernel");
  stem.stride = numbers.take("stem_stride", 1, 2);
  stem.pad = numbers.take("stem_pad", 0, stem.kernel - 1);
  const int stem_channels = numbers.take("stem_channels", 1);
  activation = (Activation)numbers.take("activation", (int)Activation::silu, (int)Activation::relu);
  const int head_channels = numbers.take("head_channels", 0);
  head.classes = numbers.take("classes", 1);
  const int block_count = numbers.take("blocks", 1, 10000);

  check_map("image", stem.size, stem.channels);
  stem.output = (stem.size + stem.stride - 1) / stem.stride;
  stem.block = round_up(stem.kernel * stem.channels, table.pair);
  stem.rows = std::max(stem.pad + stem.size, (stem.output - 1) * stem.stride + stem.kernel);
  stem.pitch = stem.rows * stem.channels;
  stem_lanes = round_up(stem_channels, lanes);

  const auto product = [&](int inputs, int outputs, int depth, int tile) {
    Product p;
    p.inputs = inputs;
    p.outputs = outputs;
    p.depth = depth;
    p.vectors = (outputs + lanes - 1) / lanes;
    p.tiles = (p.vectors + tile - 1) / tile;
    return p;
  };

  int size = stem.output, channels = stem_channels;
  check_map("stem", size, stem_lanes);
  for (int i = 0; i < block_count; i++) {
    Block b;
    b.activation = activation;
    b.input = size;
    b.in = numbers.take("in_channels", channels, channels);
    b.wide = numbers.take("expanded_channels", 1);
    b.out = numbers.take("out_channels", 1);
    b.kernel = take_kernel(numbers, "kernel_size");
    b.stride = numbers.take("stride", 1, 2);
    b.pad = numbers.take("pad", 0, b.kernel - 1);
    b.squeeze = numbers.take("squeeze_channels", 0);
    b.shortcut = numbers.take("shortcut", 0, b.stride == 1 && b.in == b.out ? 1 : 0);
    const bool expands = numbers.take("expands", b.wide == b.in ? 0 : 1, 1);
    b.source = expands ? Source::expand : i == 0 ? Source::stem : Source::map;
    stem_map = stem_map || (i == 0 && (expands || b.shortcut));
    if (stem_map && i == 0 && !expands) b.source = Source::map;
    b.output = (size + b.stride - 1) / b.stride;
    b.in_lanes = round_up(b.in, lanes);
    b.out_lanes = round_up(b.out, lanes);
    b.vectors = (b.wide + lanes - 1) / lanes;
    b.chunk = table.chunk;
    b.row = std::max(b.pad + b.input, (b.output - 1) * b.stride + b.kernel);
    b.chunks = (b.vectors + b.chunk - 1) / b.chunk;
    b.segment = std::max(1, SEGMENT / (lanes * table.element)) * 3 / 2;
    b.scales_map = b.pixels() < b.out;
    check_map("map", std::max(b.input, b.output), std::max(b.vectors * lanes, b.out_lanes));
    if (b.source == Source::expand) b.expand = product(b.in, b.wide, round_up(b.in, table.pair), b.chunk);
    if (b.source == Source::stem) b.expand = product(b.in, b.wide, stem.kernel * stem.block, b.chunk);
    b.project = product(b.wide, b.out, b.vectors * lanes, table.tile);
    if (b.project.tiles > 1) b.project.tiles += b.project.tiles % 2;  // so that two threads get equal shares
    blocks.push_back(b);
    size = b.output;
    channels = b.out;
  }
  numbers.end();
  if (stem_map) stem.product = product(stem.channels, stem_channels, stem.kernel * stem.block, table.tile);

  head.pixels = size * size;
  head.in_lanes = round_up(channels, lanes);
  head.activation = activation;
  head.features = head_channels ? head_channels : channels;
  if (head_channels) head.product = product(channels, head_channels, round_up(channels, table.pair), table.chunk);
  head.feature_lanes = round_up(head.features, lanes * table.pair);
  check_map("head", size, round_up(head.features, lanes));
}

void Layout::place_weights(Arena& arena) {
  const Kernels& k = *kernels;
  const auto place = [&](Product& p) {
    p.weights = arena.bytes((size_t)p.vectors * k.lanes * p.depth * k.element);
    p.bias = arena.take<float>((size_t)p.vectors * k.lanes);
  };
  stem.mean = arena.take<float>((size_t)stem.size * stem.channels);
  if (stem_map) place(stem.product);
  for (Block& b : blocks) {
    const size_t wide = (size_t)b.vectors * k.lanes;
    if (b.source != Source::map) place(b.expand);
    b.filters = arena.take<float>(wide * b.kernel * b.kernel);
    b.bias = arena.take<float>(wide);
    if (b.squeeze) {
      b.squeeze_weights = arena.bytes(wide * b.squeeze * k.element);
      b.squeeze_bias = arena.take<float>(b.squeeze);
      b.excite_weights = arena.bytes(wide * b.squeeze * k.element);
      b.excite_bias = arena.take<float>(wide);
    }
    place(b.project);
  }
  if (head.product.outputs) place(head.product);
  head.classifier = arena.bytes((size_t)head.classes * head.feature_lanes * k.element);
  head.bias = arena.take<float>(head.classes);
}

void Layout::fill_weights(const float* const* values, const int64_t* lengths, int64_t count) {
  const Kernels& k = *kernels;
  const Writer writer(k.element);
  const float scale = activation == Activation::silu ? k.scale : 1.f;
  Arrays arrays(values, lengths, count);

  const float* mean = arrays.take("mean", stem.channels);
  for (int i = 0; i < stem.size * stem.channels; i++) stem.mean[i] = mean[i % stem.channels];
  const int stem_channels = blocks[0].in, row = stem.kernel * stem.channels;
  const Convolution first(arrays, "stem", stem_channels, stem.kernel * row);
  const auto stem_weight = [&](int n, int i) {  // of (out, in, ky, kx)
    const int y = i / stem.block, x = i % stem.block / stem.channels, c = i % stem.block % stem.channels;
    if (i % stem.block >= row) return 0.f;
    const size_t at = (((size_t)n * stem.channels + c) * stem.kernel + y) * stem.kernel + x;
    return first.weight[at] * (first.scale[n] * scale);
  };
  const auto pack_stem = [&](const Product& p) {
    for (int n = 0; n < p.outputs; n++) p.bias[n] = first.bias[n] * scale;
    pack(p, k, writer, stem_weight, true);
  };
  if (stem_map) pack_stem(stem.product);

  for (Block& b : blocks) {
    const std::string name = "block " + std::to_string(&b - blocks.data()) + " ";
    const int wide = b.vectors * k.lanes;
    if (b.source == Source::stem) pack_stem(b.expand);
    if (b.source == Source::expand)
      pack(b.expand, k, writer, Convolution(arrays, name + "expand", b.wide, b.in), scale, scale);
    const int area = b.kernel * b.kernel;
    const Convolution depthwise(arrays, name + "depthwise", b.wide, area);
    for (int c = 0; c < b.wide; c++) {
      const float factor = depthwise.scale[c] * (b.source == Source::map ? scale : 1.f);
      for (int i = 0; i < area; i++)
        b.filters[((size_t)(c / k.lanes) * area + i) * k.lanes + c % k.lanes] =
            depthwise.weight[(size_t)c * area + i] * factor;
      b.bias[c] = depthwise.bias[c] * scale;
    }
    if (b.squeeze) {
      const int64_t length = (int64_t)b.squeeze * b.wide;
      const float* down = arrays.take(name + "squeeze.weight", length);
      writer.rows(b.squeeze_weights, down, b.squeeze, b.wide, wide, 1 / (scale * b.pixels()));
      memcpy(b.squeeze_bias, arrays.take(name + "squeeze.bias", b.squeeze), b.squeeze * sizeof(float));
      const float* up = arrays.take(name + "excite.weight", length);
      for (int c = 0; c < b.wide; c++)
        for (int u = 0; u < b.squeeze; u++) {
          const size_t at = ((size_t)(c / k.lanes) * b.squeeze + u) * k.lanes + c % k.lanes;
          writer.put(b.excite_weights, at, up[(size_t)c * b.squeeze + u]);
        }
      memcpy(b.excite_bias, arrays.take(name + "excite.bias", b.wide), b.wide * sizeof(float));
    }
    pack(b.project, k, writer, Convolution(arrays, name + "project", b.out, b.wide), 1 / scale, 1.f);
  }

  if (head.product.outputs)
    pack(head.product, k, writer, Convolution(arrays, "head", head.features, head.product.inputs), scale, scale);
  const float* w = arrays.take("classifier.weight", (int64_t)head.classes * head.features);
  writer.rows(head.classifier, w, head.classes, head.features, head.feature_lanes, 1.f);
  memcpy(head.bias, arrays.take("classifier.bias", head.classes), head.classes * sizeof(float));
  arrays.end();
}

void Layout::place_context(Arena& arena, Context& c) const {
  const Kernels& k = *kernels;
  size_t map = stem_map ? (size_t)stem.output * stem.output * stem_lanes : 0, inner = 0, scaled = 0, wide = 0,
         squeezed = 0;
  for (const Block& b : blocks) {
    const size_t lanes = (size_t)b.vectors * k.lanes;
    map = std::max(map, (size_t)b.pixels() * b.out_lanes);
    inner = std::max(inner, (size_t)b.pixels() * lanes);
    if (b.squeeze && !b.scales_map) scaled = std::max(scaled, (size_t)b.project.vectors * k.lanes * b.project.depth);
    wide = std::max(wide, lanes);
    squeezed = std::max(squeezed, (size_t)b.squeeze);
  }
  c.image = arena.bytes(((size_t)stem.rows * stem.pitch + ALIGNMENT) * k.element);
  for (void*& each : c.maps) each = arena.bytes(map * k.element);
  c.depthwise = arena.bytes(inner * k.element);
  c.scaled = arena.bytes(scaled * k.element);
  c.sums = arena.take<float>(BANDS * wide);
  c.hidden = arena.take<float>(squeezed);
  c.gate = arena.take<float>(wide);
  c.pooled = arena.bytes((size_t)(head.feature_lanes + k.lanes) * k.element);
}

void Layout::place_workspace(Arena& arena, Workspace& space) const {
  size_t ring = 0, wide = 0, partial = 0;
  for (const Block& b : blocks) {
    if (b.segments() > 1 && kernels->element != sizeof(float))
      partial = std::max(partial, (size_t)std::min(b.pixels(), GROUP) * b.out_lanes);
    ring = std::max(ring, (size_t)b.kernel * b.chunk * b.row * kernels->lanes);
    wide = std::max(wide, (size_t)b.vectors * kernels->lanes);
  }
  space.ring = arena.take<float>(ring);
  space.pooled = arena.take<float>(wide);
  space.partial = arena.take<float>(partial);
}

}  // namespace effnet
