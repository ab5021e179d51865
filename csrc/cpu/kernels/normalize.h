// The normalise pass: y = activation((x - mean) * scale + shift + residual), over a run of one plane (scalar
// coefficients) or over rows whose columns are channels (a coefficient per column).
#pragma once

#include "activation_math.h"
#include "tasks.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

template <typename T, Activation kActivation, bool kResidual>
inline void normalize_run(const T* input, const T* residual, T* output, int64_t count,
                          Coefficients<Compute<T>> coefficients, Compute<T> slope) {
  constexpr int kN = kLanes<T>;
  using V = Vector<Compute<T>, kN>;
  const auto formula = [&](V x, V r) {
    V y = (x - coefficients.mean) * coefficients.scale + coefficients.shift;
    if constexpr (kResidual) y += r;
    return activate<kActivation, kN, Compute<T>>(y, slope);
  };
  int64_t i = 0;
  for (; i + kN <= count; i += kN) {
    V r{};
    if constexpr (kResidual) r = load<kN>(residual + i);
    store<kN>(output + i, formula(load<kN>(input + i), r));
  }
  if (i < count) {
    const int some = static_cast<int>(count - i);
    V r{};
    if constexpr (kResidual) r = load_some<kN>(residual + i, some);
    store_some<kN>(output + i, formula(load_some<kN>(input + i, some), r), some);
  }
}

// Coefficients of `width` columns, structure of arrays.
template <typename Scalar>
struct ColumnCoefficients {
  explicit ColumnCoefficients(int64_t width) : mean(width), scale(width), shift(width) {}

  // Channel c of every repetition.
  void set(int64_t c, int64_t channels, int64_t width, const Coefficients<Scalar>& value) {
    for (int64_t j = c; j < width; j += channels) {
      mean[j] = value.mean;
      scale[j] = value.scale;
      shift[j] = value.shift;
    }
  }

  Buffer<Scalar> mean, scale, shift;
};

// One row of `count` columns from column `first` on.
template <typename T, Activation kActivation, bool kResidual>
inline void normalize_row(const T* input, const T* residual, T* output, int64_t count, const Compute<T>* mean,
                          const Compute<T>* scale, const Compute<T>* shift, Compute<T> slope) {
  constexpr int kN = kLanes<T>;
  using V = Vector<Compute<T>, kN>;
  const auto formula = [&](V x, V m, V s, V b, V r) {
    V y = (x - m) * s + b;
    if constexpr (kResidual) y += r;
    return activate<kActivation, kN, Compute<T>>(y, slope);
  };
  int64_t j = 0;
  for (; j + kN <= count; j += kN) {
    V r{};
    if constexpr (kResidual) r = load<kN>(residual + j);
    store<kN>(output + j,
              formula(load<kN>(input + j), load<kN>(mean + j), load<kN>(scale + j), load<kN>(shift + j), r));
  }
  if (j < count) {
    const int some = static_cast<int>(count - j);
    V r{};
    if constexpr (kResidual) r = load_some<kN>(residual + j, some);
    store_some<kN>(output + j,
                   formula(load_some<kN>(input + j, some), load_some<kN>(mean + j, some),
                           load_some<kN>(scale + j, some), load_some<kN>(shift + j, some), r),
                   some);
  }
}

// `pixels` consecutive channels_last pixels.
template <typename T, Activation kActivation, bool kResidual>
inline void normalize_pixels(const RowView<T>& view, const T* input, const T* residual, T* output, int64_t pixels,
                             ColumnCoefficients<Compute<T>>& coefficients, Compute<T> slope) {
  const int64_t rows = view.rows(pixels), rest = view.rest(pixels);
  for (int64_t r = 0; r < rows + (rest > 0); ++r) {
    const int64_t at = r * view.width;
    normalize_row<T, kActivation, kResidual>(input + at, kResidual ? residual + at : nullptr, output + at,
                                             r < rows ? view.width : rest, coefficients.mean, coefficients.scale,
                                             coefficients.shift, slope);
  }
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
