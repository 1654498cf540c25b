// A network as plain sizes and pointers: what the engine lays out once and the kernels of every instruction set read.
//
// Feature maps between blocks are NHWC, their channels padded with zeros to whole vectors ("lanes"). Inside a block the
// expanded map lives in a ring of a few rows, and the depthwise convolution's output as [vector of
// channels][pixel][lane].
#pragma once
#include <cstddef>
#include <cstdint>

// Always inlined: a copy compiled for one instruction set must not stand in for another's.
#define EFFNET_INLINE inline __attribute__((always_inline))

namespace effnet {

enum class Activation : int32_t { none, silu, relu6, relu };
enum class Source : int32_t { map, expand, stem };  // where a block's depthwise convolution gets its input from

constexpr int BANDS = 8;  // of rows: sums over a map are taken in as many parts, whatever the number of threads
constexpr int GROUP = 384;  // pixels that a projection takes together, at most
constexpr int SEGMENT = 2048;  // bytes of each pixel that it takes together, nearly at most
constexpr int LARGEST_TILE = 5;  // vectors of outputs that a matrix product computes together, at most

// A matrix product with `outputs` rows of `inputs` weights, packed in tiles of a few vectors of outputs.
struct Product {
  int inputs = 0, outputs = 0;
  int depth = 0;  // inputs as packed: rounded up to pairs, or to whole vectors
  int vectors = 0;  // of outputs
  int tiles = 0;
  void* weights = nullptr;  // per tile: [depth][vectors of the tile][lane], in bf16 as pairs of inputs
  float* bias = nullptr;  // one for each lane

  EFFNET_INLINE int first(int tile) const {
    return (int)((ptrdiff_t)vectors * tile / tiles);
  }  // vector with which a tile begins
};

struct Stem {
  int size = 0, channels = 0;  // of the image
  int kernel = 0, stride = 0, pad = 0;
  int output = 0;  // height and width of its output
  int pitch = 0;  // elements of a row of the padded image
  int rows = 0;  // of the padded image
  float* mean = nullptr;  // a row of it, repeated for each pixel
  Product product;  // inputs: kernel rows of `block` elements each
  int block = 0;  // elements of a kernel row as packed
};

struct Block {
  Source source = Source::map;
  int input = 0, output = 0;  // height and width of its maps
  int in = 0, wide = 0, out = 0;  // channels
  int in_lanes = 0, out_lanes = 0;  // the same as stored
  int vectors = 0;  // of expanded channels
  int kernel = 0, stride = 0, pad = 0;
  int squeeze = 0;
  bool shortcut = false;
  Activation activation = Activation::silu;
  int chunk = 0;  // vectors of expanded channels that are computed together, at most
  int chunks = 0;
  int segment = 1;  // vectors of the projection's inputs that go together, at most
  int row = 0;  // pixels of a row in the ring, with padding
  bool scales_map = false;  // whether squeeze-and-excitation scales the map rather than the projection's weights

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
  }  // vector with which a chunk begins
};

struct Head {
  int pixels = 0, in_lanes = 0;
  Activation activation = Activation::silu;
  Product product;  // outputs 0: there is none, the last map is pooled
  int features = 0, feature_lanes = 0;  // of the pooled features
  int classes = 0;
  void* classifier = nullptr;  // [class][feature]
  float* bias = nullptr;
};

// What one image needs on its way.
struct Context {
  void* image = nullptr;  // padded
  void* maps[2] = {nullptr, nullptr};
  void* depthwise = nullptr;
  void* scaled = nullptr;  // the projection's weights times the gate
  float* sums = nullptr;  // [band][expanded channel]
  float *hidden = nullptr, *gate = nullptr;
  void* pooled = nullptr;
};

// What one thread needs.
struct Workspace {
  float* ring = nullptr;
  float* pooled = nullptr;
  float* partial = nullptr;  // sums of a projection of a group of pixels
};

// What a thread reads next, to be fetched into the cache meanwhile: rows of weights, in up to four pieces.
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

// The work of an instruction set in a precision. Ranges are [first, end).
struct Kernels {
  int lanes;
  int pair;  // inputs that a product multiplies in one step: 1, or 2 in bf16
  int element;  // bytes of a value in maps and weights
  int chunk;  // vectors of expanded channels that it likes best
  int tile;  // vectors of outputs of a projection, at most
  float scale;  // of SiLU: kernels compute `scale` times it, of `scale` times its input
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
