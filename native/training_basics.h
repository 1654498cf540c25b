// Building blocks of the training kernels: parts of the work, scratch, rounding, activations, normalisation.

struct Range {
  ptrdiff_t first, end;
};
static INLINE Range share(ptrdiff_t total, int part, int parts) {
  return {total * part / parts, total * (part + 1) / parts};
}
static INLINE int smaller_of(int a, int b) { return a < b ? a : b; }

// Hands out scratch; starts at address 0 if bytes are only counted.
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
  return (((Integers)value + 0x8000) >> 16) & 0xffff;  // rounds ties away from zero: faster than to even
#else
  Integers bits = (Integers)value;
  return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
#endif
}

// Loads and stores of the first `left` lanes, if fewer than all are left; the others load as zero
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

// The type that products multiply: bf16 only if the processor multiplies pairs of them, else float, whatever the maps
// hold.
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
static INLINE Vector exact_power(Vector t) {  // 2^t, like power() but with relative error 1e-7
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

// Per-channel sums of a map and of its squares, after subtracting each channel's first value: short sums in fp32, long
// ones in double.
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

// Combines the parts' statistics by Chan's formula into mean and variance per channel, and fills norm.saved and the
// running statistics from them
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

// From the sums of a normalisation's output gradient g and of g (map - mean) over all `count` rows, computes the
// gradients of weight and bias, and the coefficients [3][channel] of the map's gradient: for g, for the map, and a
// constant.
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
