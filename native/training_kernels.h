// The kernels of a training step: one source for every instruction set, as kernels.h is for inference.
#include "training.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace effnet {
namespace NAMESPACE {

#include "vectors.h"

// ------------------------------------------------------------------------------------------------------- basics
struct Range {
  ptrdiff_t first, end;
};
static INLINE Range share(ptrdiff_t total, int part, int parts) {
  return {total * part / parts, total * (part + 1) / parts};
}
static INLINE int smaller_of(int a, int b) { return a < b ? a : b; }

// Hands out scratch, from address 0 on where only the bytes are to be counted.
struct Space {
  uintptr_t at;
};
template <class T> static T* take(Space& space, ptrdiff_t count) {
  T* found = (T*)space.at;
  space.at += ((uintptr_t)count * sizeof(T) + 63) / 64 * 64;
  return found;
}

template <class Work> static INLINE void parallel(const Team& team, Work work) {
  team.run([](void* it, int part) { (*(Work*)it)(part); }, &work);
}

static INLINE Integers rounded_bits(Vector value) {  // as bf16, in the lower halves
#ifdef __AVX512BF16__
  return (Integers)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
#elif defined(__AVX512F__)
  return (((Integers)value + 0x8000) >> 16) & 0xffff;  // a tie goes away from zero: faster than to the even one
#else
  Integers bits = (Integers)value;
  return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
#endif
}

// The first `left` lanes, where fewer than all are left; the others are zero
#ifdef __AVX512F__
static INLINE __mmask16 lanes(ptrdiff_t left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }
static INLINE Vector load(const float* from, ptrdiff_t left) { return _mm512_maskz_loadu_ps(lanes(left), from); }
static INLINE void store(float* to, Vector value, ptrdiff_t left) { _mm512_mask_storeu_ps(to, lanes(left), value); }
static INLINE Vector load(const bf16* from, ptrdiff_t left) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes(left), from);
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static INLINE void store(bf16* to, Vector value, ptrdiff_t left) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, lanes(left), (__m256i)_mm512_cvtneps_pbh(value));
#else
  _mm512_mask_cvtepi32_storeu_epi16(to, lanes(left), (__m512i)rounded_bits(value));
#endif
}
#else
#define RARE __attribute__((noinline, cold))
template <class T> static RARE Vector load_some(const T* from, ptrdiff_t left) {
  T some[LANES] = {};
  for (int i = 0; i < left; i++) some[i] = from[i];
  return load(some);
}
template <class T> static RARE void store_some(T* to, Vector value, ptrdiff_t left) {
  T some[LANES];
  store(some, value);
  for (int i = 0; i < left; i++) to[i] = some[i];
}
template <class T> static INLINE Vector load(const T* from, ptrdiff_t left) {
  return left >= LANES ? load(from) : load_some(from, left);
}
template <class T> static INLINE void store(T* to, Vector value, ptrdiff_t left) {
  left >= LANES ? store(to, value) : store_some(to, value, left);
}
#endif

template <class T> static INLINE Vector as_stored(Vector value);
template <> INLINE Vector as_stored<float>(Vector value) { return value; }
template <> INLINE Vector as_stored<bf16>(Vector value) { return (Vector)(rounded_bits(value) << 16); }

// What products multiply: bf16 only where the processor multiplies pairs of them, else floats, whatever the maps hold.
#ifdef __AVX512BF16__
template <class T> using Factor = T;
#else
template <class T> using Factor = float;
#endif
template <class A, class B> constexpr bool SAME = false;
template <class A> constexpr bool SAME<A, A> = true;

template <class T> static INLINE void prefetch(const T* at) { __builtin_prefetch((const char*)at + 4096); }

// ------------------------------------------------------------------------------------- activation, normalisation
struct Slope {
  Vector value, slope;
};

#ifdef __AVX512F__
static INLINE Vector exact_power(Vector t) {  // 2^t, as power() but in relative error 1e-7
  const Vector magic = all(786432.f);  // 1.5 * 2^19: the lowest bits of the sum are those of round(16 t)
  Vector sum = t + magic, n = sum - magic, f = t - n;
  Vector table = {1.f,           1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                  1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                  1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};  // 2^(i/16)
  Vector q = ((5.5504108665e-02f * f + 2.4022650696e-01f) * f + 6.9314718056e-01f) * f + 1.f;
  return _mm512_scalef_ps(q * _mm512_permutexvar_ps(_mm512_castps_si512(sum), table), n);
}
#endif

template <class T> static INLINE Vector logistic(Vector z) {  // 1 / (1 + e^-z)
  Vector t = z * SCALE;
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 2) {
    Vector n = _mm512_roundscale_ps(t, 8), f = t - n;
    Vector q = ((5.5171668761e-02f * f + 2.4261113279e-01f) * f + 6.9326098644e-01f) * f + 9.9992807292e-01f;
    return _mm512_rcp14_ps(_mm512_scalef_ps(q, n) + 1.f);  // relative error 1.4e-4
  } else {
    Vector d = exact_power(smaller(t, all(126.f))) + 1.f;
    Vector r = _mm512_rcp14_ps(d);
    return (1.f - d * r) * r + r;
  }
#else
  return 1.f / power_plus(t, all(1.f));
#endif
}

template <class T> static INLINE Slope activated_slope(Vector z, Activation kind) {
  if (kind == Activation::silu) {
    Vector s = logistic<T>(z), value = z * s;
    return {value, value - value * s + s};
  }
  if (kind == Activation::none) return {z, all(1.f)};
  const Vector most = all(kind == Activation::relu6 ? 6.f : __builtin_inff());
  return {smaller(larger(z, all(0.f)), most), (Vector)((Integers)all(1.f) & ((z > 0.f) & (z < most)))};
}
template <class T> static INLINE Vector activated(Vector z, Activation kind) {
  if (kind == Activation::silu) return z * logistic<T>(z);
  return activated_slope<T>(z, kind).value;
}

static INLINE Vector normalised(Vector value, const TrainingLayer& layer, ptrdiff_t channel) {
  const float* scale = layer.norm.saved + 2 * (ptrdiff_t)layer.channels + channel;
  const ptrdiff_t left = layer.channels - channel;
  return value * load(scale, left) + load(scale + layer.channels, left);
}

// Sums of a map's channels and of their squares, less a first value of each: short sums in fp32, long ones in double.
struct Statistics {
  static constexpr ptrdiff_t SHORT = 256;  // rows
  float *shift, *sums, *squares;
  double *long_sums, *long_squares;
  int channels;
  ptrdiff_t rows = 0, recent = 0;

  Statistics(Space& space, int channels) : channels(channels) {
    const ptrdiff_t wide = (channels + LANES - 1) / LANES * LANES;
    shift = take<float>(space, wide), sums = take<float>(space, wide), squares = take<float>(space, wide);
    long_sums = take<double>(space, wide), long_squares = take<double>(space, wide);
  }
  void begin() {
    rows = recent = 0;
    for (int c = 0; c < channels; c += LANES) store(sums + c, all(0.f)), store(squares + c, all(0.f));
    for (int c = 0; c < channels; c++) long_sums[c] = long_squares[c] = 0;
  }
  void count(ptrdiff_t more) {
    if ((recent += more) >= SHORT) finish();
  }
  void finish() {
    for (int c = 0; c < channels; c++) {
      long_sums[c] += sums[c], long_squares[c] += squares[c];
      sums[c] = squares[c] = 0;
    }
    rows += recent, recent = 0;
  }
};

// The batch's mean and variance of each channel, joined by Chan's formula, and what follows from them
static void normalise(const Statistics* found, int parts, const TrainingLayer& layer) {
  const TrainingNorm& norm = layer.norm;
  const ptrdiff_t channels = layer.channels;
  for (ptrdiff_t c = 0; c < channels; c++) {
    double rows = 0, mean = 0, squares = 0;
    for (int part = 0; part < parts; part++) {
      const Statistics& s = found[part];
      if (s.rows == 0) continue;
      const double count = (double)s.rows, moved = s.long_sums[c] / count;
      const double apart = s.shift[c] + moved - mean;
      squares += s.long_squares[c] - moved * s.long_sums[c] + apart * apart * rows * count / (rows + count);
      mean += apart * count / (rows + count);
      rows += count;
    }
    const double variance = squares > 0 ? squares / rows : 0;
    const double inverse = 1 / __builtin_sqrt(variance + (double)norm.eps);
    const double scale = norm.weight[c] * inverse;
    norm.saved[c] = (float)mean;
    norm.saved[channels + c] = (float)inverse;
    norm.saved[2 * channels + c] = (float)scale;
    norm.saved[3 * channels + c] = (float)(norm.bias[c] - mean * scale);
    if (!norm.running_mean) continue;
    const double unbiased = rows > 1 ? (squares > 0 ? squares : 0) / (rows - 1) : variance;
    norm.running_mean[c] += norm.momentum * (float)(mean - norm.running_mean[c]);
    norm.running_variance[c] += norm.momentum * (float)(unbiased - norm.running_variance[c]);
  }
}

// Sums of a normalisation's gradient g and of g (map - mean) over all `count` rows -> the gradients of weight and bias,
// and the coefficients [3][channel] of the map's gradient: of g, of the map, and a constant.
static void differentiate(const TrainingLayer& layer, double count, const float* sums, const float* products,
                          float* coefficients) {
  const TrainingNorm& norm = layer.norm;
  const ptrdiff_t channels = layer.channels;
  for (ptrdiff_t c = 0; c < channels; c++) {
    const double mean = norm.saved[c], inverse = norm.saved[channels + c], slope = products[c] * inverse;
    const double by_gradient = norm.weight[c] * inverse, by_map = -by_gradient * inverse * slope / count;
    norm.weight_gradient[c] = (float)slope;
    norm.bias_gradient[c] = sums[c];
    coefficients[c] = (float)by_gradient;
    coefficients[channels + c] = (float)by_map;
    coefficients[2 * channels + c] = (float)-(by_gradient * sums[c] / count + by_map * mean);
  }
}

#include "training_products.h"
#include "training_depthwise.h"

// ------------------------------------------------------------------------------------------------ pointwise layers
// Rows that a part takes together, so that they stay in the second cache while all weights pass
static INLINE ptrdiff_t block_rows(ptrdiff_t channels) {
  const ptrdiff_t rows = 40000 / channels / ROWS * ROWS;
  return rows < ROWS ? ROWS : rows > 8 * ROWS ? 8 * ROWS : rows;
}

// What a product reads: rows of a map; rows after normalisation, activation and gate; or patches of an image.
template <class T> struct Operand {
  const TrainingSegment& s;
  const T* map;
  int channels;
  const TrainingLayer* before;  // whose output the map is, or null
  const float* gate;  // [image][channel], or null
  bool patches;
  typedef Factor<T> F;

  static Operand of_layer(const TrainingSegment& s) {
    const bool patches = s.kernel > 1 || s.stride > 1;
    return {s, (const T*)s.x, patches ? s.kernel * s.kernel * s.inputs : s.inputs, nullptr, nullptr, patches};
  }
  bool in_place() const { return SAME<T, F> && !before && !patches; }
  ptrdiff_t apart() const { return in_place() ? channels : depth_of<F>(channels); }

  // `count` rows from `first` on: in the map itself, or made in `space`
  const F* rows(ptrdiff_t first, ptrdiff_t count, F* space) const {
    if (patches) {
      for (ptrdiff_t r = 0; r < count; r++) patch(first + r, space + r * apart());
      return space;
    }
    if (in_place()) return (const F*)map + first * channels;
    const ptrdiff_t pixels = s.out_pixels();
    for (ptrdiff_t r = 0; r < count; r++) {
      const T* from = map + (first + r) * channels;
      F* to = space + r * apart();
      const float* factors = gate ? gate + (first + r) / pixels * channels : nullptr;
      for (int c = 0; c < channels; c += LANES) {
        prefetch(from + c);
        const ptrdiff_t left = channels - c;
        Vector value = load(from + c, left);
        if (before) value = activated<T>(normalised(value, *before, c), before->activation);
        if (factors) value *= load(factors + c, left);
        store(to + c, value, left);
      }
    }
    return space;
  }

 private:
  void patch(ptrdiff_t row, F* to) const {
    const int x = (int)(row % s.out_width) * s.stride - s.pad_left;
    const int y = (int)(row / s.out_width % s.out_height) * s.stride - s.pad_top;
    const T* image = map + row / s.out_pixels() * s.in_pixels() * s.inputs;
    for (int i = 0; i < s.kernel; i++)
      for (int j = 0; j < s.kernel; j++) {
        const bool inside = y + i >= 0 && y + i < s.height && x + j >= 0 && x + j < s.width;
        const T* from = image + ((ptrdiff_t)(y + i) * s.width + x + j) * s.inputs;
        for (int c = 0; c < s.inputs; c++) set(to++, inside ? to_float(from[c]) : 0.f);
      }
    for (ptrdiff_t c = channels; c < apart(); c++) set(to++, 0.f);
  }
};

// Keeps a product's tiles in a map and counts their statistics
template <class T> struct Counting {
  T* to;
  Statistics& statistics;
  bool begins;

  template <int M, int N> INLINE void take(Vector (&totals)[M][N], ptrdiff_t row, ptrdiff_t channel) {
    UNROLL for (int n = 0; n < N; n++) {
      const ptrdiff_t c = channel + n * LANES, channels = statistics.channels, left = channels - c;
      if (begins && row == 0) store(statistics.shift + c, as_stored<T>(totals[0][n]));
      const Vector shift = load(statistics.shift + c);
      Vector sum = load(statistics.sums + c), squares = load(statistics.squares + c);
      _Pragma("GCC unroll 24") for (int m = 0; m < M; m++) {
        store(to + (row + m) * channels + c, totals[m][n], left);
        Vector d = as_stored<T>(totals[m][n]) - shift;
        sum += d;
        squares = d * d + squares;
      }
      store(statistics.sums + c, sum);
      store(statistics.squares + c, squares);
    }
  }
};

template <class T> struct ProductForward {
  ptrdiff_t block;
  Factor<T>* rows;
  Statistics statistics;

  ProductForward(Space& space, const Operand<T>& in, int outputs)
      : block(block_rows(in.channels)), rows(take<Factor<T>>(space, block * in.apart())), statistics(space, outputs) {}

  void run(const Operand<T>& in, const Packed<Factor<T>>& weights, T* out, Range mine) {
    statistics.begin();
    for (ptrdiff_t r = mine.first; r < mine.end; r += block) {
      const ptrdiff_t count = mine.end - r < block ? mine.end - r : block;
      Counting<T> work{out + r * weights.outputs, statistics, r == mine.first};
      product(in.rows(r, count, rows), in.apart(), count, weights, work);
      statistics.count(count);
    }
    statistics.finish();
  }
};

// The gradient of a layer's map: from that of its output, dropped and before the activation, or from one that is
// already before the activation
template <class T> struct MapGradient {
  const T *gradient, *map;
  const TrainingLayer& layer;
  const float* drop;  // [image], or null
  ptrdiff_t pixels;  // of an image
  Activation activation;
  const float* coefficients;

  INLINE Vector of_norm(ptrdiff_t row, ptrdiff_t c, ptrdiff_t left, Vector m) const {
    const ptrdiff_t at = row * layer.channels + c;
    prefetch(gradient + at);
    Vector value = load(gradient + at, left);
    if (activation != Activation::none) value *= activated_slope<T>(normalised(m, layer, c), activation).slope;
    return drop ? value * drop[row / pixels] : value;
  }
  INLINE Vector of_map(ptrdiff_t row, ptrdiff_t c) const {
    const ptrdiff_t left = layer.channels - c, at = row * layer.channels + c;
    prefetch(map + at);
    const Vector m = load(map + at, left);
    const float* k = coefficients + c;
    return of_norm(row, c, left, m) * load(k, left) +
           (m * load(k + layer.channels, left) + load(k + 2 * (ptrdiff_t)layer.channels, left));
  }

  // Sums of a part's rows: [2][channel]
  void sum(Range mine, float* sums) const {
    const int channels = layer.channels;
    const ptrdiff_t wide = vectors_of(channels) * LANES, block = block_rows(channels);
    for (ptrdiff_t i = 0; i < 2 * wide; i += LANES) store(sums + i, all(0.f));
    for (ptrdiff_t first = mine.first; first < mine.end; first += block) {
      const ptrdiff_t end = first + block < mine.end ? first + block : mine.end;
      for (int c = 0; c < channels; c += LANES) {
        const ptrdiff_t left = channels - c;
        const Vector mean = load(layer.norm.saved + c, left);
        Vector total = all(0.f), products = all(0.f);
        for (ptrdiff_t r = first; r < end; r++) {
          const Vector m = load(map + r * channels + c, left), value = of_norm(r, c, left, m);
          total += value;
          products = value * (m - mean) + products;
        }
        store(sums + c, load(sums + c) + total);
        store(sums + wide + c, load(sums + wide + c) + products);
      }
    }
  }
};

// Rows as a product reads them and stacked as a product over rows does
template <class T> struct Block {
  Stacked<T> stacked;
  T* rows;

  Block(Space& space, ptrdiff_t count, ptrdiff_t channels)
      : stacked(space, count, channels), rows(Input<T>::PAIR == 1 ? stacked.at : take<T>(space, count * stacked.wide)) {}

  template <class Value> INLINE void fill(ptrdiff_t count, Value value) const {
    for (ptrdiff_t r = 0; r < count; r += 2)
      for (ptrdiff_t c = 0; c < stacked.wide; c += LANES) {
        const Vector first = value(r, c), second = r + 1 < count ? value(r + 1, c) : all(0.f);
        stacked.put_two(r, c, first, second);
        if (Input<T>::PAIR == 1) continue;
        store(rows + r * stacked.wide + c, first);
        if (r + 1 < count) store(rows + (r + 1) * stacked.wide + c, second);
      }
  }
};

// A pointwise layer's backward pass: the gradients of its input and, as [input][output], of its weights
template <class T> struct ProductBackward {
  ptrdiff_t block;
  Block<Factor<T>> gradients;
  Stacked<Factor<T>> inputs;
  Factor<T>* rows;
  float* weights_gradient;

  ProductBackward(Space& space, const Operand<T>& in, int outputs)
      : block(block_rows(outputs)),
        gradients(space, block, outputs),
        inputs(space, block, in.channels),
        rows(take<Factor<T>>(space, block * in.apart())),
        weights_gradient(take<float>(space, in.channels * gradients.stacked.wide)) {}

  void run(const Operand<T>& in, const MapGradient<T>& out, const Packed<Factor<T>>& weights, T* to, const T* plus, Range mine) {
    const ptrdiff_t vectors = gradients.stacked.wide / LANES;
    for (ptrdiff_t i = 0; i < in.channels * gradients.stacked.wide; i += LANES) store(weights_gradient + i, all(0.f));
    for (ptrdiff_t r = mine.first; r < mine.end; r += block) {
      const ptrdiff_t count = mine.end - r < block ? mine.end - r : block;
      gradients.fill(count, [&](ptrdiff_t i, ptrdiff_t c) __attribute__((always_inline)) { return out.of_map(r + i, c); });
      const Factor<T>* x = in.rows(r, count, rows);
      for (ptrdiff_t i = 0; i < count; i += 2)
        for (ptrdiff_t c = 0; c < inputs.wide; c += LANES) {
          const ptrdiff_t left = in.channels - c;
          inputs.put_two(i, c, load(x + i * in.apart() + c, left),
                         i + 1 < count ? load(x + (i + 1) * in.apart() + c, left) : all(0.f));
        }
      if (to) {
        Keeping<T> work{to + r * in.channels, plus ? plus + r * in.channels : nullptr, in.channels};
        product(gradients.rows, gradients.stacked.wide, count, weights, work);
      }
      outer_product<Factor<T>>(inputs, in.channels, gradients.stacked, 0, vectors, count, weights_gradient);
    }
  }
};

// -------------------------------------------------------------------- projection, squeeze-and-excitation: backwards
// Sums of an image's rows that the gate's gradient and the normalisation's need, of the gradient g of the projection's
// input, the activation a, its slope s, and the map m less its mean
enum Sums { G_A, G_S, S_ONLY, G_S_M, S_M, SUMS };

template <class T> struct ProjectBackward {
  ptrdiff_t block;
  Block<Factor<T>> gradients;
  Stacked<Factor<T>> inputs;
  float* weights_gradient;  // [output][input]

  ProjectBackward(Space& space, int inputs, int outputs)
      : block(block_rows(inputs)),
        gradients(space, block, outputs),
        inputs(space, block, inputs),
        weights_gradient(take<float>(space, outputs * this->inputs.wide)) {}

  // slots: [image + part][SUMS][channel]
  void run(const TrainingSegment& s, const MapGradient<T>& out, const Packed<Factor<T>>& weights, float* slots, int part,
           Range mine) {
    const int channels = s.depthwise.channels, outputs = s.project.channels;
    const ptrdiff_t pixels = s.out_pixels(), wide = inputs.wide;
    for (ptrdiff_t i = 0; i < outputs * wide; i += LANES) store(weights_gradient + i, all(0.f));
    ptrdiff_t begun = -1;  // the last image whose slot is begun
    for (ptrdiff_t r = mine.first; r < mine.end; r += block) {
      const ptrdiff_t count = mine.end - r < block ? mine.end - r : block;
      gradients.fill(count, [&](ptrdiff_t i, ptrdiff_t c) __attribute__((always_inline)) { return out.of_map(r + i, c); });
      T* to = (T*)s.scaled_gradient + r * channels;
      Keeping<T> work{to, nullptr, channels};
      product(gradients.rows, gradients.stacked.wide, count, weights, work);
      for (ptrdiff_t i = 0; i < count;) {
        const ptrdiff_t image = (r + i) / pixels, rest = (image + 1) * pixels - r, end = rest < count ? rest : count;
        float* slot = slots + (image + part) * SUMS * wide;
        if (image != begun)
          for (ptrdiff_t j = 0; j < SUMS * wide; j += LANES) store(slot + j, all(0.f));
        begun = image;
        const float* gate = s.squeeze ? s.gate + image * channels : nullptr;
        for (int c = 0; c < channels; c += LANES) sum(s, to + c, (const T*)s.depthwise.map + r * channels + c, gate, c, i, end, slot + c);
        i = end;
      }
      if (Input<Factor<T>>::PAIR == 2 && count % 2)
        for (ptrdiff_t c = 0; c < wide; c += LANES) inputs.put(count, c, all(0.f));
      outer_product<Factor<T>>(gradients.stacked, outputs, inputs, 0, wide / LANES, count, weights_gradient);
    }
  }

 private:
  INLINE void sum(const TrainingSegment& s, const T* gradient, const T* map, const float* gate, int c, ptrdiff_t first,
                  ptrdiff_t end, float* slot) {
    const TrainingLayer& layer = s.depthwise;
    const ptrdiff_t channels = layer.channels, left = channels - c, wide = inputs.wide;
    const Vector mean = load(layer.norm.saved + c, left), factor = gate ? load(gate + c, left) : all(1.f);
    Vector totals[SUMS] = {};
    auto row = [&](ptrdiff_t r) __attribute__((always_inline)) {
      prefetch(map + r * channels);
      const Vector m = load(map + r * channels, left), g = load(gradient + r * channels, left), d = m - mean;
      const Slope a = activated_slope<T>(normalised(m, layer, c), layer.activation);
      const Vector gs = g * a.slope;
      totals[G_S] += gs;
      totals[G_S_M] = gs * d + totals[G_S_M];
      if (gate) {
        totals[G_A] = g * a.value + totals[G_A];
        totals[S_ONLY] += a.slope;
        totals[S_M] = a.slope * d + totals[S_M];
      }
      return a.value * factor;
    };
    ptrdiff_t r = first;
    if (r % 2 && r < end) inputs.put(r, c, row(r)), r++;
    for (; r + 1 < end; r += 2) {
      const Vector one = row(r);
      inputs.put_two(r, c, one, row(r + 1));
    }
    if (r < end) inputs.put(r, c, row(r));
    UNROLL for (int i = 0; i < SUMS; i++)
      store(slot + i * wide, load(slot + i * wide) + totals[i]);
  }
};

// ------------------------------------------------------------------------------------------------ whole segments
// Sums of each part's rows of an image lie in slot image + part: parts follow each other, so no two share a slot.
struct Slots {
  ptrdiff_t rows;  // of all images
  ptrdiff_t pixels;
  int parts;

  INLINE bool has(int part, ptrdiff_t image) const {
    const Range mine = share(rows, part, parts);
    return mine.first < (image + 1) * pixels && mine.end > image * pixels;
  }
  INLINE int first(ptrdiff_t image) const {
    int part = 0;
    while (!has(part, image)) part++;
    return part;
  }
  // Adds up what the parts have of an image, in the slot that is returned
  float* join(float* slots, ptrdiff_t size, ptrdiff_t image) const {
    const int begin = first(image);
    float* to = slots + (image + begin) * size;
    for (int part = begin + 1; part < parts && has(part, image); part++) {
      const float* from = slots + (image + part) * size;
      for (ptrdiff_t i = 0; i < size; i += LANES) store(to + i, load(to + i) + load(from + i));
    }
    return to;
  }
};

// Sums of an image's normalised and activated rows
template <class T>
static void pool(const TrainingSegment& s, float* slots, int part, Range mine) {
  const TrainingLayer& layer = s.depthwise;
  const int channels = layer.channels;
  const ptrdiff_t pixels = s.out_pixels(), wide = vectors_of(channels) * LANES, block = block_rows(channels);
  for (ptrdiff_t r = mine.first; r < mine.end;) {
    const ptrdiff_t image = r / pixels, rest = (image + 1) * pixels;
    const ptrdiff_t last = rest < mine.end ? rest : mine.end, end = r + block < last ? r + block : last;
    float* sums = slots + (image + part) * wide;
    const bool begins = r == mine.first || r == image * pixels;
    for (int c = 0; c < channels; c += LANES) {
      const ptrdiff_t left = channels - c;
      Vector total = all(0.f);
      for (ptrdiff_t i = r; i < end; i++) {
        const T* from = (const T*)layer.map + i * channels + c;
        prefetch(from);
        total += activated<T>(normalised(load(from, left), layer, c), layer.activation);
      }
      store(sums + c, begins ? total : load(sums + c) + total);
    }
    r = end;
  }
}

template <class T> static void finish(const TrainingSegment& s, Range mine) {
  const TrainingLayer& layer = s.project;
  const int channels = layer.channels;
  const T *map = (const T*)layer.map, *x = (const T*)s.x;
  for (ptrdiff_t r = mine.first; r < mine.end; r++) {
    const float factor = s.drop ? s.drop[r / s.out_pixels()] : 1.f;
    for (int c = 0; c < channels; c += LANES) {
      const ptrdiff_t at = r * channels + c, left = channels - c;
      prefetch(map + at);
      Vector value = activated<T>(normalised(load(map + at, left), layer, c), layer.activation) * factor;
      if (s.shortcut) value += load(x + at, left);
      store((T*)s.y + at, value, left);
    }
  }
}

// Calls work(Size<kernel>, Size<stride>) for the depthwise convolution's
template <class Work> static void with_geometry(int kernel, int stride, Work work) {
  if (kernel == 3 && stride == 1) return work(Size<3>(), Size<1>());
  if (kernel == 3) return work(Size<3>(), Size<2>());
  if (kernel == 5 && stride == 1) return work(Size<5>(), Size<1>());
  if (kernel == 5) return work(Size<5>(), Size<2>());
  if (stride == 1) return work(Size<7>(), Size<1>());
  work(Size<7>(), Size<2>());
}
static INLINE Geometry geometry_of(const TrainingSegment& s) {
  return {s.kernel, s.stride, s.pad_top, s.pad_left, s.height, s.width, s.out_height, s.out_width, s.depthwise.channels};
}

// A pass over a segment. With scratch at address 0 its constructor counts the bytes.
template <class T> struct Pass {
  const TrainingSegment& s;
  const Team& team;
  const int parts, wide;  // channels of the depthwise convolution
  const Operand<T> expanded, projected;  // what the two pointwise products read
  const ptrdiff_t in_rows, out_rows;
  Space space;

  Pass(const TrainingSegment& s, const Team& team, uintptr_t scratch)
      : s(s),
        team(team),
        parts(team.parts),
        wide(s.depthwise.channels),
        expanded{s, (const T*)s.x, s.inputs, nullptr, nullptr, false},
        projected(s.is_layer() ? Operand<T>::of_layer(s)
                               : Operand<T>{s, (const T*)s.depthwise.map, wide, &s.depthwise,
                                            s.squeeze ? s.gate : nullptr, false}),
        in_rows(s.images * s.in_pixels()),
        out_rows(s.images * s.out_pixels()),
        space{scratch} {}

  ptrdiff_t padded(ptrdiff_t channels) const { return vectors_of(channels) * LANES; }
  const T* depthwise_input() const { return (const T*)(s.expand.channels ? s.expand.map : s.x); }
  const TrainingLayer* before_depthwise() const { return s.expand.channels ? &s.expand : nullptr; }

  // A part's own scratch, behind what all share
  Space own(int part, ptrdiff_t bytes) const { return {space.at + (uintptr_t)(part * bytes)}; }
};

static INLINE ptrdiff_t largest(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
template <class Buffers, class... Arguments> static ptrdiff_t bytes_of(const Arguments&... arguments) {
  Space counted{0};
  Buffers buffers(counted, arguments...);
  return (ptrdiff_t)counted.at;
}

template <class T> struct Forward : Pass<T> {
  typedef Pass<T> P;
  using P::expanded;
  using P::in_rows;
  using P::out_rows;
  using P::parts;
  using P::projected;
  using P::s;
  using P::space;
  using P::team;
  using P::wide;
  Packed<Factor<T>> expand, project;
  Packed<float> squeeze, excite;
  Statistics* found;
  float *slots, *hidden;
  ptrdiff_t bytes;  // of a part

  Forward(const TrainingSegment& s, const Team& team, uintptr_t scratch)
      : P(s, team, scratch),
        expand(space, s.inputs, s.expand.channels),
        project(space, projected.channels, s.project.channels),
        squeeze(space, wide, s.squeeze),
        excite(space, s.squeeze, wide),
        found(take<Statistics>(space, parts)),
        slots(take<float>(space, s.squeeze ? (s.images + parts) * this->padded(wide) : 0)),
        hidden(take<float>(space, (ptrdiff_t)s.images * s.squeeze)) {
    bytes = bytes_of<ProductForward<T>>(projected, s.project.channels);
    if (s.expand.channels) bytes = largest(bytes, bytes_of<ProductForward<T>>(expanded, s.expand.channels));
    if (wide)
      with_geometry(s.kernel, s.stride, [&](auto kernel, auto stride) {
        typedef DepthwiseForward<T, decltype(kernel)::value, decltype(stride)::value> Depthwise;
        bytes = largest(bytes, bytes_of<Depthwise>(geometry_of(s)));
      });
  }
  ptrdiff_t total() const { return (ptrdiff_t)space.at + parts * bytes; }

  void multiply(const Operand<T>& in, const Packed<Factor<T>>& weights, const TrainingLayer& layer, ptrdiff_t rows) {
    parallel(team, [&](int part) {
      Space own = this->own(part, bytes);
      ProductForward<T> work(own, in, layer.channels);
      work.run(in, weights, (T*)layer.map, share(rows, part, parts));
      found[part] = work.statistics;
    });
    normalise(found, parts, layer);
  }

  // Weights as the product reads them: [output][input], of patches [output][input][row][column]
  void pack_project(int part) {
    if (!projected.patches) return project.fill(s.project.weights, 1, projected.channels, part, parts);
    if (part) return;
    const int taps = s.kernel * s.kernel;
    float* sorted = (float*)this->own(0, bytes).at;
    for (int o = 0; o < s.project.channels; o++)
      for (int i = 0; i < s.inputs; i++)
        for (int tap = 0; tap < taps; tap++)
          sorted[(o * taps + tap) * s.inputs + i] = s.project.weights[(o * s.inputs + i) * taps + tap];
    project.fill(sorted, 1, projected.channels, 0, 1);
  }

  void run() {
    parallel(team, [&](int part) {
      pack_project(part);
      if (s.expand.channels) expand.fill(s.expand.weights, 1, s.inputs, part, parts);
      if (!s.squeeze) return;
      squeeze.fill(s.squeeze_weights, 1, wide, part, parts);
      excite.fill(s.excite_weights, 1, s.squeeze, part, parts);
    });
    if (s.expand.channels) multiply(expanded, expand, s.expand, in_rows);
    if (wide)
      with_geometry(s.kernel, s.stride, [&](auto kernel, auto stride) {
        typedef DepthwiseForward<T, decltype(kernel)::value, decltype(stride)::value> Depthwise;
        parallel(team, [&](int part) {
          Space own = this->own(part, bytes);
          Depthwise work(own, geometry_of(s));
          work.run(geometry_of(s), this->depthwise_input(), this->before_depthwise(), s.depthwise.weights,
                   (T*)s.depthwise.map, share((ptrdiff_t)s.images * s.out_height, part, parts));
          found[part] = work.statistics;
        });
        normalise(found, parts, s.depthwise);
      });
    if (s.squeeze) {
      parallel(team, [&](int part) { pool<T>(s, slots, part, share(out_rows, part, parts)); });
      parallel(team, [&](int part) { squeeze_and_excite(share(s.images, part, parts)); });
    }
    multiply(projected, project, s.project, out_rows);
    if (s.y) parallel(team, [&](int part) { finish<T>(s, share(out_rows, part, parts)); });
  }

  void squeeze_and_excite(Range mine) {
    const Slots joined{out_rows, s.out_pixels(), parts};
    const ptrdiff_t count = mine.end - mine.first, J = s.squeeze;
    const Activation activation = s.depthwise.activation;
    for (ptrdiff_t n = mine.first; n < mine.end; n++) {
      const float* sums = joined.join(slots, this->padded(wide), n);
      for (int c = 0; c < wide; c++) s.pooled[n * wide + c] = sums[c] / (float)s.out_pixels();
    }
    float *squeezed = s.squeezed + mine.first * J, *act = hidden + mine.first * J, *gate = s.gate + mine.first * wide;
    Keeping<float> squeezing{squeezed, nullptr, J}, exciting{gate, nullptr, wide};
    product<float>(s.pooled + mine.first * wide, wide, count, squeeze, squeezing);
    for (ptrdiff_t n = 0; n < count; n++)
      for (ptrdiff_t j = 0; j < J; j += LANES) {
        const ptrdiff_t at = n * J + j, left = J - j;
        Vector value = load(squeezed + at, left) + load(s.squeeze_bias + j, left);
        store(squeezed + at, value, left);
        store(act + at, activated<float>(value, activation), left);
      }
    product<float>(act, J, count, excite, exciting);
    for (ptrdiff_t n = 0; n < count; n++)
      for (ptrdiff_t c = 0; c < wide; c += LANES) {
        const ptrdiff_t at = n * wide + c, left = wide - c;
        store(gate + at, logistic<float>(load(gate + at, left) + load(s.excite_bias + c, left)), left);
      }
  }
};

template <class T> struct Backward : Pass<T> {
  typedef Pass<T> P;
  using P::expanded;
  using P::in_rows;
  using P::out_rows;
  using P::parts;
  using P::projected;
  using P::s;
  using P::space;
  using P::team;
  using P::wide;
  Packed<Factor<T>> expand, project;  // transposed
  Packed<float> squeeze, excite;
  Stacked<float> pooled, hidden, squeezed_gradient, gate_gradient;
  float *squeeze_gradient, *excite_gradient;  // [squeezed][channel]
  float *spread;  // [image][channel]: the gradient of the means
  float *coefficients, *part_sums, *sums, *slots;
  float** gradients;  // of weights, of each part
  ptrdiff_t bytes;

  Backward(const TrainingSegment& s, const Team& team, uintptr_t scratch)
      : P(s, team, scratch),
        expand(space, s.expand.channels, s.inputs),
        project(space, s.project.channels, projected.channels),
        squeeze(space, s.squeeze, wide),
        excite(space, wide, s.squeeze),
        pooled(space, s.squeeze ? s.images : 0, wide),
        hidden(space, s.squeeze ? s.images : 0, s.squeeze),
        squeezed_gradient(space, s.squeeze ? s.images : 0, s.squeeze),
        gate_gradient(space, s.squeeze ? s.images : 0, wide),
        squeeze_gradient(take<float>(space, s.squeeze * this->padded(wide))),
        excite_gradient(take<float>(space, s.squeeze * this->padded(wide))),
        spread(take<float>(space, s.squeeze ? (ptrdiff_t)s.images * wide : 0)),
        coefficients(take<float>(space, 3 * widest())),
        part_sums(take<float>(space, parts * 2 * widest())),
        sums(take<float>(space, 2 * widest())),
        slots(take<float>(space, wide ? (s.images + parts) * SUMS * this->padded(wide) : 0)),
        gradients(take<float*>(space, parts)) {
    if (s.is_layer()) {
      bytes = bytes_of<ProductBackward<T>>(projected, s.project.channels);
      return;
    }
    bytes = bytes_of<ProjectBackward<T>>(wide, s.project.channels);
    if (s.expand.channels) bytes = largest(bytes, bytes_of<ProductBackward<T>>(expanded, s.expand.channels));
    with_geometry(s.kernel, s.stride, [&](auto kernel, auto stride) {
      typedef DepthwiseBackward<T, decltype(kernel)::value, decltype(stride)::value> Depthwise;
      bytes = largest(bytes, bytes_of<Depthwise>(geometry_of(s)));
    });
  }
  ptrdiff_t total() const { return (ptrdiff_t)space.at + parts * bytes; }
  ptrdiff_t widest() const { return this->padded(largest(wide, s.project.channels)); }

  MapGradient<T> of_project() const {
    const TrainingLayer& layer = s.project;
    return {(const T*)s.y_gradient, (const T*)layer.map, layer, s.drop, s.out_pixels(), layer.activation, coefficients};
  }
  // The parts' sums [2][channel] -> the normalisation's gradients and the coefficients of its map's
  void differentiate_parts(const TrainingLayer& layer, double rows) {
    const ptrdiff_t size = 2 * this->padded(layer.channels);
    for (ptrdiff_t i = 0; i < size; i += LANES) {
      Vector total = load(part_sums + i);
      for (int part = 1; part < parts; part++) total += load(part_sums + part * size + i);
      store(sums + i, total);
    }
    differentiate(layer, rows, sums, sums + size / 2, coefficients);
  }
  // The parts' gradients [row][column, padded] -> one, as to[row * by_row + column * by_column]
  void join(ptrdiff_t rows, ptrdiff_t columns, float* to, ptrdiff_t by_row, ptrdiff_t by_column) {
    const ptrdiff_t pitch = this->padded(columns);
    parallel(team, [&](int part) {
      const Range mine = share(columns, part, parts);
      for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = mine.first; c < mine.end; c++) {
          float total = 0;
          for (int p = 0; p < parts; p++) total += gradients[p][r * pitch + c];
          to[r * by_row + c * by_column] = total;
        }
    });
  }

  void run() {
    parallel(team, [&](int part) {
      of_project().sum(share(out_rows, part, parts), part_sums + part * 2 * this->padded(s.project.channels));
      if (!projected.patches) project.fill(s.project.weights, projected.channels, 1, part, parts);
      if (s.expand.channels) expand.fill(s.expand.weights, s.inputs, 1, part, parts);
      if (!s.squeeze) return;
      squeeze.fill(s.squeeze_weights, wide, 1, part, parts);
      excite.fill(s.excite_weights, s.squeeze, 1, part, parts);
    });
    differentiate_parts(s.project, (double)out_rows);
    if (s.is_layer()) {
      multiply(projected, of_project(), project, out_rows, nullptr);
      if (!projected.patches) return join(projected.channels, s.project.channels, s.project.gradient, 1, s.inputs);
      const ptrdiff_t taps = (ptrdiff_t)s.kernel * s.kernel, outputs = s.project.channels;
      for (ptrdiff_t row = 0; row < projected.channels; row++) {  // a tap of an input
        const ptrdiff_t tap = row / s.inputs, input = row % s.inputs;
        for (ptrdiff_t o = 0; o < outputs; o++) {
          float total = 0;
          for (int p = 0; p < parts; p++) total += gradients[p][row * this->padded(outputs) + o];
          s.project.gradient[(o * s.inputs + input) * taps + tap] = total;
        }
      }
      return;
    }
    parallel(team, [&](int part) {
      Space own = this->own(part, bytes);
      ProjectBackward<T> work(own, wide, s.project.channels);
      work.run(s, of_project(), project, slots, part, share(out_rows, part, parts));
      gradients[part] = work.weights_gradient;
    });
    join(s.project.channels, wide, s.project.gradient, wide, 1);
    if (s.squeeze) squeeze_and_excite();
    else parallel(team, [&](int part) { sum_images(part); });
    differentiate(s.depthwise, (double)out_rows, sums, sums + this->padded(wide), coefficients);
    with_geometry(s.kernel, s.stride, [&](auto kernel, auto stride) {
      depthwise<decltype(kernel)::value, decltype(stride)::value>();
    });
    if (!s.expand.channels) return;
    differentiate_parts(s.expand, (double)in_rows);
    const MapGradient<T> gradient{(const T*)s.expanded_gradient, (const T*)s.expand.map, s.expand, nullptr, 1,
                                  Activation::none, coefficients};
    multiply(expanded, gradient, expand, in_rows, s.shortcut ? (const T*)s.y_gradient : nullptr);
    join(s.inputs, s.expand.channels, s.expand.gradient, 1, s.inputs);
  }

  void multiply(const Operand<T>& in, const MapGradient<T>& out, const Packed<Factor<T>>& weights, ptrdiff_t rows,
                const T* plus) {
    parallel(team, [&](int part) {
      Space own = this->own(part, bytes);
      ProductBackward<T> work(own, in, out.layer.channels);
      work.run(in, out, weights, (T*)s.x_gradient, plus, share(rows, part, parts));
      gradients[part] = work.weights_gradient;
    });
  }

  template <int KERNEL, int STRIDE> void depthwise() {
    typedef DepthwiseBackward<T, KERNEL, STRIDE> Work;
    const ptrdiff_t size = 2 * this->padded(wide);
    DepthwiseGradients<T> d;
    d.gradient = (const T*)s.scaled_gradient, d.map = (const T*)s.depthwise.map, d.x = this->depthwise_input();
    d.to = (T*)(s.expand.channels ? s.expanded_gradient : s.x_gradient);
    d.plus = s.shortcut ? (const T*)s.y_gradient : nullptr;
    d.weights = s.depthwise.weights;
    d.own = &s.depthwise, d.before = this->before_depthwise();
    d.coefficients = coefficients;
    d.gate = s.squeeze ? s.gate : nullptr, d.spread = spread;
    parallel(team, [&](int part) {
      Space own = this->own(part, bytes);
      Work work(own, geometry_of(s));
      work.run(geometry_of(s), d, share((ptrdiff_t)s.images * s.out_height, part, parts));
      gradients[part] = work.filter_gradient;
      for (ptrdiff_t i = 0; i < size; i += LANES) store(part_sums + part * size + i, load(work.sums + i));
    });
    for (ptrdiff_t c = 0; c < wide; c++)
      for (int tap = 0; tap < KERNEL * KERNEL; tap++) {
        float total = 0;
        for (int p = 0; p < parts; p++)
          total += gradients[p][(c / LANES * KERNEL * KERNEL + tap) * LANES + c % LANES];
        s.depthwise.gradient[c * KERNEL * KERNEL + tap] = total;
      }
  }

  // Over all images, for a part's channels: the sums of the depthwise normalisation's gradient
  void sum_images(int part) {
    const ptrdiff_t pitch = this->padded(wide);
    const Slots joined{out_rows, s.out_pixels(), parts};
    const Range mine = share(pitch / LANES, part, parts);
    for (ptrdiff_t c = mine.first * LANES; c < mine.end * LANES; c += LANES) {
      const ptrdiff_t left = wide - c;
      Vector total = all(0.f), products = all(0.f);
      for (int p = 0; p < parts; p++) {
        const Range rows = share(out_rows, p, parts);
        if (rows.first == rows.end) continue;
        for (ptrdiff_t n = rows.first / joined.pixels; n <= (rows.end - 1) / joined.pixels; n++) {
          const float* slot = slots + (n + p) * SUMS * pitch + c;
          const Vector gate = s.squeeze ? load(s.gate + n * wide + c, left) : all(1.f);
          total += gate * load(slot + G_S * pitch);
          products += gate * load(slot + G_S_M * pitch);
          if (!s.squeeze) continue;
          const Vector means = load(spread + n * wide + c, left);
          total += means * load(slot + S_ONLY * pitch);
          products += means * load(slot + S_M * pitch);
        }
      }
      store(sums + c, total);
      store(sums + pitch + c, products);
    }
  }

  void squeeze_and_excite() {
    const ptrdiff_t pitch = this->padded(wide), J = s.squeeze;
    const Slots joined{out_rows, s.out_pixels(), parts};
    parallel(team, [&](int part) {
      const Range mine = share(s.images, part, parts);
      const ptrdiff_t count = mine.end - mine.first;
      for (ptrdiff_t n = mine.first; n < mine.end; n++)
        for (ptrdiff_t c = 0; c < pitch; c += LANES) {
          const ptrdiff_t left = wide - c;
          Vector total = all(0.f);
          for (int p = joined.first(n); p < parts && joined.has(p, n); p++)
            total += load(slots + ((n + p) * SUMS + G_A) * pitch + c);
          const Vector gate = load(s.gate + n * wide + c, left);
          gate_gradient.put(n, c, total * gate * (1.f - gate));
          pooled.put(n, c, load(s.pooled + n * wide + c, left));
        }
      float* squeezed = squeezed_gradient.at + mine.first * squeezed_gradient.wide;
      Keeping<float> squeezing{squeezed, nullptr, squeezed_gradient.wide};
      product<float>(gate_gradient.at + mine.first * pitch, pitch, count, excite, squeezing);
      for (ptrdiff_t n = mine.first; n < mine.end; n++)
        for (ptrdiff_t j = 0; j < hidden.wide; j += LANES) {
          const ptrdiff_t left = J - j;
          const Slope a = activated_slope<float>(load(s.squeezed + n * J + j, left), s.depthwise.activation);
          float* gradient = squeezed_gradient.at + n * squeezed_gradient.wide + j;
          store(gradient, load(gradient) * a.slope);
          hidden.put(n, j, a.value);
        }
      Keeping<float> spreading{spread + mine.first * wide, nullptr, wide};
      product<float>(squeezed, squeezed_gradient.wide, count, squeeze, spreading);
      const float share_of_pixel = 1.f / (float)s.out_pixels();
      for (ptrdiff_t i = mine.first * wide; i < mine.end * wide; i++) spread[i] *= share_of_pixel;
    });
    parallel(team, [&](int part) {
      sum_images(part);
      const Range mine = share(pitch / LANES, part, parts);
      for (ptrdiff_t j = 0; j < J; j++)
        for (ptrdiff_t c = mine.first * LANES; c < mine.end * LANES; c += LANES)
          store(squeeze_gradient + j * pitch + c, all(0.f)), store(excite_gradient + j * pitch + c, all(0.f));
      outer_product<float>(squeezed_gradient, J, pooled, mine.first, mine.end, s.images, squeeze_gradient);
      outer_product<float>(hidden, J, gate_gradient, mine.first, mine.end, s.images, excite_gradient);
      for (ptrdiff_t c = mine.first * LANES; c < mine.end * LANES && c < wide; c++) {
        float bias = 0;
        for (ptrdiff_t n = 0; n < s.images; n++) bias += gate_gradient.at[n * pitch + c];
        s.excite_bias_gradient[c] = bias;
        for (ptrdiff_t j = 0; j < J; j++) {
          s.squeeze_gradient[j * wide + c] = squeeze_gradient[j * pitch + c];
          s.excite_gradient[c * J + j] = excite_gradient[j * pitch + c];
        }
      }
    });
    for (ptrdiff_t j = 0; j < J; j++) {
      float bias = 0;
      for (ptrdiff_t n = 0; n < s.images; n++) bias += squeezed_gradient.at[n * squeezed_gradient.wide + j];
      s.squeeze_bias_gradient[j] = bias;
    }
  }
};

template <class T> static void forward(const TrainingSegment& s, const Team& team) {
  Forward<T>(s, team, (uintptr_t)s.scratch).run();
}
template <class T> static void backward(const TrainingSegment& s, const Team& team) {
  Backward<T>(s, team, (uintptr_t)s.scratch).run();
}
template <class T> static ptrdiff_t scratch_bytes(const TrainingSegment& s, const Team& team) {
  return largest(Forward<T>(s, team, 0).total(), Backward<T>(s, team, 0).total());
}
template <class T> static constexpr TrainingKernels training_table() {
  return {forward<T>, backward<T>, scratch_bytes<T>};
}

extern const TrainingKernels TRAINING_BF16;
const TrainingKernels TRAINING_BF16 = training_table<bf16>();
#if !defined(ONLY_BF16)
extern const TrainingKernels TRAINING_FP32;
const TrainingKernels TRAINING_FP32 = training_table<float>();
#endif

}  // namespace NAMESPACE
}  // namespace effnet
