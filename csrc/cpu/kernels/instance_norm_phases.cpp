// Instance norm over the phases of an upsampling convolution (csrc/cpu/upsample_phases.h) for one instruction set:
// reads the four shifted windows and writes the interleaved picture. Everything is channels_last.
#include "kernels.h"
#include "moments.h"
#include "normalize.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {
namespace {

template <typename T, Activation kActivation, bool kResidual>
class PhaseForward {
 public:
  PhaseForward(const UpsamplePhasesParams& params, ParallelFor parallel_for)
      : p_(params),
        norm_(params.norm),
        parallel_for_(parallel_for),
        view_(params.norm.channels),
        row_blocks_(ceil_div(params.height, kRows)) {}

  // A task holds the four windows of kRows input rows.
  void run() {
    const int64_t channels = norm_.channels;
    Buffer<double> moments(2 * row_blocks_ * channels);
    Buffer<Scalar> mean(channels), scale(channels), shift(channels);
    for (int64_t n = 0; n < norm_.batch; ++n) {
      run_tasks(parallel_for_, row_blocks_, 4 * kRows * p_.width * channels, [&](int64_t begin, int64_t end) {
        ColumnMoments<T> columns(view_);
        Buffer<double> row(2 * channels);
        for (int64_t b = begin; b < end; ++b) block_moments(n, b, columns, row, moments + 2 * b * channels);
      });
      auto count = static_cast<double>(block_pixel_count(0));
      for (int64_t b = 1; b < row_blocks_; ++b) {
        const double* other = moments + 2 * b * channels;
        const auto here = static_cast<double>(block_pixel_count(b));
        merge_columns(moments, moments + channels, count, other, other + channels, here, channels);
        count += here;
      }
      for (int64_t c = 0; c < channels; ++c) {
        const auto value = finish_plane<Scalar>(norm_, n, c, moments[c], moments[channels + c]);
        mean[c] = value.mean;
        scale[c] = value.scale;
        shift[c] = value.shift;
      }
      run_tasks(parallel_for_, row_blocks_, 4 * kRows * p_.width * channels, [&](int64_t begin, int64_t end) {
        for (int64_t b = end; b-- > begin;) {
          for (int64_t i = b * kRows; i < min(p_.height, (b + 1) * kRows); ++i) {
            write_row(n, i, 0, mean, scale, shift);
            write_row(n, i, 1, mean, scale, shift);
          }
        }
      });
    }
  }

 private:
  using Scalar = Compute<T>;
  static constexpr int64_t kRows = 4;

  // Row i of the window of phase (a, b) of sample n.
  const T* window(int64_t n, int64_t i, int a, int b) const {
    const int64_t pixel = (n * (p_.height + 1) + i + a) * (p_.width + 1) + b;
    return static_cast<const T*>(p_.phases[2 * a + b]) + pixel * norm_.channels;
  }

  int64_t block_pixel_count(int64_t block) const { return 4 * min(kRows, p_.height - block * kRows) * p_.width; }

  // Writes mean[channels] and M2[channels] to `moments`; `row` is scratch of the same size.
  void block_moments(int64_t n, int64_t block, ColumnMoments<T>& columns, double* row, double* moments) const {
    const int64_t channels = norm_.channels;
    const bool whole_rows = view_.rest(p_.width) == 0;  // else every picture row ends in a partial row of the view
    double count = 0;
    columns.reset();
    for (int phase = 0; phase < 4; ++phase) {
      for (int64_t i = block * kRows; i < min(p_.height, (block + 1) * kRows); ++i) {
        columns.add(window(n, i, phase / 2, phase % 2), p_.width);
        if (whole_rows) continue;
        if (count == 0) {
          count = columns.result(moments, moments + channels);
        } else {
          const double here = columns.result(row, row + channels);
          merge_columns(moments, moments + channels, count, row, row + channels, here, channels);
          count += here;
        }
        columns.reset();
      }
    }
    if (whole_rows) columns.result(moments, moments + channels);
  }

  void write_row(int64_t n, int64_t i, int a, const Scalar* mean, const Scalar* scale, const Scalar* shift) const {
    const int64_t channels = norm_.channels;
    const T* even = window(n, i, a, 0);
    const T* odd = window(n, i, a, 1);
    const int64_t first = (n * 2 * p_.height + 2 * i + a) * 2 * p_.width * channels;
    T* output = static_cast<T*>(norm_.output) + first;
    const T* residual = kResidual ? static_cast<const T*>(norm_.residual) + first : nullptr;
    const auto slope = static_cast<Scalar>(norm_.negative_slope);
    for (int64_t j = 0; j < 2 * p_.width; ++j) {
      const T* from = (j & 1 ? odd : even) + j / 2 * channels;
      normalize_row<T, kActivation, kResidual>(from, kResidual ? residual + j * channels : nullptr,
                                               output + j * channels, channels, mean, scale, shift, slope);
    }
  }

  const UpsamplePhasesParams& p_;
  const InstanceNormParams& norm_;
  ParallelFor parallel_for_;
  RowView<T> view_;
  int64_t row_blocks_;
};

}  // namespace

void instance_norm_phases(const UpsamplePhasesParams& params, ParallelFor parallel_for) {
  with_dtype(params.norm.dtype, [&](auto zero) {
    with_activation(params.norm.activation, [&](auto activation) {
      with_bool(params.norm.residual != nullptr, [&](auto residual) {
        PhaseForward<decltype(zero), decltype(activation)::value, decltype(residual)::value>(params, parallel_for)
            .run();
      });
    });
  });
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
