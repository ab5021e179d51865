// Activations and their derivatives on vectors in registers. The switch stands outside the loop over the vector: it is
// uniform over the grid, so it costs one branch for each vector and saves six copies of every kernel.
#pragma once

#include "types.cuh"

namespace styleforge::cuda {

__device__ __forceinline__ float tanh_acc(float v) { return tanhf(v); }
__device__ __forceinline__ double tanh_acc(double v) { return tanh(v); }

// 1 / (1 + exp(-v)). expf, not __expf: the fast one loses bits where |v| is large, and memory hides the difference.
__device__ __forceinline__ float sigmoid_acc(float v) { return 1.0f / (1.0f + expf(-v)); }
__device__ __forceinline__ double sigmoid_acc(double v) { return 1.0 / (1.0 + exp(-v)); }

// none, relu and leaky_relu in a few instructions, without a branch.
__host__ __device__ constexpr bool is_piecewise(Activation activation) {
  return activation == Activation::kNone || activation == Activation::kRelu || activation == Activation::kLeakyRelu;
}
template <int kSize, typename Acc>
__device__ __forceinline__ void activate_piecewise(Acc (&v)[kSize], Activation activation, Acc negative_slope) {
  const Acc slope = activation == Activation::kLeakyRelu ? negative_slope : Acc(1);
  const bool zero = activation == Activation::kRelu;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {  // NaN stays NaN
    const Acc low = zero ? Acc(0) : v[i] * slope;
    v[i] = v[i] <= Acc(0) ? low : v[i];
  }
}

template <int kSize, typename Acc>
__device__ __forceinline__ void activate(Acc (&v)[kSize], Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:  // written so that NaN stays NaN
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = v[i] <= Acc(0) ? Acc(0) : v[i];
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = v[i] > Acc(0) ? v[i] : v[i] * Acc(negative_slope);
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = v[i] * sigmoid_acc(v[i]);
      break;
    case Activation::kSigmoid:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = sigmoid_acc(v[i]);
      break;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = tanh_acc(v[i]);
      break;
  }
}

// grad *= activation'(pre), the derivative taken at the argument.
template <int kSize, typename Acc>
__device__ __forceinline__ void activation_backward(Acc (&grad)[kSize], const Acc (&pre)[kSize], Activation activation,
                                                    double negative_slope) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) grad[i] = pre[i] <= Acc(0) ? Acc(0) : grad[i];
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) grad[i] = pre[i] > Acc(0) ? grad[i] : grad[i] * Acc(negative_slope);
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Acc s = sigmoid_acc(pre[i]);
        grad[i] *= s * (Acc(1) + pre[i] * (Acc(1) - s));
      }
      break;
    case Activation::kSigmoid:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Acc s = sigmoid_acc(pre[i]);
        grad[i] *= s * (Acc(1) - s);
      }
      break;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Acc t = tanh_acc(pre[i]);
        grad[i] *= Acc(1) - t * t;
      }
      break;
  }
}

// The same from the saved result y = activation(pre), for the activations that allow it.
template <int kSize, typename Acc>
__device__ __forceinline__ void activation_backward_from_output(Acc (&grad)[kSize], const Acc (&y)[kSize],
                                                                Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::kSigmoid:
#pragma unroll
      for (int i = 0; i < kSize; ++i) grad[i] *= y[i] * (Acc(1) - y[i]);
      break;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kSize; ++i) grad[i] *= Acc(1) - y[i] * y[i];
      break;
    default:  // relu, leaky_relu with a positive slope: y has the sign of pre
      activation_backward(grad, y, activation, negative_slope);
      break;
  }
}

}  // namespace styleforge::cuda
