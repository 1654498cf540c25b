// Training steps of whole segments: one source for every instruction set, like kernels.h for inference.
#include "training.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace effnet {
namespace NAMESPACE {

#include "vectors.h"

#include "training_basics.h"
#include "training_products.h"
#include "training_depthwise.h"
#include "training_pointwise.h"

// ------------------------------------------------------------------------------------------------ whole segments
// Each part's sums over its rows of an image lie in slot image + part. Parts are consecutive, so no two share a slot.
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
  // Adds up the parts' sums of an image in the slot that is returned
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

// Sums each image's normalised and activated rows
template <class T> static void pool(const TrainingSegment& s, float* slots, int part, Range mine) {
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

// Calls work(Size<kernel>, Size<stride>) for the depthwise convolution
template <class Work> static void with_geometry(int kernel, int stride, Work work) {
  if (kernel == 3 && stride == 1) return work(Size<3>(), Size<1>());
  if (kernel == 3) return work(Size<3>(), Size<2>());
  if (kernel == 5 && stride == 1) return work(Size<5>(), Size<1>());
  if (kernel == 5) return work(Size<5>(), Size<2>());
  if (stride == 1) return work(Size<7>(), Size<1>());
  work(Size<7>(), Size<2>());
}
static INLINE Geometry geometry_of(const TrainingSegment& s) {
  return {s.kernel, s.stride,     s.pad_top,   s.pad_left,          s.height,
          s.width,  s.out_height, s.out_width, s.depthwise.channels};
}

// A pass over a segment. If scratch is at address 0, its constructor only counts bytes.
template <class T> struct Pass {
  const TrainingSegment& s;
  const Team& team;
  const int parts, wide;  // channels of the depthwise convolution
  const Operand<T> expanded, projected;  // inputs of the two pointwise products
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

  // A part's own scratch, after the shared scratch
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
  ptrdiff_t bytes;  // per part

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

  // Packs the weights: [output][input], or for patches [output][input][row][column]
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
  float* spread;  // [image][channel]: the gradient of the means
  float *coefficients, *part_sums, *sums, *slots;
  float** gradients;  // each part's weight gradients
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
  // From the parts' sums [2][channel], computes the normalisation's gradients and the coefficients for its map's
  // gradient
  void differentiate_parts(const TrainingLayer& layer, double rows) {
    const ptrdiff_t size = 2 * this->padded(layer.channels);
    for (ptrdiff_t i = 0; i < size; i += LANES) {
      Vector total = load(part_sums + i);
      for (int part = 1; part < parts; part++) total += load(part_sums + part * size + i);
      store(sums + i, total);
    }
    differentiate(layer, rows, sums, sums + size / 2, coefficients);
  }
  // Adds up the parts' gradients [row][column, padded] into to[row * by_row + column * by_column]
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
    if (s.squeeze)
      squeeze_and_excite();
    else
      parallel(team, [&](int part) { sum_images(part); });
    differentiate(s.depthwise, (double)out_rows, sums, sums + this->padded(wide), coefficients);
    with_geometry(s.kernel, s.stride,
                  [&](auto kernel, auto stride) { depthwise<decltype(kernel)::value, decltype(stride)::value>(); });
    if (!s.expand.channels) return;
    differentiate_parts(s.expand, (double)in_rows);
    const MapGradient<T> gradient{
        (const T*)s.expanded_gradient, (const T*)s.expand.map, s.expand, nullptr, 1, Activation::none, coefficients};
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
        for (int p = 0; p < parts; p++) total += gradients[p][(c / LANES * KERNEL * KERNEL + tap) * LANES + c % LANES];
        s.depthwise.gradient[c * KERNEL * KERNEL + tap] = total;
      }
  }

  // For a part's channels, sums the gradient of the depthwise normalisation over all images
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
