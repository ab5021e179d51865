// Instance norm backward for one instruction set (formulas in csrc/instance_norm_params.h). Two passes: the sums of g
// and g * xhat of every plane, then the gradients. The split of the work is that of the forward.
#include "activation_math.h"
#include "kernels.h"
#include "tasks.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {
namespace {

// Where the activation's derivative comes from: its saved result, or its argument recomputed without / with residual.
enum class Source { kOutput, kInput, kInputAndResidual };

constexpr int64_t kBlockElements = 16384;  // a block of a plane; sums over it are one partial sum

// What the formulas need of one channel.
template <typename Scalar>
struct Channel {
  Scalar mean, rstd;       // xhat = (x - mean) * rstd
  Scalar weight, bias;     // pre = xhat * weight + bias + residual
  Scalar mean_g, mean_gx;  // sum(g) / N, sum(g * xhat) / N
  Scalar scale;            // rstd * weight
};

struct Sums {
  double g = 0, gx = 0;
};

// As Vector<double>: adds a register of the compute type.
template <typename T>
struct Accumulator {
  using V = Vector<Compute<T>, kLanes<T>>;
  using D = Vector<double, kDoubles>;
  D g[2] = {}, gx[2] = {};

  void add(V grad, V xhat) {
    if constexpr (sizeof(Compute<T>) == sizeof(double)) {
      g[0] += grad;
      gx[0] += grad * xhat;
    } else {
      const DoublePair a = to_doubles(grad), b = to_doubles(xhat);
      g[0] += a.low;
      g[1] += a.high;
      gx[0] += a.low * b.low;
      gx[1] += a.high * b.high;
    }
  }
  Sums total() const { return {horizontal_sum(g[0] + g[1]), horizontal_sum(gx[0] + gx[1])}; }
  void add_to(double* g_at, double* gx_at) const {  // kLanes<T> columns
    constexpr int kParts = kLanes<T> / kDoubles;
    for (int i = 0; i < kParts; ++i) {
      store<kDoubles>(g_at + i * kDoubles, load<kDoubles>(g_at + i * kDoubles) + g[i]);
      store<kDoubles>(gx_at + i * kDoubles, load<kDoubles>(gx_at + i * kDoubles) + gx[i]);
    }
  }
};

template <typename T, Activation kActivation, Source kSource>
class Backward {
 public:
  Backward(const InstanceNormBackwardParams& params, ParallelFor parallel_for)
      : p_(params),
        parallel_for_(parallel_for),
        input_(static_cast<const T*>(params.input)),
        grad_output_(static_cast<const T*>(params.grad_output)),
        extra_(static_cast<const T*>(kSource == Source::kOutput ? params.saved_output : params.residual)),
        grad_input_(static_cast<T*>(params.grad_input)),
        grad_residual_(static_cast<T*>(params.grad_residual)),
        view_(params.channels),
        image_(params.channels * params.pixels),
        image_blocks_(ceil_div(params.pixels, block_pixels(params.channels))) {}

  void run() {
    if (p_.channels_last && p_.channels > 1) {
      run_channels_last();
    } else {
      run_planes();
    }
  }

 private:
  using Scalar = Compute<T>;
  static constexpr int kN = kLanes<T>;
  using V = Vector<Scalar, kN>;
  static constexpr bool kNeedsExtra = kActivation != Activation::kNone && kSource != Source::kInput;
  static constexpr int64_t kChunkRows = 64;

  // `count` < kN elements when kPartial, else a whole vector.
  template <bool kPartial>
  static V load_at(const T* from, int count) {
    if constexpr (kPartial) {
      return load_some<kN>(from, count);
    } else {
      return load<kN>(from);
    }
  }
  template <bool kPartial>
  static void store_at(T* to, V value, int count) {
    if constexpr (kPartial) {
      store_some<kN>(to, value, count);
    } else {
      store<kN>(to, value);
    }
  }

  struct Gradient {
    V g, xhat;
  };
  // M: Channel<Scalar> or Channel<V>
  template <bool kPartial, typename M>
  Gradient gradient(int64_t at, int count, const M& m) const {
    Gradient result;
    result.xhat = (load_at<kPartial>(input_ + at, count) - m.mean) * m.rstd;
    const V grad = load_at<kPartial>(grad_output_ + at, count);
    V value{};
    if constexpr (kNeedsExtra) value = load_at<kPartial>(extra_ + at, count);
    if constexpr (kSource != Source::kOutput) value += result.xhat * m.weight + m.bias;
    result.g = activation_gradient<kActivation, kSource == Source::kOutput, kN, Scalar>(
        grad, value, static_cast<Scalar>(p_.negative_slope));
    return result;
  }

  template <bool kPartial, typename M>
  void write(int64_t at, int count, const M& m) const {
    const Gradient d = gradient<kPartial>(at, count, m);
    store_at<kPartial>(grad_input_ + at, (d.g - m.mean_g - d.xhat * m.mean_gx) * m.scale, count);
    if (grad_residual_ != nullptr) store_at<kPartial>(grad_residual_ + at, d.g, count);
  }

  Channel<Scalar> channel(int64_t n, int64_t c) const {
    const int64_t index = n * p_.channels + c;
    const Scalar rstd = static_cast<const Scalar*>(p_.rstd)[index];
    const double weight = weight_at(p_, n, c);
    return {static_cast<const Scalar*>(p_.mean)[index],
            rstd,
            static_cast<Scalar>(weight),
            static_cast<Scalar>(bias_at(p_, n, c)),
            0,
            0,
            static_cast<Scalar>(static_cast<double>(rstd) * weight)};
  }

  // Puts the sums into the channel and into the parameters' gradients.
  void finish(int64_t n, int64_t c, const Sums& sums, Channel<Scalar>& m) const {
    const auto pixels = static_cast<double>(p_.pixels);
    m.mean_g = static_cast<Scalar>(sums.g / pixels);
    m.mean_gx = static_cast<Scalar>(sums.gx / pixels);
    static_cast<Scalar*>(p_.grad_weight)[n * p_.channels + c] = static_cast<Scalar>(sums.gx);
    static_cast<Scalar*>(p_.grad_bias)[n * p_.channels + c] = static_cast<Scalar>(sums.g);
  }

  // ---- NCHW

  Sums run_sums(int64_t at, int64_t count, const Channel<Scalar>& m) const {
    Accumulator<T> even, odd;
    int64_t i = 0;
    for (; i + 2 * kN <= count; i += 2 * kN) {
      const Gradient a = gradient<false>(at + i, kN, m), b = gradient<false>(at + i + kN, kN, m);
      even.add(a.g, a.xhat);
      odd.add(b.g, b.xhat);
    }
    Sums sums = even.total();
    const Sums more = odd.total();
    sums.g += more.g;
    sums.gx += more.gx;
    for (; i < count; i += kN) {
      const int some = static_cast<int>(min(kN, count - i));
      const Gradient d = gradient<true>(at + i, some, m);
      for (int lane = 0; lane < some; ++lane) {
        sums.g += static_cast<double>(d.g[lane]);
        sums.gx += static_cast<double>(d.g[lane]) * static_cast<double>(d.xhat[lane]);
      }
    }
    return sums;
  }

  void write_run(int64_t at, int64_t count, const Channel<Scalar>& m) const {
    int64_t i = 0;
    for (; i + kN <= count; i += kN) write<false>(at + i, kN, m);
    if (i < count) write<true>(at + i, static_cast<int>(count - i), m);
  }

  void run_planes() {
    const int64_t planes = p_.batch * p_.channels;
    const int64_t blocks = ceil_div(p_.pixels, kBlockElements);
    const auto block_count = [&](int64_t b) { return min(kBlockElements, p_.pixels - b * kBlockElements); };
    if (planes < 64 && blocks > 1) {
      Buffer<Sums> partial(planes * blocks);
      Buffer<Channel<Scalar>> channels(planes);
      for (int64_t plane = 0; plane < planes; ++plane) {
        channels[plane] = channel(plane / p_.channels, plane % p_.channels);
      }
      run_tasks(parallel_for_, planes * blocks, kBlockElements, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t plane = task / blocks, b = task % blocks;
          partial[task] = run_sums(plane * p_.pixels + b * kBlockElements, block_count(b), channels[plane]);
        }
      });
      for (int64_t plane = 0; plane < planes; ++plane) {
        Sums total;
        for (int64_t b = 0; b < blocks; ++b) add(total, partial[plane * blocks + b]);
        finish(plane / p_.channels, plane % p_.channels, total, channels[plane]);
      }
      run_tasks(parallel_for_, planes * blocks, kBlockElements, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t plane = task / blocks, b = task % blocks;
          write_run(plane * p_.pixels + b * kBlockElements, block_count(b), channels[plane]);
        }
      });
      return;
    }
    run_tasks(parallel_for_, planes, p_.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t n = plane / p_.channels, c = plane % p_.channels;
        Channel<Scalar> m = channel(n, c);
        Sums total;
        for (int64_t b = 0; b < blocks; ++b) {
          add(total, run_sums(plane * p_.pixels + b * kBlockElements, block_count(b), m));
        }
        finish(n, c, total, m);
        write_run(plane * p_.pixels, p_.pixels, m);
      }
    });
  }

  static void add(Sums& a, const Sums& b) {
    a.g += b.g;
    a.gx += b.gx;
  }

  // ---- channels_last

  // Channel<Scalar> of every column, structure of arrays.
  struct Columns {
    explicit Columns(int64_t width) : width(width), data(7 * width) {}
    Scalar* row(int i) { return data + i * width; }
    void set(int64_t j, const Channel<Scalar>& m) {
      const Scalar values[7] = {m.mean, m.rstd, m.weight, m.bias, m.mean_g, m.mean_gx, m.scale};
      for (int i = 0; i < 7; ++i) row(i)[j] = values[i];
    }
    template <bool kPartial>
    Channel<V> at(int64_t j, int count) {
      const auto get = [&](int i) {
        if constexpr (kPartial) {
          return load_some<kN>(row(i) + j, count);
        } else {
          return load<kN>(row(i) + j);
        }
      };
      return {get(0), get(1), get(2), get(3), get(4), get(5), get(6)};
    }
    int64_t width;
    Buffer<Scalar> data;
  };

  void set_columns(int64_t c, const Channel<Scalar>& m, Columns& columns) const {
    for (int64_t j = c; j < view_.width; j += p_.channels) columns.set(j, m);
  }

  // Adds the sums over rows [0, rows) of `width` columns, from element `at` on, to g[width], gx[width].
  void column_sums(int64_t at, int64_t rows, int64_t width, Columns& columns, double* g, double* gx) const {
    for (int64_t r = 0; r < rows; r += kChunkRows) {
      const int64_t here = min(kChunkRows, rows - r), first = at + r * view_.width;
      int64_t j = 0;
      for (; j + kN <= width; j += kN) {
        const Channel<V> m = columns.template at<false>(j, kN);
        Accumulator<T> sums;
        for (int64_t i = 0; i < here; ++i) {
          const Gradient d = gradient<false>(first + i * view_.width + j, kN, m);
          sums.add(d.g, d.xhat);
        }
        sums.add_to(g + j, gx + j);
      }
      if (j < width) {
        const int some = static_cast<int>(width - j);
        const Channel<V> m = columns.template at<true>(j, some);
        for (int64_t i = 0; i < here; ++i) {
          const Gradient d = gradient<true>(first + i * view_.width + j, some, m);
          for (int lane = 0; lane < some; ++lane) {
            g[j + lane] += static_cast<double>(d.g[lane]);
            gx[j + lane] += static_cast<double>(d.g[lane]) * static_cast<double>(d.xhat[lane]);
          }
        }
      }
    }
  }

  int64_t block_pixel_count(int64_t b) const {
    return min(block_pixels(p_.channels), p_.pixels - b * block_pixels(p_.channels));
  }
  int64_t block_at(int64_t n, int64_t b) const { return n * image_ + b * block_pixels(p_.channels) * p_.channels; }

  void block_sums(int64_t n, int64_t b, Columns& columns, double* g, double* gx, Sums* partial) const {
    const int64_t at = block_at(n, b), pixels = block_pixel_count(b);
    for (int64_t j = 0; j < view_.width; ++j) g[j] = gx[j] = 0;
    column_sums(at, view_.rows(pixels), view_.width, columns, g, gx);
    const int64_t rest = view_.rest(pixels);
    if (rest > 0) column_sums(at + view_.rows(pixels) * view_.width, 1, rest, columns, g, gx);
    for (int64_t c = 0; c < p_.channels; ++c) {
      Sums total;
      for (int64_t j = c; j < view_.width; j += p_.channels) add(total, {g[j], gx[j]});
      partial[b * p_.channels + c] = total;
    }
  }

  void write_block(int64_t n, int64_t b, Columns& columns) const {
    const int64_t pixels = block_pixel_count(b), rows = view_.rows(pixels), rest = view_.rest(pixels);
    for (int64_t r = 0; r < rows + (rest > 0); ++r) {
      const int64_t at = block_at(n, b) + r * view_.width, width = r < rows ? view_.width : rest;
      int64_t j = 0;
      for (; j + kN <= width; j += kN) write<false>(at + j, kN, columns.template at<false>(j, kN));
      if (j < width) {
        const int some = static_cast<int>(width - j);
        write<true>(at + j, some, columns.template at<true>(j, some));
      }
    }
  }

  void finish_image(int64_t n, Sums* partial, Columns& columns) const {
    for (int64_t c = 0; c < p_.channels; ++c) {
      Sums total;
      for (int64_t b = 0; b < image_blocks_; ++b) add(total, partial[b * p_.channels + c]);
      Channel<Scalar> m = channel(n, c);
      finish(n, c, total, m);
      set_columns(c, m, columns);
    }
  }

  void start_image(int64_t n, Columns& columns) const {
    for (int64_t c = 0; c < p_.channels; ++c) set_columns(c, channel(n, c), columns);
  }

  void run_channels_last() {
    constexpr int64_t kCacheElements = 128 * 1024;
    if (p_.batch > 1 && image_ <= kCacheElements) {
      run_tasks(parallel_for_, p_.batch, image_, [&](int64_t begin, int64_t end) {
        Columns columns(view_.width);
        Buffer<double> g(view_.width), gx(view_.width);
        Buffer<Sums> partial(image_blocks_ * p_.channels);
        for (int64_t n = begin; n < end; ++n) {
          start_image(n, columns);
          for (int64_t b = 0; b < image_blocks_; ++b) block_sums(n, b, columns, g, gx, partial);
          finish_image(n, partial, columns);
          for (int64_t b = 0; b < image_blocks_; ++b) write_block(n, b, columns);
        }
      });
      return;
    }
    Columns columns(view_.width);
    Buffer<Sums> partial(image_blocks_ * p_.channels);
    const int64_t block_elements = block_pixels(p_.channels) * p_.channels;
    for (int64_t n = 0; n < p_.batch; ++n) {
      start_image(n, columns);
      run_tasks(parallel_for_, image_blocks_, block_elements, [&](int64_t begin, int64_t end) {
        Buffer<double> g(view_.width), gx(view_.width);
        for (int64_t b = begin; b < end; ++b) block_sums(n, b, columns, g, gx, partial);
      });
      finish_image(n, partial, columns);
      run_tasks(parallel_for_, image_blocks_, block_elements, [&](int64_t begin, int64_t end) {
        for (int64_t b = end; b-- > begin;) write_block(n, b, columns);
      });
    }
  }

  const InstanceNormBackwardParams& p_;
  ParallelFor parallel_for_;
  const T* input_;
  const T* grad_output_;
  const T* extra_;  // the saved result or the residual
  T* grad_input_;
  T* grad_residual_;
  RowView<T> view_;
  int64_t image_;
  int64_t image_blocks_;
};

}  // namespace

void instance_norm_backward(const InstanceNormBackwardParams& params, ParallelFor parallel_for) {
  with_dtype(params.dtype, [&](auto zero) {
    with_activation(params.activation, [&](auto tag) {
      using T = decltype(zero);
      constexpr Activation kActivation = decltype(tag)::value;
      // silu's derivative cannot be had from its result; without an activation there is nothing to recompute.
      if constexpr (kActivation == Activation::kNone) {
        Backward<T, kActivation, Source::kInput>(params, parallel_for).run();
        return;
      } else if constexpr (kActivation != Activation::kSilu) {
        if (params.saved_output != nullptr) {
          Backward<T, kActivation, Source::kOutput>(params, parallel_for).run();
          return;
        }
      }
      if (params.residual != nullptr) {
        Backward<T, kActivation, Source::kInputAndResidual>(params, parallel_for).run();
      } else {
        Backward<T, kActivation, Source::kInput>(params, parallel_for).run();
      }
    });
  });
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
