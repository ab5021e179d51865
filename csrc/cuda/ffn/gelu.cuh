// The activations of feed-forward networks and their derivatives on vectors in registers.
//
// float32 gelu is x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2, inlined and without erff, whose branches would cost a
// matrix product's epilogue its overlap. As csrc/cpu/kernels/gelu_math.h has it, with the same fits:
//
//   |x| < 1   1/2 + x p(x^2)
//   else      the tail Phi(-z) = e^(-z^2 / 2) g(z), z = |x|, and Phi(z) = 1 - Phi(-z); (z + 4) g(z) is a polynomial in
//             q = (z - 4) / (z + 4). e^ is 2^ of a sum of two floats: an error in the exponent is one in all of the
//             result.
//
// |Phi - exact| < 2^-24; a result is within a few units in the last place also far on the left, where erf's formula has
// lost everything. For 16-bit types the tail alone, to 2^-15.
#pragma once

#include "../../ffn_params.h"
#include "../common/activation.cuh"
#include "../common/approximate.cuh"
#include "../common/reduce.cuh"

namespace styleforge::cuda {

// Phi(x) and e^(-x^2 / 2), the density's exponential. kShort: for a result that is going to be rounded to 16 bits.
template <typename Acc>
struct NormalDistribution {
  Acc cdf, exponential;
};

// Phi(-z) e^(z^2 / 2) for z >= 0: r times a polynomial in r = 1 / (z + 3), to 2^-15.
__device__ __forceinline__ float short_tail(float z) {
  const float r = reciprocal_approximate(z + 3.0f);
  float g = fmaf(r, -3.879308899e1f, 1.966213664e1f);
  g = fmaf(g, r, 7.682521630e0f);
  g = fmaf(g, r, 2.952480550e0f);
  g = fmaf(g, r, 1.217721110e0f);
  g = fmaf(g, r, 3.983742200e-1f);
  return g * r;
}

// The polynomials of float32's Phi: (z + 4) g(z) of q = (z - 4) / (z + 4), and p of x^2.
__device__ __forceinline__ float tail_polynomial(float q) {
  float g = fmaf(q, -1.341961470e-4f, 1.746598864e-4f);
  g = fmaf(g, q, 1.568408799e-3f);
  g = fmaf(g, q, -3.510211129e-3f);
  g = fmaf(g, q, -7.524004672e-3f);
  g = fmaf(g, q, 6.040348858e-2f);
  g = fmaf(g, q, -1.865236610e-1f);
  g = fmaf(g, q, 3.871369064e-1f);
  g = fmaf(g, q, -6.078965664e-1f);
  g = fmaf(g, q, 7.552851439e-1f);
  return g;
}
__device__ __forceinline__ float centre_polynomial(float w) {
  float p = fmaf(w, 9.431737271e-5f, -1.169519266e-3f);
  p = fmaf(p, w, 9.967301972e-3f);
  p = fmaf(p, w, -6.648960710e-2f);
  p = fmaf(p, w, 3.989422619e-1f);
  return p;
}

template <bool kShort>
__device__ __forceinline__ NormalDistribution<float> normal_distribution(float x) {
  constexpr float kScale = -7.213475108e-1f;     // -log2(e) / 2
  constexpr float kScaleLow = -9.629814956e-9f;  // what the float above lacks
  constexpr float kLn2 = 6.931471806e-1f;
  const float z = fminf(fabsf(x), 15.0f);  // the tail is 0 in float32 from there on; NaN comes back with x
  if constexpr (kShort) {
    const float exponential = exp2_flushed(z * z * kScale);
    const float tail = exponential * short_tail(z);
    return {x < 0.0f ? tail : 1.0f - tail, exponential};
  }
  const float square = __fmul_rn(z, z);
  const float square_low = __fmaf_rn(z, z, -square);
  const float power = __fmul_rn(square, kScale);
  const float power_low = __fmaf_rn(square, kScale, -power) + fmaf(square, kScaleLow, square_low * kScale);
  const float rough = exp2_approximate(power);
  const float exponential = fmaf(rough * power_low, kLn2, rough);
  const float reciprocal = reciprocal_approximate(z + 4.0f);
  const float q = (z - 4.0f) * reciprocal;
  const float tail = exponential * (tail_polynomial(q) * reciprocal);
  const float centre = fmaf(x, centre_polynomial(x * x), 0.5f);
  const float outer = x < 0.0f ? tail : 1.0f - tail;
  return {z < 1.0f ? centre : outer, exponential};
}

template <bool kShort>
__device__ __forceinline__ NormalDistribution<double> normal_distribution(double x) {
  return {normcdf(x), exp(-0.5 * (x * x))};
}

// 1/2 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): 2 u, and its derivative.
constexpr double kTwoTanhScale = 1.59576912160573071176;
constexpr double kTanhCube = 0.044715;
template <typename Acc>
__device__ __forceinline__ Acc tanh_argument(Acc x) {
  return x * (Acc(kTwoTanhScale) + x * x * Acc(kTwoTanhScale * kTanhCube));
}
template <typename Acc>
__device__ __forceinline__ Acc tanh_argument_slope(Acc x) {
  return Acc(kTwoTanhScale) + x * x * Acc(3 * kTwoTanhScale * kTanhCube);
}

// sigmoid(x) and its derivative. From e^-|x|: 1 - sigmoid(x) would lose its digits on the right, where x multiplies it.
template <typename Acc>
struct Logistic {
  Acc value, slope;
};
template <typename Acc>
__device__ __forceinline__ Logistic<Acc> logistic(Acc x) {
  const Acc e = exp(-fabs(x));
  const Acc r = reciprocal(Acc(1) + e);
  const Acc other = e * r;
  return {x < Acc(0) ? other : r, other * r};
}

// gelu for a result that is going to be rounded to 16 bits: max(x, 0) - |x| Phi(-|x|), without a choice between the
// sides. The maximum is a sum that is NaN for -inf, as PyTorch's result.
__device__ __forceinline__ float gelu_short(float x) {
  constexpr float kScale = -7.213475108e-1f;  // -log2(e) / 2
  const float z = fminf(fabsf(x), 15.0f);
  const float tail = exp2_flushed(z * kScale * z) * short_tail(z);
  const float half = 0.5f * x;
  return fmaf(-z, tail, half + fabsf(half));
}

// A float32 number that a matrix product rounds to TF32.
struct TF32;

// gelu(2 h), the same where it is known what the result is rounded to: 2 Phi(-2 |h|) as 2^ of a polynomial, to a
// tenth of a unit in the last place of T and as far as T has numbers; TF32 as far as -6, to 6e-9 further on the left
// (PyTorch's float32 erf has lost more there). One instruction of the special function unit instead of two, five others
// less. Polynomials that go down on the right are followed as far as they go; inf stays.
template <typename T>
__device__ __forceinline__ float gelu_of_twice(float h) {
  float z, power;
  if constexpr (std::is_same_v<T, __half>) {
    z = fminf(fabsf(h), 3.0f);
    power = fmaf(z, 2.126519494e-03f, -2.426394186e-02f);
    power = fmaf(power, z, 1.278136962e-01f);
    power = fmaf(power, z, -4.252082948e-01f);
    power = fmaf(power, z, -1.836296459e+00f);
    power = fmaf(power, z, -2.302141618e+00f);
    power = fmaf(power, z, -5.744767651e-06f);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    z = fminf(fabsf(h), 1024.0f);
    power = fmaf(z, -6.205187240e-05f, 1.556978258e-03f);
    power = fmaf(power, z, -1.658924258e-02f);
    power = fmaf(power, z, 9.934966442e-02f);
    power = fmaf(power, z, -3.782940704e-01f);
    power = fmaf(power, z, -1.871140321e+00f);
    power = fmaf(power, z, -2.292669079e+00f);
    power = fmaf(power, z, -4.231425337e-04f);
  } else {
    static_assert(std::is_same_v<T, TF32>);
    z = fminf(fabsf(h), 3.0f);
    power = fmaf(z, 1.471027848e-03f, -1.955195516e-02f);
    power = fmaf(power, z, 1.151169688e-01f);
    power = fmaf(power, z, -4.094610214e-01f);
    power = fmaf(power, z, -1.845106721e+00f);
    power = fmaf(power, z, -2.300341368e+00f);
    power = fmaf(power, z, -6.559478061e-05f);
  }
  return fmaf(-z, exp2_flushed(power), h + fabsf(h));
}
template <typename T>
__device__ __forceinline__ float gelu_as(float x) {
  return gelu_of_twice<T>(0.5f * x);
}

// sigmoid(x) for a result that is going to be rounded to 16 bits.
__device__ __forceinline__ float sigmoid_short(float x) {
  constexpr float kLog2E = 1.442695041f;
  return reciprocal_approximate(1.0f + exp2_flushed(x * -kLog2E));
}
template <bool kShort, typename Acc>
__device__ __forceinline__ Acc ffn_sigmoid(Acc x) {
  if constexpr (kShort) {
    return sigmoid_short(x);
  } else {
    return sigmoid_acc(x);
  }
}

// As in activation.cuh, the switch stands outside the loop: one branch for each vector.
template <bool kShort, int kSize, typename Acc>
__device__ __forceinline__ void ffn_activate(Acc (&v)[kSize], FfnActivation activation) {
  switch (activation) {
    case FfnActivation::kGelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if constexpr (kShort) {
          v[i] = gelu_short(v[i]);
        } else {
          v[i] *= normal_distribution<kShort>(v[i]).cdf;
        }
      }
      break;
    case FfnActivation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] *= ffn_sigmoid<kShort>(tanh_argument(v[i]));
      break;
    case FfnActivation::kRelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = v[i] <= Acc(0) ? Acc(0) : v[i];  // NaN stays NaN
      break;
    case FfnActivation::kSilu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] *= ffn_sigmoid<kShort>(v[i]);
      break;
  }
}

// For results that are going to be rounded to T.
template <typename T, int kSize, typename Acc>
__device__ __forceinline__ void ffn_activate_as(Acc (&v)[kSize], FfnActivation activation) {
  if constexpr (sizeof(T) == 2) {
    if (activation == FfnActivation::kGelu) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] = gelu_as<T>(v[i]);
      return;
    }
  }
  ffn_activate<sizeof(T) == 2>(v, activation);
}

// v becomes the activation's result, and `grad` is multiplied by its derivative; at 0 that of relu is 0. Where it is 0,
// relu stops infinite gradients, as PyTorch's does.
template <bool kShort, int kSize, typename Acc>
__device__ __forceinline__ void ffn_activate_backward(Acc (&v)[kSize], Acc (&grad)[kSize], FfnActivation activation) {
  constexpr Acc kInverseSqrt2Pi = Acc(0.39894228040143267794);
  switch (activation) {
    case FfnActivation::kGelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const auto normal = normal_distribution<kShort>(v[i]);
        grad[i] *= normal.cdf + v[i] * (normal.exponential * kInverseSqrt2Pi);
        v[i] *= normal.cdf;
      }
      break;
    case FfnActivation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const auto s = logistic(tanh_argument(v[i]));
        grad[i] *= s.value + v[i] * s.slope * tanh_argument_slope(v[i]);
        v[i] *= s.value;
      }
      break;
    case FfnActivation::kRelu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        grad[i] = v[i] <= Acc(0) ? Acc(0) : grad[i];
        v[i] = v[i] <= Acc(0) ? Acc(0) : v[i];
      }
      break;
    case FfnActivation::kSilu:
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const auto s = logistic(v[i]);
        grad[i] *= s.value + v[i] * s.slope;
        v[i] *= s.value;
      }
      break;
  }
}

}  // namespace styleforge::cuda
