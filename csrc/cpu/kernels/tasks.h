// Small helpers of the norm kernels: lambdas as tasks, run time to compile time switches, scratch memory, coefficients.
#pragma once

#include <cmath>
#include <cstdint>
#include <new>

#include "../../instance_norm_params.h"
#include "../instance_norm.h"
#include "vec.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// task(begin, end) over [0, count); the grain keeps the work of one thread above about `kGrainElements` elements.
constexpr int64_t kGrainElements = 16384;
template <typename Task>
inline void run_tasks(ParallelFor parallel_for, int64_t count, int64_t elements_each, Task&& task) {
  parallel_for(
      count, max(1, kGrainElements / max(1, elements_each)),
      [](int64_t begin, int64_t end, void* context) { (*static_cast<Task*>(context))(begin, end); }, &task);
}

// Uninitialised scratch memory. (std::vector would put its members, compiled for this instruction set, up for sharing.)
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T)))) {}
  ~Buffer() { ::operator delete(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

template <typename Body>
inline void with_bool(bool value, Body&& body) {
  if (value) {
    body(Constant<true>{});
  } else {
    body(Constant<false>{});
  }
}

template <typename Body>
inline void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kNone:
      return body(Constant<Activation::kNone>{});
    case Activation::kRelu:
      return body(Constant<Activation::kRelu>{});
    case Activation::kLeakyRelu:
      return body(Constant<Activation::kLeakyRelu>{});
    case Activation::kSilu:
      return body(Constant<Activation::kSilu>{});
    case Activation::kSigmoid:
      return body(Constant<Activation::kSigmoid>{});
    case Activation::kTanh:
      return body(Constant<Activation::kTanh>{});
  }
}

// body(T{}) with the storage type.
template <typename Body>
inline void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(Half{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat64:
      return body(double{});
  }
}

inline double param_at(const void* data, DType dtype, int64_t index, double absent) {
  if (data == nullptr) return absent;
  double result = 0;
  with_dtype(dtype, [&](auto zero) { result = to_double(static_cast<const decltype(zero)*>(data)[index]); });
  return result;
}

inline double weight_at(const InstanceNormParams& p, int64_t n, int64_t c) {
  return param_at(p.weight, p.param_dtype, n * p.param_batch_stride + c, 1.0);
}
inline double bias_at(const InstanceNormParams& p, int64_t n, int64_t c) {
  return param_at(p.bias, p.param_dtype, n * p.param_batch_stride + c, 0.0);
}

// y = (x - mean) * scale + shift. What the rounding of mean to the compute type loses is put into shift.
template <typename Scalar>
struct Coefficients {
  Scalar mean, scale, shift;
};

template <typename Scalar>
inline Coefficients<Scalar> make_coefficients(const InstanceNormParams& p, int64_t n, int64_t c, double mean,
                                              double rstd) {
  const double scale = rstd * weight_at(p, n, c);
  const auto rounded = static_cast<Scalar>(mean);
  const double shift = bias_at(p, n, c) + (static_cast<double>(rounded) - mean) * scale;
  return {rounded, static_cast<Scalar>(scale), static_cast<Scalar>(shift)};
}

// The same from the moments of one plane; stores the statistics where they are asked for.
template <typename Scalar>
inline Coefficients<Scalar> finish_plane(const InstanceNormParams& p, int64_t n, int64_t c, double mean, double m2) {
  const double rstd = 1.0 / std::sqrt(m2 / static_cast<double>(p.pixels) + p.eps);
  const int64_t index = n * p.channels + c;
  if (p.mean != nullptr) static_cast<Scalar*>(p.mean)[index] = static_cast<Scalar>(mean);
  if (p.rstd != nullptr) static_cast<Scalar*>(p.rstd)[index] = static_cast<Scalar>(rstd);
  return make_coefficients<Scalar>(p, n, c, mean, rstd);
}

// A channels_last image of [pixels, channels] seen as rows of `width` = channels * repeat elements, so that whole
// vectors fit a row, and enough of them to keep several sums under way, when channels is small or odd. `rest` elements
// (fewer than a row) follow the last whole row.
template <typename T>
struct RowView {
  int64_t channels, repeat, width;

  explicit RowView(int64_t channel_count) : channels(channel_count), repeat(1) {
    constexpr int64_t kWide = 512;  // from here on a partial vector at the end of a row is not worth the trouble
    constexpr int64_t kLeast = 8 * kDoubles;
    const auto fits = [&] { return channels * repeat % kLanes<T> == 0 && channels * repeat >= kLeast; };
    while (channels < kWide && repeat < 64 && !fits()) repeat *= 2;
    width = channels * repeat;
  }
  int64_t rows(int64_t pixels) const { return pixels / repeat; }
  int64_t rest(int64_t pixels) const { return pixels % repeat * channels; }
};

// Pixels of one channels_last block: about 64 Ki elements, a multiple of every RowView::repeat.
inline int64_t block_pixels(int64_t channels) { return max(64, ceil_div(ceil_div(65536, channels), 64) * 64); }

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
