// Matrix products of a training step: maps times weights, and products of two maps, which give weight gradients. Rows
// are pixels. In bf16 a product reads pairs of neighbours in the summed dimension.

constexpr int TOTALS = REGISTERS >= 32 ? 24 : 12;  // accumulators per tile
constexpr int PANEL = REGISTERS >= 32 ? 3 : 2;  // most vectors of outputs per tile
constexpr int ROWS = 24;  // blocks of rows are multiples of this: it is a multiple of every tile's rows

static INLINE ptrdiff_t vectors_of(ptrdiff_t channels) { return (channels + LANES - 1) / LANES; }
static INLINE ptrdiff_t panels_of(ptrdiff_t vectors) { return (vectors + PANEL - 1) / PANEL; }
static INLINE ptrdiff_t panel_first(ptrdiff_t vectors, ptrdiff_t panel) { return vectors * panel / panels_of(vectors); }
template <class T> static INLINE ptrdiff_t depth_of(ptrdiff_t inputs) {
  return (inputs + Input<T>::PAIR - 1) / Input<T>::PAIR * Input<T>::PAIR;
}

// Weights packed for a product: per panel [input][vector][lane], in bf16 [pair of inputs][vector][lane][2].
template <class T> struct Packed {
  T* weights;
  int inputs, outputs;

  Packed(Space& space, int inputs, int outputs)
      : weights(take<T>(space, depth_of<T>(inputs) * vectors_of(outputs) * LANES)), inputs(inputs), outputs(outputs) {}

  const T* panel(ptrdiff_t first) const { return weights + first * LANES * depth_of<T>(inputs); }

  // Reads weight(input, output) at from[input * in + output * out]
  void fill(const float* from, ptrdiff_t in, ptrdiff_t out, int part, int parts) const {
    constexpr int PAIR = Input<T>::PAIR;
    const ptrdiff_t vectors = vectors_of(outputs), depth = depth_of<T>(inputs);
    const Range mine = share(panels_of(vectors), part, parts);
    for (ptrdiff_t p = mine.first; p < mine.end; p++) {
      const ptrdiff_t first = panel_first(vectors, p), wide = (panel_first(vectors, p + 1) - first) * LANES;
      T* to = weights + first * LANES * depth;
      for (ptrdiff_t lane = 0; lane < wide; lane++) {
        const ptrdiff_t output = first * LANES + lane;
        const float* weight = from + output * out;
        for (ptrdiff_t k = 0; k < depth; k++)
          set(to + (k / PAIR * wide + lane) * PAIR + k % PAIR, output < outputs && k < inputs ? weight[k * in] : 0.f);
      }
    }
  }
};

template <class T, int M, int N> static INLINE void multiply_rows(Vector (&totals)[M][N], const T* rows, ptrdiff_t row,
                                                                  ptrdiff_t step, const T* weights, ptrdiff_t wide,
                                                                  ptrdiff_t steps) {
  typedef Input<T> In;
#pragma GCC unroll 2
  for (ptrdiff_t k = 0; k < steps; k++, rows += step, weights += wide) {
    typename In::Type w[N];
    UNROLL for (int n = 0; n < N; n++)
      w[n] = In::some(weights + n * LANES * In::PAIR);
    _Pragma("GCC unroll 24") for (int m = 0; m < M; m++) {
      typename In::Type x = In::each(rows + m * row);
      UNROLL for (int n = 0; n < N; n++)
        totals[m][n] = In::add_product(totals[m][n], x, w[n]);
    }
  }
}

template <class T, int M, int N, class Work>
static INLINE void product_tile(const T* rows, ptrdiff_t apart, const T* weights, ptrdiff_t steps, ptrdiff_t row,
                                ptrdiff_t channel, Work& work) {
  Vector totals[M][N];
  _Pragma("GCC unroll 24") for (int m = 0; m < M; m++) UNROLL
  for (int n = 0; n < N; n++) totals[m][n] = all(0.f);
  multiply_rows<T, M, N>(totals, rows + row * apart, apart, Input<T>::PAIR, weights, N * LANES * Input<T>::PAIR, steps);
  work.template take<M, N>(totals, row, channel);
}

template <class T, int N, class Work> static void product_panel(const T* rows, ptrdiff_t apart, const T* weights,
                                                                ptrdiff_t steps, ptrdiff_t count, ptrdiff_t channel,
                                                                Work& work) {
  ptrdiff_t row = 0;
  for (; row + TOTALS / N <= count; row += TOTALS / N)
    product_tile<T, TOTALS / N, N>(rows, apart, weights, steps, row, channel, work);
  for (; row + 4 <= count; row += 4) product_tile<T, 4, N>(rows, apart, weights, steps, row, channel, work);
  for (; row < count; row++) product_tile<T, 1, N>(rows, apart, weights, steps, row, channel, work);
}

// Multiplies `count` rows, `apart` elements apart, with weights; passes each tile to work.take(totals, row, channel)
template <class T, class Work>
static void product(const T* rows, ptrdiff_t apart, ptrdiff_t count, const Packed<T>& packed, Work& work) {
  const ptrdiff_t vectors = vectors_of(packed.outputs), steps = depth_of<T>(packed.inputs) / Input<T>::PAIR;
  for (ptrdiff_t p = 0; p < panels_of(vectors); p++) {
    const ptrdiff_t first = panel_first(vectors, p);
    const T* weights = packed.panel(first);
    switch (panel_first(vectors, p + 1) - first) {
      case 1: product_panel<T, 1>(rows, apart, weights, steps, count, first * LANES, work); break;
      case 2: product_panel<T, 2>(rows, apart, weights, steps, count, first * LANES, work); break;
#if REGISTERS >= 32
      case 3: product_panel<T, 3>(rows, apart, weights, steps, count, first * LANES, work); break;
#endif
    }
  }
}

// Stores a product's tiles in a map, after adding another map if one is given.
template <class T> struct Keeping {
  T* to;
  const T* plus;
  ptrdiff_t channels;

  template <int M, int N> INLINE void take(Vector (&totals)[M][N], ptrdiff_t row, ptrdiff_t channel) {
    UNROLL for (int n = 0; n < N; n++) {
      const ptrdiff_t left = channels - channel - n * LANES;
      T* out = to + row * channels + channel + n * LANES;
      _Pragma("GCC unroll 24") for (int m = 0; m < M; m++) {
        Vector value = totals[m][n];
        if (plus) value += load(plus + (out - to) + m * channels, left);
        store(out + m * channels, value, left);
      }
    }
  }
};

// A map's rows laid out for a product over rows: [row][channel], in bf16 [pair of rows][channel][2], with channels
// padded to whole vectors.
template <class T> struct Stacked {
  T* at;
  ptrdiff_t wide;

  Stacked(Space& space, ptrdiff_t rows, ptrdiff_t channels)
      : at(take<T>(space, (rows + 1) / 2 * 2 * vectors_of(channels) * LANES)), wide(vectors_of(channels) * LANES) {}

  INLINE void put(ptrdiff_t row, ptrdiff_t channel, Vector value) const {
    if constexpr (Input<T>::PAIR == 1) {
      store(at + row * wide + channel, value);
    } else {
      int32_t* pairs = (int32_t*)at + row / 2 * wide + channel;
      const Integers bits = rounded_bits(value);
      *(Words*)pairs = row % 2 ? (*(Words*)pairs & 0xffff) | (bits << 16) : bits;
    }
  }
  INLINE void put_two(ptrdiff_t row, ptrdiff_t channel, Vector first, Vector second) const {  // `row` is even
    if constexpr (Input<T>::PAIR == 1) {
      store(at + row * wide + channel, first);
      store(at + (row + 1) * wide + channel, second);
    } else {
      *(Words*)((int32_t*)at + row / 2 * wide + channel) = rounded_bits(first) | (rounded_bits(second) << 16);
    }
  }
  static INLINE ptrdiff_t steps(ptrdiff_t rows) { return (rows + Input<T>::PAIR - 1) / Input<T>::PAIR; }
};

template <class T, int M, int N> static INLINE void outer_tile(const T* a, ptrdiff_t a_step, const T* b,
                                                               ptrdiff_t b_step, ptrdiff_t steps, float* sums,
                                                               ptrdiff_t pitch) {
  Vector totals[M][N];
  UNROLL for (int m = 0; m < M; m++) UNROLL
    for (int n = 0; n < N; n++) totals[m][n] = all(0.f);
  multiply_rows<T, M, N>(totals, a, Input<T>::PAIR, a_step, b, b_step, steps);
  UNROLL for (int m = 0; m < M; m++) UNROLL
    for (int n = 0; n < N; n++) {
      float* to = sums + m * pitch + n * LANES;
      store(to, load(to) + totals[m][n]);
    }
}

template <class T, int N> static void outer_panel(const T* a, ptrdiff_t a_step, ptrdiff_t height, const T* b,
                                                  ptrdiff_t b_step, ptrdiff_t steps, float* sums, ptrdiff_t pitch) {
  constexpr int M = TOTALS / PANEL, PAIR = Input<T>::PAIR;
  ptrdiff_t row = 0;
  for (; row + M <= height; row += M)
    outer_tile<T, M, N>(a + row * PAIR, a_step, b, b_step, steps, sums + row * pitch, pitch);
  for (; row < height; row++) outer_tile<T, 1, N>(a + row * PAIR, a_step, b, b_step, steps, sums + row * pitch, pitch);
}

// sums[i][j] += the sum over rows of a[row][i] b[row][j], for i < height and vectors [first, end) of j
template <class T> static void outer_product(const Stacked<T>& a, ptrdiff_t height, const Stacked<T>& b,
                                             ptrdiff_t first, ptrdiff_t end, ptrdiff_t rows, float* sums) {
  constexpr int PAIR = Input<T>::PAIR;
  const ptrdiff_t steps = Stacked<T>::steps(rows);
  for (ptrdiff_t v = first; v < end;) {
    const T* from = b.at + v * LANES * PAIR;
    float* to = sums + v * LANES;
    switch (end - v) {
      case 1: outer_panel<T, 1>(a.at, a.wide * PAIR, height, from, b.wide * PAIR, steps, to, b.wide), v += 1; break;
#if REGISTERS >= 32
      case 2:
      case 4: outer_panel<T, 2>(a.at, a.wide * PAIR, height, from, b.wide * PAIR, steps, to, b.wide), v += 2; break;
#endif
      default: outer_panel<T, PANEL>(a.at, a.wide * PAIR, height, from, b.wide * PAIR, steps, to, b.wide), v += PANEL;
    }
  }
}
