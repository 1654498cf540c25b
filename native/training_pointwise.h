// The pointwise layers of a training step: expansion, projection, head, and a stem whose patches are rows.

// Rows that a part processes together, so that they stay in the L2 cache while all weights are read
static INLINE ptrdiff_t block_rows(ptrdiff_t channels) {
  const ptrdiff_t rows = 40000 / channels / ROWS * ROWS;
  return rows < ROWS ? ROWS : rows > 8 * ROWS ? 8 * ROWS : rows;
}

// The input of a product: rows of a map; rows after normalisation, activation and gate; or patches of an image.
template <class T> struct Operand {
  const TrainingSegment& s;
  const T* map;
  int channels;
  const TrainingLayer* before;  // the layer whose output the map is, or null
  const float* gate;  // [image][channel], or null
  bool patches;
  typedef Factor<T> F;

  static Operand of_layer(const TrainingSegment& s) {
    const bool patches = s.kernel > 1 || s.stride > 1;
    return {s, (const T*)s.x, patches ? s.kernel * s.kernel * s.inputs : s.inputs, nullptr, nullptr, patches};
  }
  bool in_place() const { return SAME<T, F> && !before && !patches; }
  ptrdiff_t apart() const { return in_place() ? channels : depth_of<F>(channels); }

  // `count` rows from `first` on: in the map itself, or computed in `space`
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

// Stores a product's tiles in a map and accumulates their statistics
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

// The gradient of a layer's map, from the gradient of its output (with stochastic depth and activation still to be
// applied) or from one that already includes them
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

// Rows laid out for a product, and stacked for a product over rows
template <class T> struct Block {
  Stacked<T> stacked;
  T* rows;

  Block(Space& space, ptrdiff_t count, ptrdiff_t channels)
      : stacked(space, count, channels),
        rows(Input<T>::PAIR == 1 ? stacked.at : take<T>(space, count * stacked.wide)) {}

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

// A pointwise layer's backward pass: the gradients of its input and of its weights, as [input][output]
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

  void run(const Operand<T>& in, const MapGradient<T>& out, const Packed<Factor<T>>& weights, T* to, const T* plus,
           Range mine) {
    const ptrdiff_t vectors = gradients.stacked.wide / LANES;
    for (ptrdiff_t i = 0; i < in.channels * gradients.stacked.wide; i += LANES) store(weights_gradient + i, all(0.f));
    for (ptrdiff_t r = mine.first; r < mine.end; r += block) {
      const ptrdiff_t count = mine.end - r < block ? mine.end - r : block;
      gradients.fill(count,
                     [&](ptrdiff_t i, ptrdiff_t c) __attribute__((always_inline)) { return out.of_map(r + i, c); });
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

// ---------------------------------------------------------------- backward of projection and squeeze-and-excitation
// Sums over an image's rows that the gradients of the gate and the normalisation need: products of the gradient G of
// the projection's input, the activation A, its slope S, and the map M minus its mean
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
  void run(const TrainingSegment& s, const MapGradient<T>& out, const Packed<Factor<T>>& weights, float* slots,
           int part, Range mine) {
    const int channels = s.depthwise.channels, outputs = s.project.channels;
    const ptrdiff_t pixels = s.out_pixels(), wide = inputs.wide;
    for (ptrdiff_t i = 0; i < outputs * wide; i += LANES) store(weights_gradient + i, all(0.f));
    ptrdiff_t begun = -1;  // the last image whose slot is initialised
    for (ptrdiff_t r = mine.first; r < mine.end; r += block) {
      const ptrdiff_t count = mine.end - r < block ? mine.end - r : block;
      gradients.fill(count,
                     [&](ptrdiff_t i, ptrdiff_t c) __attribute__((always_inline)) { return out.of_map(r + i, c); });
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
        for (int c = 0; c < channels; c += LANES)
          sum(s, to + c, (const T*)s.depthwise.map + r * channels + c, gate, c, i, end, slot + c);
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
