// Instance norm forward for one instruction set.
//
//   NCHW            a plane is a run: moments, then the normalise pass while the plane is in cache. Few large planes
//   are
//                   cut into blocks instead.
//   channels_last   an image is a matrix [pixels, channels]: moments of blocks of rows, merged in order, then the
//                   normalise pass. Images follow one another, so that the second pass finds the image in cache.
//   mixed           moments as the input's format has it; the normalise pass goes through transposed tiles.
#include "kernels.h"
#include "moments.h"
#include "normalize.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {
namespace {

template <typename T, Activation kActivation, bool kResidual>
class Forward {
 public:
  Forward(const InstanceNormParams& params, ParallelFor parallel_for)
      : p_(params),
        parallel_for_(parallel_for),
        input_(static_cast<const T*>(params.input)),
        residual_(static_cast<const T*>(params.residual)),
        output_(static_cast<T*>(params.output)),
        view_(params.channels),
        image_(params.channels * params.pixels),
        image_blocks_(ceil_div(params.pixels, block_pixels(params.channels))) {}

  void run() {
    // A single channel (or pixel) has the same layout in both formats.
    const bool input_last = p_.channels_last && p_.channels > 1;
    const bool output_last = p_.output_channels_last && p_.channels > 1;
    if (input_last != output_last && p_.pixels > 1) {
      run_mixed();
    } else if (!input_last) {
      run_planes();
    } else {
      run_channels_last();
    }
  }

 private:
  using Scalar = Compute<T>;

  const T* residual_at(int64_t offset) const { return kResidual ? residual_ + offset : nullptr; }
  Scalar slope() const { return static_cast<Scalar>(p_.negative_slope); }

  // ---- NCHW

  void run_planes() {
    const int64_t planes = p_.batch * p_.channels;
    const int64_t blocks = ceil_div(p_.pixels, kBlockElements);
    if (planes < 64 && blocks > 1) {
      Buffer<Coefficients<Scalar>> coefficients(planes);
      plane_coefficients(0, planes, coefficients);
      run_tasks(parallel_for_, planes * blocks, kBlockElements, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t plane = task / blocks, first = task % blocks * kBlockElements;
          normalize_plane(plane, first, min(kBlockElements, p_.pixels - first), coefficients[plane]);
        }
      });
      return;
    }
    run_tasks(parallel_for_, planes, p_.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        Moments total;
        for (int64_t i = 0; i < p_.pixels; i += kBlockElements) {
          merge(total, block_moments(input_ + plane * p_.pixels + i, min(kBlockElements, p_.pixels - i)));
        }
        normalize_plane(plane, 0, p_.pixels, finish(plane, total));
      }
    });
  }

  // Coefficients of planes [first, first + count), every plane cut into blocks.
  void plane_coefficients(int64_t first, int64_t count, Coefficients<Scalar>* coefficients) {
    const int64_t blocks = ceil_div(p_.pixels, kBlockElements);
    Buffer<Moments> moments(count * blocks);
    run_tasks(parallel_for_, count * blocks, kBlockElements, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks * kBlockElements;
        moments[task] =
            block_moments(input_ + (first + task / blocks) * p_.pixels + at, min(kBlockElements, p_.pixels - at));
      }
    });
    for (int64_t plane = 0; plane < count; ++plane) {
      Moments total;
      for (int64_t b = 0; b < blocks; ++b) merge(total, moments[plane * blocks + b]);
      coefficients[plane] = finish(first + plane, total);
    }
  }

  Coefficients<Scalar> finish(int64_t plane, const Moments& moments) const {
    return finish_plane<Scalar>(p_, plane / p_.channels, plane % p_.channels, moments.mean, moments.m2);
  }

  void normalize_plane(int64_t plane, int64_t first, int64_t count, const Coefficients<Scalar>& coefficients) {
    const int64_t at = plane * p_.pixels + first;
    normalize_run<T, kActivation, kResidual>(input_ + at, residual_at(at), output_ + at, count, coefficients, slope());
  }

  // ---- channels_last

  void run_channels_last() {
    constexpr int64_t kCacheElements = 256 * 1024;  // an image that one core's second-level cache holds
    if (p_.batch > 1 && image_ <= kCacheElements) {
      run_tasks(parallel_for_, p_.batch, image_, [&](int64_t begin, int64_t end) {
        ColumnMoments<T> columns(view_);
        Buffer<double> moments(2 * image_blocks_ * p_.channels);
        ColumnCoefficients<Scalar> coefficients(view_.width);
        for (int64_t n = begin; n < end; ++n) {
          for (int64_t b = 0; b < image_blocks_; ++b) image_block_moments(n, b, columns, moments);
          image_coefficients(n, moments, coefficients);
          for (int64_t b = 0; b < image_blocks_; ++b) normalize_image_block(n, b, coefficients);
        }
      });
      return;
    }
    Buffer<double> moments(2 * image_blocks_ * p_.channels);
    ColumnCoefficients<Scalar> coefficients(view_.width);
    for (int64_t n = 0; n < p_.batch; ++n) {
      all_image_moments(n, moments);
      image_coefficients(n, moments, coefficients);
      // Backwards: the blocks that were read last are still in cache.
      run_tasks(parallel_for_, image_blocks_, block_elements(), [&](int64_t begin, int64_t end) {
        for (int64_t b = end; b-- > begin;) normalize_image_block(n, b, coefficients);
      });
    }
  }

  int64_t block_elements() const { return block_pixels(p_.channels) * p_.channels; }

  // moments: mean[channels] and M2[channels] of every block.
  void all_image_moments(int64_t n, double* moments) {
    run_tasks(parallel_for_, image_blocks_, block_elements(), [&](int64_t begin, int64_t end) {
      ColumnMoments<T> columns(view_);
      for (int64_t b = begin; b < end; ++b) image_block_moments(n, b, columns, moments);
    });
  }

  int64_t block_pixel_count(int64_t block) const {
    return min(block_pixels(p_.channels), p_.pixels - block * block_pixels(p_.channels));
  }

  void image_block_moments(int64_t n, int64_t block, ColumnMoments<T>& columns, double* moments) {
    const int64_t first = block * block_pixels(p_.channels);
    double* mean = moments + 2 * block * p_.channels;
    columns.reset();
    columns.add(input_ + n * image_ + first * p_.channels, block_pixel_count(block));
    columns.result(mean, mean + p_.channels);
  }

  // Merges the blocks' moments into the first block's.
  void merge_blocks(double* moments) const {
    double count = static_cast<double>(block_pixel_count(0));
    for (int64_t b = 1; b < image_blocks_; ++b) {
      const double* other = moments + 2 * b * p_.channels;
      const auto here = static_cast<double>(block_pixel_count(b));
      merge_columns(moments, moments + p_.channels, count, other, other + p_.channels, here, p_.channels);
      count += here;
    }
  }

  void image_coefficients(int64_t n, double* moments, ColumnCoefficients<Scalar>& coefficients) const {
    merge_blocks(moments);
    for (int64_t c = 0; c < p_.channels; ++c) {
      coefficients.set(c, p_.channels, view_.width,
                       finish_plane<Scalar>(p_, n, c, moments[c], moments[p_.channels + c]));
    }
  }

  void normalize_image_block(int64_t n, int64_t block, ColumnCoefficients<Scalar>& coefficients) {
    const int64_t first = block * block_pixels(p_.channels);
    const int64_t at = n * image_ + first * p_.channels;
    normalize_pixels<T, kActivation, kResidual>(view_, input_ + at, residual_at(at), output_ + at,
                                                block_pixel_count(block), coefficients, slope());
  }

  // ---- one format in, the other out

  static constexpr int64_t kTile = 64;  // pixels and channels of a transposed tile

  void run_mixed() {
    const int64_t pixel_tiles = ceil_div(p_.pixels, kTile), channel_tiles = ceil_div(p_.channels, kTile);
    Buffer<Coefficients<Scalar>> coefficients(p_.channels);
    Buffer<double> moments(2 * image_blocks_ * p_.channels);
    for (int64_t n = 0; n < p_.batch; ++n) {
      if (p_.channels_last) {
        all_image_moments(n, moments);
        merge_blocks(moments);
        for (int64_t c = 0; c < p_.channels; ++c) {
          coefficients[c] = finish_plane<Scalar>(p_, n, c, moments[c], moments[p_.channels + c]);
        }
      } else {
        plane_coefficients(n * p_.channels, p_.channels, coefficients);
      }
      run_tasks(parallel_for_, pixel_tiles * channel_tiles, kTile * kTile, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          transposed_tile(n, task / channel_tiles * kTile, task % channel_tiles * kTile, coefficients);
        }
      });
    }
  }

  void transposed_tile(int64_t n, int64_t first_pixel, int64_t first_channel, Coefficients<Scalar>* coefficients) {
    T tile[kTile * kTile];
    const int64_t pixels = min(kTile, p_.pixels - first_pixel), channels = min(kTile, p_.channels - first_channel);
    const T* image = input_ + n * image_;
    if (p_.channels_last) {  // to NCHW: tile[channel][pixel]
      for (int64_t i = 0; i < pixels; ++i) {
        const T* pixel = image + (first_pixel + i) * p_.channels + first_channel;
        for (int64_t c = 0; c < channels; ++c) tile[c * kTile + i] = pixel[c];
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = n * image_ + (first_channel + c) * p_.pixels + first_pixel;
        normalize_run<T, kActivation, kResidual>(tile + c * kTile, residual_at(at), output_ + at, pixels,
                                                 coefficients[first_channel + c], slope());
      }
      return;
    }
    Scalar mean[kTile], scale[kTile], shift[kTile];
    for (int64_t c = 0; c < channels; ++c) {  // to channels_last: tile[pixel][channel]
      const T* plane = image + (first_channel + c) * p_.pixels + first_pixel;
      for (int64_t i = 0; i < pixels; ++i) tile[i * kTile + c] = plane[i];
      mean[c] = coefficients[first_channel + c].mean;
      scale[c] = coefficients[first_channel + c].scale;
      shift[c] = coefficients[first_channel + c].shift;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = n * image_ + (first_pixel + i) * p_.channels + first_channel;
      normalize_row<T, kActivation, kResidual>(tile + i * kTile, residual_at(at), output_ + at, channels, mean, scale,
                                               shift, slope());
    }
  }

  const InstanceNormParams& p_;
  ParallelFor parallel_for_;
  const T* input_;
  const T* residual_;
  T* output_;
  RowView<T> view_;
  int64_t image_;         // elements of one sample
  int64_t image_blocks_;  // channels_last blocks of one sample
};

}  // namespace

void instance_norm_forward(const InstanceNormParams& params, ParallelFor parallel_for) {
  with_dtype(params.dtype, [&](auto zero) {
    with_activation(params.activation, [&](auto activation) {
      with_bool(params.residual != nullptr, [&](auto residual) {
        Forward<decltype(zero), decltype(activation)::value, decltype(residual)::value>(params, parallel_for).run();
      });
    });
  });
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
