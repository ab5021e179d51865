// activation(hidden + bias), in place or not, and in the backward its result and its gradient in one pass.
#include "gelu.cuh"
#include "launch.h"
#include "rows.cuh"

namespace styleforge::cuda {
namespace {

// hidden + bias, in what it is computed in.
template <typename T, int kWidth>
__device__ __forceinline__ void biased(acc_t<T> (&x)[kWidth], const Vec<T, kWidth>& hidden,
                                       const Vec<T, kWidth>& bias) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) x[k] = to_acc(hidden.data[k]) + to_acc(bias.data[k]);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    bias_activation_kernel(const __grid_constant__ BiasActivationParams p, int lanes) {
  using V = Vec<T, kWidth>;
  wait_for_predecessor();
  release_successor();
  const RowPlace at(lanes);
  const int64_t vectors = p.columns / kWidth;
  if (at.vector >= vectors) return;
  V bias{};
  if (p.bias != nullptr) bias = load_const<V>(p.bias, at.vector);
  V hidden[kRowsInFlight];
  for_each_row(
      at, p.rows, [&](int64_t row, int i) { hidden[i] = load_vector<V>(p.hidden, row * vectors + at.vector); },
      [&](int64_t row, int i) {
        acc_t<T> x[kWidth];
        biased<T>(x, hidden[i], bias);
        ffn_activate_as<T>(x, p.activation);
        store(p.output, row * vectors + at.vector, rounded<T>(x));
      });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    bias_activation_backward_kernel(const __grid_constant__ BiasActivationBackwardParams p, int lanes) {
  using V = Vec<T, kWidth>;
  wait_for_predecessor();
  release_successor();
  const RowPlace at(lanes);
  const int64_t vectors = p.columns / kWidth;
  if (at.vector >= vectors) return;
  V bias{};
  if (p.bias != nullptr) bias = load_const<V>(p.bias, at.vector);
  V hidden[kRowsInFlight], grad[kRowsInFlight] = {};
  for_each_row(
      at, p.rows,
      [&](int64_t row, int i) {
        hidden[i] = load_vector<V>(p.hidden, row * vectors + at.vector);
        if (p.grad_output != nullptr) grad[i] = load_vector<V>(p.grad_output, row * vectors + at.vector);
      },
      [&](int64_t row, int i) {
        acc_t<T> x[kWidth], gradient[kWidth];
        biased<T>(x, hidden[i], bias);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) gradient[k] = to_acc(grad[i].data[k]);
        ffn_activate_backward<sizeof(T) == 2>(x, gradient, p.activation);
        if (p.output != nullptr) store(p.output, row * vectors + at.vector, rounded<T>(x));
        if (p.grad_output == nullptr) return;
        store(p.grad_hidden, row * vectors + at.vector, rounded<T>(gradient));
      });
}

}  // namespace

cudaError_t launch_bias_activation(const BiasActivationParams& params, cudaStream_t stream) {
  const bool aligned = aligned16(params.hidden) && aligned16(params.bias) && aligned16(params.output);
  return switch_dtype(params.dtype, [&]<typename T>() {
    return launch_rows<T>(bias_activation_kernel<T, kFullWidth<T>>, bias_activation_kernel<T, 1>, params, aligned,
                          stream);
  });
}

cudaError_t launch_bias_activation_backward(const BiasActivationBackwardParams& params, cudaStream_t stream) {
  const bool aligned = aligned16(params.hidden) && aligned16(params.bias) && aligned16(params.output) &&
                       aligned16(params.grad_output) && aligned16(params.grad_hidden);
  return switch_dtype(params.dtype, [&]<typename T>() {
    return launch_rows<T>(bias_activation_backward_kernel<T, kFullWidth<T>>, bias_activation_backward_kernel<T, 1>,
                          params, aligned, stream);
  });
}

}  // namespace styleforge::cuda
