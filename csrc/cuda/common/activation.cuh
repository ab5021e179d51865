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

// none, relu and leaky_relu: a few instructions.
__host__ __device__ constexpr bool is_piecewise(Activation activation) {
  return activation == Activation::kNone || activation == Activation::kRelu || activation == Activation::kLeakyRelu;
}
// The larger of v and 0; NaN stays NaN.
__device__ __forceinline__ float relu_acc(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(v));
  return result;
#else
  return v <= 0.0f ? 0.0f : v;
#endif
}
__device__ __forceinline__ double relu_acc(double v) { return v <= 0.0 ? 0.0 : v; }

template <int kSize, typename Acc>
__device__ __forceinline__ void activate_piecewise(Acc (&v)[kSize], Activation activation, Acc negative_slope) {
  if (activation == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = relu_acc(v[i]);
  } else if (activation == Activation::kLeakyRelu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = v[i] <= Acc(0) ? v[i] * negative_slope : v[i];  // NaN stays NaN
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

template <int kSize, typename Acc>
__device__ __forceinline__ void activation_backward_piecewise(Acc (&grad)[kSize], const Acc (&pre)[kSize],
                                                              Activation activation, Acc negative_slope) {
  if (activation == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) grad[i] = pre[i] <= Acc(0) ? Acc(0) : grad[i];
  } else if (activation == Activation::kLeakyRelu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) grad[i] = pre[i] > Acc(0) ? grad[i] : grad[i] * negative_slope;
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
