// The depthwise convolution of a training step. A part of the work is a run of output rows, across images. Its input
// rows lie in a ring buffer, as [vector of channels][column][lane], normalised, activated and zero-padded.

struct Geometry {
  int kernel, stride, pad_top, pad_left, height, width, out_height, out_width, channels;
};

// Calls work(Size<n>, first) for runs of n <= MOST columns
template <int N> struct Size {
  static constexpr int value = N;
};
template <int MOST, class Work> static INLINE void in_tiles(int first, int end, Work work) {
  if constexpr (MOST > 7) {
    if ((end - first) % 7 == 0) return in_tiles<7>(first, end, work);
  }
  for (; first + MOST <= end; first += MOST) work(Size<MOST>(), first);
  if constexpr (MOST > 4) {
    if (first + 4 <= end) work(Size<4>(), first), first += 4;
  }
  for (; first + 2 <= end; first += 2) work(Size<2>(), first);
  if (first < end) work(Size<1>(), first);
}

// A ring buffer of the last few rows [vector][column][lane]
struct Ring {
  float* at;
  ptrdiff_t plane, slot;  // floats between vectors, and between rows
  int rows;

  Ring(Space& space, int rows, int columns, int channels)
      : plane((ptrdiff_t)(columns | 1) * LANES), slot(plane * vectors_of(channels)), rows(rows) {
    at = take<float>(space, slot * rows);
  }
  INLINE float* row(int y) const { return at + (y % rows) * slot; }
  void clear() const {
    for (ptrdiff_t i = 0; i < slot * rows; i += LANES) store(at + i, all(0.f));
  }
};

static INLINE void pack_filters(const float* from, float* to, int channels, int taps) {  // -> [vector][tap][lane]
  for (ptrdiff_t v = 0; v < vectors_of(channels); v++)
    for (int tap = 0; tap < taps; tap++)
      for (int lane = 0; lane < LANES; lane++) {
        const ptrdiff_t channel = v * LANES + lane;
        to[(v * taps + tap) * LANES + lane] = channel < channels ? from[channel * taps + tap] : 0.f;
      }
}

template <class T, int KERNEL, int STRIDE> struct DepthwiseForward {
  Ring ring;
  float* filters;
  Statistics statistics;

  DepthwiseForward(Space& space, const Geometry& g)
      : ring(space, KERNEL, columns(g), g.channels),
        filters(take<float>(space, vectors_of(g.channels) * KERNEL * KERNEL * LANES)),
        statistics(space, g.channels) {}

  static int columns(const Geometry& g) {
    const int read = (g.out_width - 1) * STRIDE + KERNEL, filled = g.width + g.pad_left;
    return read > filled ? read : filled;
  }

  // Computes output rows `mine`, counted across images; the input is first normalised and activated if `before` is
  // given.
  void run(const Geometry& g, const T* x, const TrainingLayer* before, const float* weights, T* out, Range mine) {
    const int channels = g.channels;
    ring.clear();
    pack_filters(weights, filters, channels, KERNEL * KERNEL);
    statistics.begin();
    int made = 0;  // the first input row that is not in the ring
    for (ptrdiff_t r = mine.first; r < mine.end; r++) {
      const int y = (int)(r % g.out_height), above = y * STRIDE - g.pad_top;
      const T* image = x + r / g.out_height * g.height * g.width * channels;
      if (r == mine.first || y == 0) made = above > 0 ? above : 0;
      for (const int last = smaller_of(above + KERNEL, g.height); made < last; made++)
        fill(g, image + (ptrdiff_t)made * g.width * channels, before, ring.row(made) + g.pad_left * LANES);
      const int first = above < 0 ? -above : 0, end = smaller_of(KERNEL, g.height - above);
      T* to = out + r * g.out_width * channels;
      for (int c = 0; c < channels; c += LANES) row(g, c, above, first, end, to + c, r == mine.first);
      statistics.count(g.out_width);
    }
    statistics.finish();
  }

 private:
  INLINE void fill(const Geometry& g, const T* from, const TrainingLayer* before, float* to) {
    for (int x = 0; x < g.width; x++, from += g.channels, to += LANES)
      for (int c = 0; c < g.channels; c += LANES) {
        prefetch(from + c);
        Vector value = load(from + c, g.channels - c);
        if (before) value = activated<T>(normalised(value, *before, c), before->activation);
        store(to + c / LANES * ring.plane, value);
      }
  }

  INLINE void row(const Geometry& g, int c, int above, int first, int end, T* to, bool begins) {
    const int left = g.channels - c;
    const float *rows[KERNEL], *taps = filters + (ptrdiff_t)c * KERNEL * KERNEL;
    for (int k = first; k < end; k++) rows[k] = ring.row(above + k) + c / LANES * ring.plane;
    Vector shift = load(statistics.shift + c), sum = load(statistics.sums + c), squares = load(statistics.squares + c);
    in_tiles<REGISTERS >= 32 ? 8 : 6>(0, g.out_width, [&](auto size, int column) __attribute__((always_inline)) {
      constexpr int M = decltype(size)::value;
      Vector totals[M];
      UNROLL for (int m = 0; m < M; m++)
        totals[m] = all(0.f);
#pragma GCC unroll 1
      for (int k = first; k < end; k++) {
        const float* from = rows[k] + (ptrdiff_t)column * STRIDE * LANES;
        Vector w[KERNEL];
        UNROLL for (int x = 0; x < KERNEL; x++)
          w[x] = load(taps + (k * KERNEL + x) * LANES);
        _Pragma("GCC unroll 32") for (int i = 0; i < (M - 1) * STRIDE + KERNEL; i++) {
          Vector in = load(from + i * LANES);
          UNROLL for (int x = 0; x < KERNEL; x++)
            if ((i - x) % STRIDE == 0 && i >= x && (i - x) / STRIDE < M)
              totals[(i - x) / STRIDE] = in * w[x] + totals[(i - x) / STRIDE];
        }
      }
      if (begins && column == 0) {
        shift = as_stored<T>(totals[0]);
        store(statistics.shift + c, shift);
      }
      UNROLL for (int m = 0; m < M; m++) {
        store(to + (ptrdiff_t)(column + m) * g.channels, totals[m], left);
        Vector d = as_stored<T>(totals[m]) - shift;
        sum += d;
        squares = d * d + squares;
      }
    });
    store(statistics.sums + c, sum);
    store(statistics.squares + c, squares);
  }
};

// Inputs and outputs of the backward pass of a depthwise convolution. `gradient` is that of the projection's input;
// gate, activation and normalisation of `own` are differentiated here.
template <class T> struct DepthwiseGradients {
  const T *gradient, *map, *x;
  T* to;  // the gradient of x, before the activation of `before` if given
  const T* plus;  // added to it, or null
  const float* weights;
  const TrainingLayer *own, *before;
  const float* coefficients;  // [3][channel] of own's normalisation
  const float *gate, *spread;  // [image][channel]: the gate, and the gradient of the means; or null
};

template <class T, int KERNEL, int STRIDE> struct DepthwiseBackward {
  static constexpr int REACH = (KERNEL - 1) / STRIDE;  // rows and columns of outputs before and after
  Ring inputs, slopes, gradients;
  float *filters, *filter_gradient, *sums, *row_sums;

  DepthwiseBackward(Space& space, const Geometry& g)
      : inputs(space, KERNEL, DepthwiseForward<T, KERNEL, STRIDE>::columns(g), g.channels),
        slopes(space, KERNEL, g.width, g.channels),
        gradients(space, KERNEL, REACH + columns(g), g.channels) {
    const ptrdiff_t wide = vectors_of(g.channels) * LANES;
    filters = take<float>(space, wide * KERNEL * KERNEL);
    filter_gradient = take<float>(space, wide * KERNEL * KERNEL);
    sums = take<float>(space, 2 * wide);
    row_sums = take<float>(space, 2 * wide);
  }
  static int columns(const Geometry& g) {  // of gradients that are read, from the first one on
    const int read = (g.width + g.pad_left + STRIDE - 1) / STRIDE + 1;
    return read > g.out_width ? read : g.out_width;
  }

  void run(const Geometry& g, const DepthwiseGradients<T>& d, Range mine) {
    const int channels = g.channels;
    const ptrdiff_t wide = vectors_of(channels) * LANES, in_row = (ptrdiff_t)g.width * channels;
    inputs.clear();
    gradients.clear();
    pack_filters(d.weights, filters, channels, KERNEL * KERNEL);
    for (ptrdiff_t i = 0; i < wide * KERNEL * KERNEL; i += LANES) store(filter_gradient + i, all(0.f));
    for (ptrdiff_t i = 0; i < 2 * wide; i += LANES) store(sums + i, all(0.f)), store(row_sums + i, all(0.f));

    for (ptrdiff_t r = mine.first; r < mine.end;) {  // the rows of one image
      const ptrdiff_t image = r / g.out_height;
      const int top = (int)(r % g.out_height), rest = (int)(mine.end - r);
      const int bottom = smaller_of(top + rest, g.out_height);
      const T* x = d.x + image * g.height * in_row;
      int y = top > REACH ? top - REACH : 0;
      for (; y < top; y++) fill_gradients(g, d, image, y);
      int made = top * STRIDE - g.pad_top;
      if (made < 0) made = 0;
      int done = top ? made : 0;  // the first input row whose gradient is not computed
      for (; y < bottom; y++) {
        fill_gradients(g, d, image, y);
        const int above = y * STRIDE - g.pad_top;
        for (const int last = smaller_of(above + KERNEL, g.height); made < last; made++)
          fill_inputs(g, d.before, x + made * in_row, made);
        filter_row(g, y, above);
        for (const int last = y + 1 == g.out_height ? g.height : smaller_of(above + STRIDE, g.height); done < last;
             done++)
          input_row(g, d, x + done * in_row, image * g.height * in_row + done * in_row, done);
      }
      for (ptrdiff_t i = 0; i < 2 * wide; i += LANES) {
        store(sums + i, load(sums + i) + load(row_sums + i));
        store(row_sums + i, all(0.f));
      }
      r += bottom - top;
    }
  }

 private:
  INLINE void fill_gradients(const Geometry& g, const DepthwiseGradients<T>& d, ptrdiff_t image, int y) {
    const int channels = g.channels;
    const ptrdiff_t at = (image * g.out_height + y) * g.out_width * channels;
    const T *from = d.gradient + at, *map = d.map + at;
    float* to = gradients.row(y) + REACH * LANES;
    const float *by_gradient = d.coefficients, *by_map = by_gradient + channels, *constant = by_map + channels;
    for (int x = 0; x < g.out_width; x++, from += channels, map += channels, to += LANES)
      for (int c = 0; c < channels; c += LANES) {
        const int left = channels - c;
        prefetch(from + c);
        prefetch(map + c);
        Vector value = load(from + c, left), m = load(map + c, left);
        Vector slope = activated_slope<T>(normalised(m, *d.own, c), d.own->activation).slope;
        if (d.gate)
          value = value * load(d.gate + image * channels + c, left) + load(d.spread + image * channels + c, left);
        value *= slope;
        value = value * load(by_gradient + c, left) + (m * load(by_map + c, left) + load(constant + c, left));
        store(to + c / LANES * gradients.plane, value);
      }
  }

  INLINE void fill_inputs(const Geometry& g, const TrainingLayer* before, const T* from, int y) {
    float *to = inputs.row(y) + g.pad_left * LANES, *slope = slopes.row(y);
    for (int x = 0; x < g.width; x++, from += g.channels, to += LANES, slope += LANES)
      for (int c = 0; c < g.channels; c += LANES) {
        prefetch(from + c);
        Vector value = load(from + c, g.channels - c);
        if (before) {
          Slope s = activated_slope<T>(normalised(value, *before, c), before->activation);
          store(slope + c / LANES * slopes.plane, s.slope);
          value = s.value;
        }
        store(to + c / LANES * inputs.plane, value);
      }
  }

  // Adds the contribution of one output row to the filters' gradient
  INLINE void filter_row(const Geometry& g, int y, int above) {
    const int first = above < 0 ? -above : 0, end = smaller_of(KERNEL, g.height - above);
    for (int c = 0; c < g.channels; c += LANES) {
      const float* d = gradients.row(y) + REACH * LANES + c / LANES * gradients.plane;
      float* to = filter_gradient + (ptrdiff_t)c * KERNEL * KERNEL;
      if constexpr (KERNEL * KERNEL + 2 <= REGISTERS) {
        if (first == 0 && end == KERNEL) {
          filter_rows<KERNEL>(g, d, above, 0, c, to);
          continue;
        }
      }
      for (int k = first; k < end; k++) filter_rows<1>(g, d, above, k, c, to);
    }
  }
  template <int COUNT>
  INLINE void filter_rows(const Geometry& g, const float* d, int above, int first, int c, float* to) {
    Vector totals[COUNT][KERNEL];
    const float* rows[COUNT];
    for (int k = 0; k < COUNT; k++) rows[k] = inputs.row(above + first + k) + c / LANES * inputs.plane;
    to += first * KERNEL * LANES;
    UNROLL for (int k = 0; k < COUNT; k++) UNROLL
      for (int x = 0; x < KERNEL; x++) totals[k][x] = load(to + (k * KERNEL + x) * LANES);
    for (int column = 0; column < g.out_width; column++) {
      Vector gradient = load(d + (ptrdiff_t)column * LANES);
      UNROLL for (int k = 0; k < COUNT; k++) UNROLL
        for (int x = 0; x < KERNEL; x++)
          totals[k][x] = gradient * load(rows[k] + (ptrdiff_t)(column * STRIDE + x) * LANES) + totals[k][x];
    }
    UNROLL for (int k = 0; k < COUNT; k++) UNROLL
      for (int x = 0; x < KERNEL; x++) store(to + (k * KERNEL + x) * LANES, totals[k][x]);
  }

  // Computes the gradient of one input row; columns are processed in groups of STRIDE, which read the same outputs
  INLINE void input_row(const Geometry& g, const DepthwiseGradients<T>& d, const T* x, ptrdiff_t at, int row) {
    const int channels = g.channels;
    const float* rows[KERNEL];
    int taps[KERNEL], count = 0;
    for (int k = 0; k < KERNEL; k++) {
      const int y = row + g.pad_top - k;
      if (y < 0 || y % STRIDE || y / STRIDE >= g.out_height) continue;
      taps[count] = k;
      rows[count++] = gradients.row(y / STRIDE) + REACH * LANES;
    }
    const ptrdiff_t wide = vectors_of(channels) * LANES;
    for (int c = 0; c < channels; c += LANES) {
      const int left = channels - c;
      const ptrdiff_t plane = c / LANES * gradients.plane;
      const float *w = filters + (ptrdiff_t)c * KERNEL * KERNEL, *slope = slopes.row(row) + c / LANES * slopes.plane;
      Vector sum = all(0.f), products = all(0.f);
      const Vector mean = d.before ? load(d.before->norm.saved + c, left) : all(0.f);
      const int begin = g.pad_left / STRIDE, end = (g.pad_left + g.width + STRIDE - 1) / STRIDE;
      in_tiles<STRIDE == 1 ? (REGISTERS >= 32 ? 8 : 6) : (REGISTERS >= 32 ? 7 : 2)>(
          begin, end, [&](auto size, int group) __attribute__((always_inline)) {
            constexpr int M = decltype(size)::value * STRIDE;
            Vector totals[M];
            UNROLL for (int m = 0; m < M; m++)
              totals[m] = all(0.f);
#pragma GCC unroll 1
            for (int i = 0; i < count; i++) {
              const float* from = rows[i] + plane + (ptrdiff_t)group * LANES;
              Vector v[KERNEL];
              UNROLL for (int k = 0; k < KERNEL; k++)
                v[k] = load(w + (taps[i] * KERNEL + k) * LANES);
              _Pragma("GCC unroll 32") for (int o = -REACH; o <= (M - 1) / STRIDE; o++) {
                Vector in = load(from + (ptrdiff_t)o * LANES);
                UNROLL for (int m = 0; m < M; m++) {
                  const int k = m - o * STRIDE;
                  if (k >= 0 && k < KERNEL) totals[m] = in * v[k >= 0 && k < KERNEL ? k : 0] + totals[m];
                }
              }
            }
            UNROLL for (int m = 0; m < M; m++) {
              const int column = group * STRIDE + m - g.pad_left;
              if (column < 0 || column >= g.width) continue;
              const ptrdiff_t pixel = (ptrdiff_t)column * channels + c;
              Vector value = totals[m];
              if (d.before) {
                value *= load(slope + column * LANES);
                sum += value;
                products = value * (load(x + pixel, left) - mean) + products;
              } else if (d.plus) {
                value += load(d.plus + at + pixel, left);
              }
              store(d.to + at + pixel, value, left);
            }
          });
      store(row_sums + c, load(row_sums + c) + sum);
      store(row_sums + wide + c, load(row_sums + wide + c) + products);
    }
  }
};
