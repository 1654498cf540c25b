// A network as plain sizes and pointers, which the engine lays out once and the kernels of every instruction set read.
//
// Feature maps between blocks are NHWC, with channels zero-padded to whole vectors ("lanes"). Inside a block the
// expanded map lives in a ring buffer of a few rows, and the output of the depthwise convolution is stored as
// [vector of channels][pixel][lane].
#pragma once
#include <cstddef>
#include <cstdint>

// Always inlined: the linker must not use a copy compiled for one instruction set in another's code.
#define EFFNET_INLINE inline __attribute__((always_inline))

namespace effnet {

enum class Activation : int32_t { none, silu, relu6, relu };
enum class Source : int32_t { map, expand, stem };  // where a block's depthwise convolution takes its input from

constexpr int BANDS = 8;  // of rows: a map's sums are computed in this many parts, whatever the number of threads
constexpr int GROUP = 384;  // most pixels that a projection processes together
constexpr int SEGMENT = 2048;  // bytes per pixel that it processes together, approximately at most
constexpr int LARGEST_TILE = 5;  // most vectors of outputs that a matrix product computes together

// A matrix product with `outputs` rows of `inputs` weights, packed into tiles of a few vectors of outputs.
struct Product {
  int inputs = 0, outputs = 0;
  int depth = 0;  // inputs as packed: rounded up to pairs, or to whole vectors
  int vectors = 0;  // of outputs
  int tiles = 0;
  void* weights = nullptr;  // per tile: [depth][vectors of the tile][lane], in bf16 as pairs of inputs
  float* bias = nullptr;  // one per lane

  EFFNET_INLINE int first(int tile) const {
    return (int)((ptrdiff_t)vectors * tile / tiles);
  }  // first vector of a tile
};

struct Stem {
  int size = 0, channels = 0;  // of the image
  int kernel = 0, stride = 0, pad = 0;
  int output = 0;  // height and width of its output
  int pitch = 0;  // elements per row of the padded image
  int rows = 0;  // of the padded image
  float* mean = nullptr;  // one row, the mean repeated for each pixel
  Product product;  // inputs: kernel rows of `block` elements each
  int block = 0;  // elements per kernel row as packed
};

struct Block {
  Source source = Source::map;
  int input = 0, output = 0;  // height and width of its maps
  int in = 0, wide = 0, out = 0;  // channels
  int in_lanes = 0, out_lanes = 0;  // channels as stored
  int vectors = 0;  // of expanded channels
  int kernel = 0, stride = 0, pad = 0;
  int squeeze = 0;
  bool shortcut = false;
  Activation activation = Activation::silu;
  int chunk = 0;  // most vectors of expanded channels that are computed together
  int chunks = 0;
  int segment = 1;  // most vectors of the projection's inputs that are multiplied together
  int row = 0;  // pixels per row of the ring, with padding
  bool scales_map = false;  // whether squeeze-and-excitation scales the map instead of the projection's weights

  Product expand;  // or the stem's
  float* filters = nullptr;  // [vector][ky][kx][lane]
  float* bias = nullptr;
  void* squeeze_weights = nullptr;  // [squeezed][expanded channel]
  void* excite_weights = nullptr;  // [vector][squeezed][lane]
  float *squeeze_bias = nullptr, *excite_bias = nullptr;
  Product project;

  EFFNET_INLINE int pixels() const { return output * output; }
  EFFNET_INLINE int segments() const { return (vectors + segment - 1) / segment; }
  EFFNET_INLINE int first(int part) const {
    return (int)((ptrdiff_t)vectors * part / chunks);
  }  // first vector of a chunk
};

struct Head {
  int pixels = 0, in_lanes = 0;
  Activation activation = Activation::silu;
  Product product;  // outputs 0: no head, so the last map is pooled
  int features = 0, feature_lanes = 0;  // of the pooled features
  int classes = 0;
  void* classifier = nullptr;  // [class][feature]
  float* bias = nullptr;
};

// The buffers of one image.
struct Context {
  void* image = nullptr;  // padded
  void* maps[2] = {nullptr, nullptr};
  void* depthwise = nullptr;
  void* scaled = nullptr;  // the projection's weights times the gate
  float* sums = nullptr;  // [band][expanded channel]
  float *hidden = nullptr, *gate = nullptr;
  void* pooled = nullptr;
};

// The buffers of one thread.
struct Workspace {
  float* ring = nullptr;
  float* pooled = nullptr;
  float* partial = nullptr;  // a projection's sums for a group of pixels
};

// Rows of weights that a thread reads next, in up to four pieces, to be prefetched.
constexpr int SOON = 4;
struct Soon {
  const char* from[SOON] = {};
  size_t bytes[SOON] = {};
  int count = 0;

  EFFNET_INLINE void add(const void* weights, size_t row, int begin, int end) {
    from[count] = (const char*)weights + begin * row;
    bytes[count++] = (end - begin) * row;
  }
};

// The kernels of an instruction set in one precision. Ranges are [first, end).
struct Kernels {
  int lanes;
  int pair;  // inputs that a product multiplies in one step: 1, or 2 in bf16
  int element;  // bytes per value in maps and weights
  int chunk;  // preferred number of vectors of expanded channels
  int tile;  // most vectors of outputs per tile of a projection
  float scale;  // of SiLU: from `scale` times its input, kernels compute `scale` times its output
  void (*image)(const Stem&, const uint8_t* pixels, void* image, int row, int end);
  void (*depthwise)(const Block&, const Stem&, const void* x, Context&, Workspace&, int chunk, int band, int end, Soon);
  void (*squeeze)(const Block&, Context&, Workspace&, int unit, int end);
  void (*excite)(const Block&, Context&, int vector, int end);
  void (*project)(const Block&, const void* x, void* y, const Context&, Workspace&, int tile, int tile_end, int pixel,
                  int end, Soon);
  void (*stem)(const Stem&, Activation, const void* image, void* y, int row, int end);
  void (*head)(const Head&, const void* x, Context&, float* map, int tile, Soon);
  void (*classify)(const Head&, const Context&, float* logits, int unit, int end);
};

}  // namespace effnet
