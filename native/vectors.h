// Vectors of one instruction set. Included inside the namespace of a translation unit, which defines LANES, the floats
// per vector. Intrinsics are used only where they beat the compiler's vector extensions.

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // at any address
typedef int32_t Words __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bf16 {
  uint16_t bits;
};

static INLINE Vector all(float value) { return value - Vector{}; }
static INLINE Vector load(const float* from) { return *(const Floats*)from; }
static INLINE Vector load(const uint8_t* from) { return __builtin_convertvector(*(const Bytes*)from, Vector); }
static INLINE void store(float* to, Vector value) { *(Floats*)to = value; }

static INLINE Vector load(const bf16* from) {
  return (Vector)(__builtin_convertvector((Halves) * (const Shorts*)from, Integers) << 16);
}
static INLINE void store(bf16* to, Vector value) {
#ifdef __AVX512BF16__
  *(Shorts*)to = (Halves)_mm512_cvtneps_pbh(value);
#else
  Integers bits = (Integers)value;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *(Shorts*)to = __builtin_convertvector(bits, Halves);
#endif
}

static INLINE float to_float(float value) { return value; }
static INLINE float to_float(bf16 value) {
  uint32_t bits = (uint32_t)value.bits << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
static INLINE void set(float* to, float value) { *to = value; }
static INLINE void set(bf16* to, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  to->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static INLINE Vector smaller(Vector a, Vector b) { return a > b ? b : a; }  // a if a is NaN
static INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }
static INLINE float sum(Vector value) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += value[i];
  return total;
}

// What a product reads at a time: a float, or a pair of bf16 for neighbouring inputs. `each` broadcasts one to all
// lanes, `some` loads one per lane.
template <class T> struct Input;

template <> struct Input<float> {
  static constexpr int PAIR = 1;
  typedef Vector Type;
  static INLINE Vector each(const float* from) { return all(*from); }
  static INLINE Vector some(const float* from) { return load(from); }
  static INLINE Vector add_product(Vector total, Vector a, Vector b) { return a * b + total; }
};

template <> struct Input<bf16> {
  static constexpr int PAIR = 2;
#ifdef __AVX512BF16__
  typedef __m512bh Type;
  static INLINE Type each(const bf16* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static INLINE Type some(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static INLINE Vector add_product(Vector total, Type a, Type b) { return _mm512_dpbf16_ps(total, a, b); }
#else
  typedef Integers Type;
  static INLINE Type each(const bf16* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, 4);
    return pair - Integers{};
  }
  static INLINE Type some(const bf16* from) { return *(const Words*)from; }
  static INLINE Vector add_product(Vector total, Type a, Type b) {
    total = (Vector)(a << 16) * (Vector)(b << 16) + total;
    return (Vector)(a & (int32_t)0xffff0000) * (Vector)(b & (int32_t)0xffff0000) + total;
  }
#endif
};

// SiLU of x = t / SCALE, times SCALE: t / (1 + 2^t). The polynomials are minimax fits of 2^f in relative error.
constexpr float SCALE = -1.44269504088896341f;

// 2^t + summand, with relative error 4e-7 on AVX-512, 8e-8 elsewhere
static INLINE Vector power_plus(Vector t, Vector summand) {
#ifdef __AVX512F__
  // 1.5 * 2^19: the lowest bits of the sum are those of floor(16 t)
  Vector sum = _mm512_add_round_ps(t, all(786432.f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vector f = _mm512_reduce_ps(t, 4 << 4 | _MM_FROUND_TO_NEG_INF);  // t - floor(16 t) / 16
  Vector table = {1.f,           1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                  1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                  1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};  // 2^(i/16)
  Vector q = (2.4547958381e-01f * f + 6.9302419437e-01f) * f + 1.0000004235f;
  return q * _mm512_scalef_ps(_mm512_permutexvar_ps(_mm512_castps_si512(sum), table), t) + summand;
#else
  t = smaller(larger(t, all(-126.f)), all(126.f));
  const Vector magic = all(12582912.f);  // 1.5 * 2^23
  Vector sum = t + magic, f = t - (sum - magic);
  Vector q = 1.3276471960e-03f * f + 9.6755415026e-03f;
  q = ((((q * f + 5.5507132751e-02f) * f + 2.4022119721e-01f) * f + 6.9314696706e-01f) * f + 1.0000000717f);
  return (Vector)((Integers)q + ((Integers)sum << 23)) + summand;
#endif
}

static INLINE Vector power(Vector t) {  // 2^t
  return power_plus(t, all(0.f));
}

// `divide` selects one of two ways to compute the quotient. The divider runs in parallel with the multipliers, so a
// loop that alternates is faster.
template <class T> static INLINE Vector silu(Vector t, bool divide);
template <> INLINE Vector silu<float>(Vector t, bool divide) {
#ifdef __AVX512F__
  if (divide) return t / power_plus(t, all(1.f));
  Vector d = power_plus(smaller(t, all(126.f)), all(1.f));  // finite, since Newton's step would turn infinity into NaN
  Vector r = _mm512_rcp14_ps(d);
  return t * ((1.f - d * r) * r + r);
#else
  (void)divide;
  return t / power_plus(t, all(1.f));
#endif
}
template <> INLINE Vector silu<bf16>(Vector t, bool divide) {
#ifdef __AVX512F__
  Vector n = _mm512_roundscale_ps(t, 8), f = t - n;
  Vector q = ((5.5171668761e-02f * f + 2.4261113279e-01f) * f + 6.9326098644e-01f) * f + 9.9992807292e-01f;
  Vector d = _mm512_scalef_ps(q, n) + 1.f;
  return divide ? t / d : t * _mm512_rcp14_ps(d);  // relative error 1.4e-4
#else
  return silu<float>(t, divide);
#endif
}

template <class T> static INLINE Vector activate(Vector value, Activation kind, Vector most) {
  return kind == Activation::silu ? silu<T>(value, true) : smaller(larger(value, all(0.f)), most);
}
