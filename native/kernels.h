// The kernels: one source for every instruction set. A translation unit kernels_<isa>.cpp defines LANES (floats per
// vector), REGISTERS (vector registers) and NAMESPACE, and includes this file, so that the linker cannot mistake a
// function of one instruction set for another's. For the same reason the standard library is not used here.
#include "network.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace effnet {
namespace NAMESPACE {

#include "vectors.h"

// ------------------------------------------------------------------------------------------------ matrix products
#define DIVIDE(i) ((i) % 2 == 0)  // alternates the two methods of silu()
constexpr int PIXELS = 8;  // per tile, at most
constexpr int most_pixels(int vectors) {  // registers hold the accumulators, `vectors` of weights and one input
  int fitting = (REGISTERS - 1 - vectors) / vectors;
  return fitting < PIXELS ? fitting : PIXELS;
}
constexpr int TILE = REGISTERS >= 32 ? LARGEST_TILE : 3;

// Prefetches data that will be needed soon and is not in the cache, such as the weights of the late blocks at every
// image: each step of a product fetches some bytes. It fetches no faster than it must, since a burst would delay the
// product's own loads.
struct Ahead {
  const char *at, *end;
  ptrdiff_t pace;  // bytes per step; 0 if nothing is left to fetch
  ptrdiff_t skip = 0;  // bytes to skip after each run of steps
  Soon later = {};  // what to fetch afterwards

  INLINE Ahead(const void* from, size_t bytes, ptrdiff_t pace) : at((const char*)from), end(at + bytes), pace(pace) {}
  INLINE Ahead(const Soon& soon, ptrdiff_t steps) : at(nullptr), end(nullptr), pace(0), later(soon) {
    size_t bytes = 0;
    for (size_t each : soon.bytes) bytes += each;
    if (bytes) pace = steps > 0 && bytes / steps < 64 ? bytes / steps + 1 : 64;
    advance(0);
  }
  INLINE void fetch(ptrdiff_t step) const { __builtin_prefetch(at + step * pace, 0, 2); }
  INLINE void advance(ptrdiff_t steps) {
    at += steps * pace + skip;
    if (at >= end && pace) begin_next();
  }
  INLINE void begin_next() {
    for (int i = 0; i < SOON; i++)
      if (later.bytes[i]) {
        at = later.from[i], end = at + later.bytes[i], later.bytes[i] = 0;
        return;
      }
    pace = skip = 0, at = end;
  }
};

// totals += inputs x weights for M pixels, which are `apart` elements apart, and N vectors of outputs
template <class T, int M, int N> static INLINE void multiply(Vector (&totals)[M][N], const T* inputs, ptrdiff_t apart,
                                                             const T* weights, int depth, const Ahead& ahead) {
  typedef Input<T> In;
#pragma GCC unroll 4
  for (int k = 0; k < depth; k += In::PAIR) {
    typename In::Type w[N];
    UNROLL for (int n = 0; n < N; n++)
      w[n] = In::some(weights + n * LANES * In::PAIR);
    UNROLL for (int m = 0; m < M; m++) {
      typename In::Type x = In::each(inputs + m * apart + k);
      UNROLL for (int n = 0; n < N; n++)
        totals[m][n] = In::add_product(totals[m][n], x, w[n]);
    }
    weights += N * LANES * In::PAIR;
    ahead.fetch(k / In::PAIR);
  }
}

// The inputs of a tile: `blocks` runs of `depth` inputs, `stride` elements apart, for pixels `apart` elements apart.
template <class T> struct Inputs {
  const T* from;
  ptrdiff_t apart, stride;
  int blocks, depth;
};

template <int M, int N> static INLINE void begin(Vector (&totals)[M][N], const float* bias) {
  UNROLL for (int n = 0; n < N; n++) {
    Vector b = load(bias + n * LANES);
    UNROLL for (int m = 0; m < M; m++)
      totals[m][n] = b;
  }
}

template <class T, int M, int N>
static INLINE void multiply_blocks(Vector (&totals)[M][N], Inputs<T> in, const T* weights, Ahead& ahead) {
#pragma GCC unroll 1
  for (int i = 0; i < in.blocks; i++) {
    multiply<T, M, N>(totals, in.from, in.apart, weights, in.depth, ahead);
    ahead.advance(in.depth / Input<T>::PAIR);
    in.from += in.stride;
    weights += (ptrdiff_t)in.depth * N * LANES;
  }
}

// The work of a tile, compiled for each number of pixels that fits the registers and up to MOST vectors of outputs
template <class Work, int MOST> struct Tiles {
  typedef void (*Function)(Work&, ptrdiff_t pixel);
  Function at[MOST + 1][PIXELS + 1] = {};

  constexpr Tiles() { fill<1, 1>(); }
  template <int M, int N> constexpr void fill() {
    if constexpr (M <= most_pixels(N)) {
      at[N][M] = &Work::template run<M, N>;
      fill<M + 1, N>();
    } else if constexpr (N < MOST) {
      fill<1, N + 1>();
    }
  }
  // Runs pixels [pixel, end) in tiles of nearly equal size
  void run(Work& work, int vectors, ptrdiff_t pixel, ptrdiff_t end) const {
    const int most = most_pixels(vectors);
    for (ptrdiff_t tiles = (end - pixel + most - 1) / most; tiles > 0; tiles--) {
      const ptrdiff_t size = (end - pixel) / tiles;
      at[vectors][size](work, pixel);
      pixel += size;
    }
  }
};

// ------------------------------------------------------------------------------------------------ expansion
template <class T> struct Expansion {
  Inputs<T> in;  // of the first pixel of a row
  const T* weights;
  const float* bias;
  float* row;  // of the ring: [vector][pixel][lane]
  ptrdiff_t plane;  // floats between vectors
  Activation activation;
  Vector most;
  Ahead ahead;

  template <int M, int N> static void run(Expansion& e, ptrdiff_t pixel) {
    Vector totals[M][N];
    Inputs<T> in = e.in;
    in.from += pixel * in.apart;
    begin(totals, e.bias);
    multiply_blocks<T, M, N>(totals, in, e.weights, e.ahead);
    float* to = e.row + pixel * LANES;
    if (e.activation == Activation::silu) {
      UNROLL for (int n = 0; n < N; n++) UNROLL
        for (int m = 0; m < M; m++) store(to + n * e.plane + m * LANES, silu<T>(totals[m][n], DIVIDE(n * M + m)));
    } else {
      UNROLL for (int n = 0; n < N; n++) UNROLL
        for (int m = 0; m < M; m++)
          store(to + n * e.plane + m * LANES, smaller(larger(totals[m][n], all(0.f)), e.most));
    }
  }
};
template <class T> constexpr Tiles<Expansion<T>, CHUNK> EXPANSIONS{};

// ------------------------------------------------------------------------------------- depthwise convolution
template <class T> struct Depthwise {
  const float* const* rows;  // of the ring, one per row of the filters
  int first, end;  // rows of the filters that lie inside the map
  const float* filters;  // for one vector of channels: [ky][kx][lane]
  Vector bias;
  T* out;  // [pixel][lane]
  int kernel;
  Activation activation;
  Vector most;
  Vector sums;
};

template <class T, int KERNEL, int STRIDE, int M> static INLINE void depthwise_tile(Depthwise<T>& d, ptrdiff_t column) {
  const int kernel = KERNEL ? KERNEL : d.kernel;
  Vector totals[M];
  UNROLL for (int m = 0; m < M; m++)
    totals[m] = d.bias;
#pragma GCC unroll 1
  for (int y = d.first; y < d.end; y++) {
    const float* row = d.rows[y] + column * STRIDE * LANES;
    const float* filters = d.filters + (ptrdiff_t)y * kernel * LANES;
    if constexpr (KERNEL != 0) {
      Vector w[KERNEL];
      UNROLL for (int x = 0; x < KERNEL; x++)
        w[x] = load(filters + x * LANES);
#pragma GCC unroll 32  // fully, or the sums would spill to memory
      for (int i = 0; i < (M - 1) * STRIDE + KERNEL; i++) {
        Vector in = load(row + i * LANES);
        UNROLL for (int x = 0; x < KERNEL; x++)
          if ((i - x) % STRIDE == 0 && i >= x && (i - x) / STRIDE < M)
            totals[(i - x) / STRIDE] = in * w[x] + totals[(i - x) / STRIDE];
      }
    } else {
#pragma GCC unroll 1
      for (int x = 0; x < kernel; x++) {
        Vector w = load(filters + x * LANES);
        UNROLL for (int m = 0; m < M; m++)
          totals[m] = load(row + (m * STRIDE + x) * LANES) * w + totals[m];
      }
    }
  }
  if (d.activation == Activation::silu) {
    UNROLL for (int m = 0; m < M; m++)
      totals[m] = silu<T>(totals[m], DIVIDE(m));
  } else {
    UNROLL for (int m = 0; m < M; m++)
      totals[m] = smaller(larger(totals[m], all(0.f)), d.most);
  }
  UNROLL for (int m = 0; m < M; m++)
    store(d.out + (column + m) * LANES, totals[m]);
  Vector s = totals[0];
  UNROLL for (int m = 1; m < M; m++)
    s += totals[m];
  d.sums += s;
}

constexpr int COLUMNS = REGISTERS >= 32 ? 8 : 6;  // per tile, at most

template <class T, int KERNEL, int STRIDE> static void depthwise_row(Depthwise<T>& d, int width) {
  int column = 0;
  for (int tiles = (width + COLUMNS - 1) / COLUMNS; tiles > 0; tiles--) {
    int size = (width - column) / tiles;
    switch (size) {
      case 1: depthwise_tile<T, KERNEL, STRIDE, 1>(d, column); break;
      case 2: depthwise_tile<T, KERNEL, STRIDE, 2>(d, column); break;
      case 3: depthwise_tile<T, KERNEL, STRIDE, 3>(d, column); break;
      case 4: depthwise_tile<T, KERNEL, STRIDE, 4>(d, column); break;
      case 5: depthwise_tile<T, KERNEL, STRIDE, 5>(d, column); break;
      case 6: depthwise_tile<T, KERNEL, STRIDE, 6>(d, column); break;
#if REGISTERS >= 32
      case 7: depthwise_tile<T, KERNEL, STRIDE, 7>(d, column); break;
      case 8: depthwise_tile<T, KERNEL, STRIDE, 8>(d, column); break;
#endif
    }
    column += size;
  }
}

template <class T> static void depthwise_row(Depthwise<T>& d, int stride, int width) {
  switch (d.kernel * 2 + stride) {
    case 7: return depthwise_row<T, 3, 1>(d, width);
    case 8: return depthwise_row<T, 3, 2>(d, width);
    case 11: return depthwise_row<T, 5, 1>(d, width);
    case 12: return depthwise_row<T, 5, 2>(d, width);
    case 15: return depthwise_row<T, 7, 1>(d, width);
    case 16: return depthwise_row<T, 7, 2>(d, width);
    default: return stride == 1 ? depthwise_row<T, 0, 1>(d, width) : depthwise_row<T, 0, 2>(d, width);
  }
}

static INLINE Vector upper(Activation kind) { return all(kind == Activation::relu6 ? 6.f : 3.4e38f); }

// Computes a chunk of channels from a block's input to the depthwise map and its sums. Each row of the expanded map is
// computed when the first output row needs it, and overwritten after the last one has read it.
template <class T> static void depthwise(const Block& b, const Stem& stem, const void* input, Context& context,
                                         Workspace& space, int chunk, int band, int band_end, Soon soon) {
  const int first = b.first(chunk), vectors = b.first(chunk + 1) - first;
  const int top = b.output * band / BANDS, bottom = b.output * band_end / BANDS;
  const ptrdiff_t plane = (ptrdiff_t)b.row * LANES, slot = plane * vectors;
  const T* x = (const T*)input;

  const int tiles = (b.input + most_pixels(vectors) - 1) / most_pixels(vectors);  // of a row
  const ptrdiff_t steps = (ptrdiff_t)(bottom - top) * b.stride * tiles * b.expand.depth / Input<T>::PAIR;
  Expansion<T> e{{}, nullptr, nullptr, nullptr, plane, b.activation, upper(b.activation), {soon, steps}};
  if (b.source != Source::map) {
    e.weights = (const T*)b.expand.weights + (ptrdiff_t)first * LANES * b.expand.depth;
    e.bias = b.expand.bias + (ptrdiff_t)first * LANES;
    e.in = b.source == Source::stem
               ? Inputs<T>{x, (ptrdiff_t)stem.stride * stem.channels, stem.pitch, stem.kernel, stem.block}
               : Inputs<T>{x, b.in_lanes, 0, 1, b.expand.depth};
  }
  for (ptrdiff_t i = 0; i < b.kernel * vectors; i++) {  // the padding columns, which no row writes
    float* row = space.ring + i * plane;
    for (ptrdiff_t j = 0; j < b.pad * LANES; j += LANES) store(row + j, all(0.f));
    for (ptrdiff_t j = (ptrdiff_t)(b.pad + b.input) * LANES; j < plane; j += LANES) store(row + j, all(0.f));
  }

  Depthwise<T> d;
  d.kernel = b.kernel;
  d.activation = b.activation;
  d.most = e.most;
  const float* rows[64];
  d.rows = rows;
  int made = top * b.stride - b.pad;  // the first row of the expanded map that is not in the ring
  if (made < 0) made = 0;
  for (int y = top; y < bottom; y++) {
    const int above = y * b.stride - b.pad;  // the map's row under the first row of the filters
    const int last = above + b.kernel < b.input ? above + b.kernel : b.input;
    for (; made < last; made++) {
      float* row = space.ring + (made % b.kernel) * slot + b.pad * LANES;
      if (b.source == Source::map) {
        const T* from = x + (ptrdiff_t)made * b.input * b.in_lanes + first * LANES;
        for (int p = 0; p < b.input; p++, from += b.in_lanes)
          for (int v = 0; v < vectors; v++) store(row + v * plane + (ptrdiff_t)p * LANES, load(from + v * LANES));
        continue;
      }
      e.row = row;
      e.in.from =
          x + made * (b.source == Source::stem ? (ptrdiff_t)stem.stride * stem.pitch : (ptrdiff_t)b.input * b.in_lanes);
      EXPANSIONS<T>.run(e, vectors, 0, b.input);
    }
    d.first = above < 0 ? -above : 0;
    d.end = last - above;
    int in_band = band;
    while (y >= b.output * (in_band + 1) / BANDS) in_band++;
    for (int v = 0; v < vectors; v++) {
      const int channel = (first + v) * LANES;
      for (int k = d.first; k < d.end; k++) rows[k] = space.ring + ((above + k) % b.kernel) * slot + v * plane;
      d.filters = b.filters + (ptrdiff_t)channel * b.kernel * b.kernel;
      d.bias = load(b.bias + channel);
      d.out = (T*)context.depthwise + ((ptrdiff_t)(first + v) * b.pixels() + (ptrdiff_t)y * b.output) * LANES;
      float* sums = context.sums + (ptrdiff_t)in_band * b.vectors * LANES + channel;
      d.sums = y == b.output * in_band / BANDS ? all(0.f) : load(sums);
      depthwise_row<T>(d, b.stride, b.output);
      store(sums, d.sums);
    }
  }
}

// ------------------------------------------------------------------------------------- squeeze-and-excitation
static INLINE float activate_one(float value, Activation kind) {
  Vector result = activate<float>(all(kind == Activation::silu ? SCALE * value : value), kind, upper(kind));
  return kind == Activation::silu ? result[0] / SCALE : result[0];
}

template <class T> static void squeeze(const Block& b, Context& context, Workspace& space, int unit, int end) {
  const ptrdiff_t wide = (ptrdiff_t)b.vectors * LANES;
  for (ptrdiff_t c = 0; c < wide; c += LANES) {
    Vector total = all(0.f);
    for (int band = 0; band < BANDS; band++)
      if (b.output * band / BANDS < b.output * (band + 1) / BANDS) total += load(context.sums + band * wide + c);
    store(space.pooled + c, total);
  }
  for (; unit < end; unit += 4) {
    const int units = end - unit < 4 ? end - unit : 4;
    const T* weights[4];
    Vector totals[4];
    UNROLL for (int u = 0; u < 4; u++) {
      weights[u] = (const T*)b.squeeze_weights + (unit + (u < units ? u : 0)) * wide;
      totals[u] = all(0.f);
    }
    for (ptrdiff_t c = 0; c < wide; c += LANES) {
      Vector x = load(space.pooled + c);
      UNROLL for (int u = 0; u < 4; u++)
        totals[u] = load(weights[u] + c) * x + totals[u];
    }
    for (int u = 0; u < units; u++)
      context.hidden[unit + u] = activate_one(sum(totals[u]) + b.squeeze_bias[unit + u], b.activation);
  }
}

static INLINE void scale_weights(const float* from, float* to, const float* gate) {
  store(to, load(from) * all(*gate));
}
static INLINE void scale_weights(const bf16* from, bf16* to, const float* gate) {  // LANES pairs of inputs
  Integers pairs = *(const Words*)from;
  Integers low = (Integers)((Vector)(pairs << 16) * all(gate[0]));
  Integers high = (Integers)((Vector)(pairs & (int32_t)0xffff0000) * all(gate[1]));
  low = ((low + 0x8000) >> 16) & 0xffff;
  *(Words*)to = low | ((high + 0x8000) & (int32_t)0xffff0000);
}

// Computes the gate for a range of channel vectors, and scales the smaller of the map and the projection's weights by
// it.
template <class T> static void excite(const Block& b, Context& context, int vector, int end) {
  for (int v = vector; v < end; v++) {
    Vector total = load(b.excite_bias + v * LANES);
    const T* weights = (const T*)b.excite_weights + (ptrdiff_t)v * b.squeeze * LANES;
    for (int u = 0; u < b.squeeze; u++) total = load(weights + u * LANES) * all(context.hidden[u]) + total;
    store(context.gate + v * LANES, 1.f / (power(total * SCALE) + 1.f));
  }
  if (b.scales_map) {
    for (int v = vector; v < end; v++) {
      T* map = (T*)context.depthwise + (ptrdiff_t)v * b.pixels() * LANES;
      Vector gate = load(context.gate + v * LANES);
      for (int p = 0; p < b.pixels(); p++) store(map + (ptrdiff_t)p * LANES, load(map + (ptrdiff_t)p * LANES) * gate);
    }
    return;
  }
  for (int t = 0; t < b.project.tiles; t++) {
    const int vectors = b.project.first(t + 1) - b.project.first(t);
    const ptrdiff_t begin = (ptrdiff_t)b.project.first(t) * LANES * b.project.depth;
    for (int k = vector * LANES; k < end * LANES; k += Input<T>::PAIR)
      for (int n = 0; n < vectors; n++) {
        const ptrdiff_t at = begin + (ptrdiff_t)k * vectors * LANES + n * LANES * Input<T>::PAIR;
        scale_weights((const T*)b.project.weights + at, (T*)context.scaled + at, context.gate + k);
      }
  }
}

// ------------------------------------------------------------------------------------------------ projection
template <class T> struct Projection {
  Inputs<T> in;
  const T* weights;
  const float* bias;
  const T* shortcut;  // or null
  T* out;
  ptrdiff_t apart;  // elements between output pixels
  float* partial;  // sums over the segments so far; bf16 would round them
  bool first, last;  // whether this is the first or last segment of the inputs
  bool fresh;  // whether these inputs have not been read yet
  Ahead ahead;

  template <int M, int N> static void run(Projection& p, ptrdiff_t pixel) {
    Vector totals[M][N];
    Inputs<T> in = p.in;
    in.from += pixel * in.apart;
    const ptrdiff_t at = pixel * p.apart;
    if (p.first) {
      begin(totals, p.bias);
    } else {
      UNROLL for (int m = 0; m < M; m++) UNROLL
        for (int n = 0; n < N; n++) totals[m][n] = load(p.partial + at + m * p.apart + n * LANES);
    }
    Ahead next(Soon(), 0), *ahead = &p.ahead;
    if (p.fresh && !ahead->pace) {  // prefetch the next pixels, which another core may have written
      const ptrdiff_t bytes = M * LANES * sizeof(T), stride = in.stride * sizeof(T);
      next = Ahead(in.from + M * LANES, in.blocks * stride, bytes / (LANES / Input<T>::PAIR));
      next.skip = stride - bytes;
      ahead = &next;
    }
    multiply_blocks<T, M, N>(totals, in, p.weights, *ahead);
    if (!p.last) {
      UNROLL for (int m = 0; m < M; m++) UNROLL
        for (int n = 0; n < N; n++) store(p.partial + at + m * p.apart + n * LANES, totals[m][n]);
      return;
    }
    if (p.shortcut) {
      UNROLL for (int m = 0; m < M; m++) UNROLL
        for (int n = 0; n < N; n++) totals[m][n] += load(p.shortcut + at + m * p.apart + n * LANES);
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL
      for (int n = 0; n < N; n++) store(p.out + at + m * p.apart + n * LANES, totals[m][n]);
  }
};
template <class T> constexpr Tiles<Projection<T>, TILE> PROJECTIONS{};

static INLINE float* partial_of(float* out, Workspace&, ptrdiff_t) { return out; }
static INLINE float* partial_of(bf16*, Workspace& space, ptrdiff_t begin) { return space.partial - begin; }

// Computes tiles of outputs for a group of pixels. Many inputs are split into segments, so that the group's part of the
// map stays in the cache while all tiles read it.
template <class T> static void project(const Block& b, const void* x, void* y, const Context& context, Workspace& space,
                                       int tile, int tile_end, int pixel, int end, Soon soon) {
  const Product& product = b.project;
  const void* weights = b.squeeze && !b.scales_map ? context.scaled : product.weights;
  const int segments = b.segments();
  Projection<T> p{{}, nullptr, nullptr, nullptr, nullptr, b.out_lanes, nullptr, false, false, false, {soon, 0}};
  const auto start = [&](int s) { return b.vectors * s / segments; };  // first vector of inputs
  const auto width = [&](int t) { return product.first(t + 1) - product.first(t); };
  const auto weights_of = [&](int s, int t) {
    return (const T*)weights +
           ((ptrdiff_t)product.first(t) * product.depth + (ptrdiff_t)start(s) * LANES * width(t)) * LANES;
  };
  for (int s = 0; s < segments; s++) {
    const int block = start(s), blocks = start(s + 1) - block;
    p.first = s == 0;
    p.last = s == segments - 1;
    p.in = {(const T*)context.depthwise + (ptrdiff_t)block * b.pixels() * LANES, LANES, (ptrdiff_t)b.pixels() * LANES,
            blocks, LANES};
    for (int t = tile; t < tile_end; t++) {
      const int first = product.first(t), most = most_pixels(width(t));
      const size_t row = (size_t)blocks * LANES * LANES * sizeof(T);  // bytes of a vector of outputs' weights
      const bool more = t + 1 < tile_end;
      p.weights = weights_of(s, t);
      p.bias = product.bias + first * LANES;
      p.shortcut = b.shortcut ? (const T*)x + first * LANES : nullptr;
      p.out = (T*)y + first * LANES;
      p.partial = partial_of(p.out, space, (ptrdiff_t)pixel * b.out_lanes - first * LANES);
      p.fresh = t == tile;
      if (!p.fresh && !p.ahead.pace && (more || !p.last)) {
        const ptrdiff_t steps = (ptrdiff_t)((end - pixel + most - 1) / most) * blocks * LANES / Input<T>::PAIR;
        Soon next;
        next.add(more ? weights_of(s, t + 1) : weights_of(s + 1, tile), row, 0, width(t));
        p.ahead = {next, steps};
      }
      PROJECTIONS<T>.run(p, width(t), pixel, end);
    }
  }
}

// ------------------------------------------------------------------------------------------------ ends
template <class T> static void image(const Stem& s, const uint8_t* pixels, void* to, int row, int end) {
  const int width = s.size * s.channels;
  for (; row < end; row++) {
    const uint8_t* from = pixels + (ptrdiff_t)row * width;
    T* out = (T*)to + (ptrdiff_t)(row + s.pad) * s.pitch + s.pad * s.channels;
    int i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, load(from + i) - load(s.mean + i));
    for (; i < width; i++) set(out + i, (float)from[i] - s.mean[i]);
  }
}

// The stem as a map of its own, if the first block expands it
template <class T>
static void stem(const Stem& s, Activation activation, const void* image, void* y, int row, int end) {
  const Product& product = s.product;
  const ptrdiff_t apart = (ptrdiff_t)product.vectors * LANES;
  for (; row < end; row++) {
    T* out = (T*)y + (ptrdiff_t)row * s.output * apart;
    for (int t = 0; t < product.tiles; t++) {
      const int first = product.first(t);
      Projection<T> p{{}, nullptr, nullptr, nullptr, nullptr, apart, nullptr, true, true, false, {Soon(), 0}};
      p.in = {(const T*)image + (ptrdiff_t)row * s.stride * s.pitch, (ptrdiff_t)s.stride * s.channels, s.pitch,
              s.kernel, s.block};
      p.weights = (const T*)product.weights + (ptrdiff_t)first * LANES * product.depth;
      p.bias = product.bias + first * LANES;
      p.out = out + first * LANES;
      PROJECTIONS<T>.run(p, product.first(t + 1) - first, 0, s.output);
    }
    const Vector scale = all(activation == Activation::silu ? 1 / SCALE : 1.f);
    for (ptrdiff_t i = 0; i < s.output * apart; i += LANES)
      store(out + i, activate<float>(load(out + i), activation, upper(activation)) * scale);
  }
}

template <class T> struct Pooling {
  Inputs<T> in;
  const T* weights;
  const float* bias;
  float* sums;
  float* map;  // or null
  ptrdiff_t apart;
  int lanes[LARGEST_TILE];  // features of each vector
  Activation activation;
  Vector most, scale;
  Ahead ahead;

  template <int M, int N> static void run(Pooling& p, ptrdiff_t pixel) {
    Vector totals[M][N];
    Inputs<T> in = p.in;
    in.from += pixel * in.apart;
    begin(totals, p.bias);
    multiply_blocks<T, M, N>(totals, in, p.weights, p.ahead);
    UNROLL for (int n = 0; n < N; n++) {
      Vector s = load(p.sums + n * LANES);
      UNROLL for (int m = 0; m < M; m++) {
        totals[m][n] = activate<T>(totals[m][n], p.activation, p.most);
        s += totals[m][n];
      }
      store(p.sums + n * LANES, s);
    }
    if (!p.map) return;
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++)
        for (int i = 0; i < p.lanes[n]; i++)
          p.map[(pixel + m) * p.apart + n * LANES + i] = totals[m][n][i] * p.scale[0];
  }
};
template <class T> constexpr Tiles<Pooling<T>, CHUNK> POOLINGS{};

// Computes a tile of the head's features: their averages and, if wanted, their map. Without a head, these are of the
// last block's output.
template <class T> static void head(const Head& h, const void* x, Context& context, float* map, int tile, Soon soon) {
  const Product& product = h.product;
  const bool scaled = product.outputs && h.activation == Activation::silu;
  const Vector scale = all(scaled ? 1 / SCALE : 1.f);
  float sums[LARGEST_TILE * LANES] = {};
  const int first = product.outputs ? product.first(tile) : tile;
  const int vectors = product.outputs ? product.first(tile + 1) - first : 1;
  const T* from = (const T*)x;
  if (product.outputs) {
    const int most = most_pixels(vectors);
    const ptrdiff_t steps = (ptrdiff_t)((h.pixels + most - 1) / most) * product.depth / Input<T>::PAIR;
    Pooling<T> p{{},
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 0,
                 {},
                 h.activation,
                 upper(h.activation),
                 scale,
                 {soon, steps}};
    p.in = {from, h.in_lanes, 0, 1, product.depth};
    p.weights = (const T*)product.weights + (ptrdiff_t)first * LANES * product.depth;
    p.bias = product.bias + first * LANES;
    p.sums = sums;
    p.map = map ? map + first * LANES : nullptr;
    p.apart = h.features;
    for (int n = 0; n < vectors; n++) {
      const int left = h.features - (first + n) * LANES;
      p.lanes[n] = left < LANES ? left : LANES;
    }
    POOLINGS<T>.run(p, vectors, 0, h.pixels);
  } else {
    Vector s = all(0.f);
    for (int p = 0; p < h.pixels; p++) {
      Vector value = load(from + (ptrdiff_t)p * h.in_lanes + first * LANES);
      s += value;
      for (int i = 0; map && i < LANES && first * LANES + i < h.features; i++)
        map[(ptrdiff_t)p * h.features + first * LANES + i] = value[i];
    }
    store(sums, s);
  }
  for (int n = 0; n < vectors; n++)
    store((T*)context.pooled + (ptrdiff_t)(first + n) * LANES, load(sums + n * LANES) * (scale * (1.f / h.pixels)));
}

template <class T> static void classify(const Head& h, const Context& context, float* logits, int unit, int end) {
  typedef Input<T> In;
  constexpr int STEP = LANES * In::PAIR, UNITS = 4;
  const T* features = (const T*)context.pooled;
  for (; unit < end; unit += UNITS) {
    const T* weights[UNITS];
    Vector totals[UNITS];
    UNROLL for (int u = 0; u < UNITS; u++) {
      weights[u] = (const T*)h.classifier + (ptrdiff_t)(unit + u < end ? unit + u : unit) * h.feature_lanes;
      totals[u] = all(0.f);
    }
    for (int k = 0; k < h.feature_lanes; k += STEP) {
      typename In::Type x = In::some(features + k);
      UNROLL for (int u = 0; u < UNITS; u++)
        totals[u] = In::add_product(totals[u], x, In::some(weights[u] + k));
    }
    for (int u = 0; u < UNITS && unit + u < end; u++) logits[unit + u] = sum(totals[u]) + h.bias[unit + u];
  }
}

template <class T> static constexpr Kernels table() {
  return {LANES,        Input<T>::PAIR, (int)sizeof(T), CHUNK,      TILE,    SCALE,   image<T>,
          depthwise<T>, squeeze<T>,     excite<T>,      project<T>, stem<T>, head<T>, classify<T>};
}

extern const Kernels BF16;
const Kernels BF16 = table<bf16>();
#if !defined(ONLY_BF16)
extern const Kernels FP32;
const Kernels FP32 = table<float>();
#endif

}  // namespace NAMESPACE
}  // namespace effnet
