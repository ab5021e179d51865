// The activations of feed-forward networks and their derivatives on vectors: y = x * s(x), where s is the normal
// distribution function (gelu), the logistic function (silu, and gelu_tanh of another argument) or a step (relu).
//
// float32 gelu needs Phi(x) = (1 + erf(x / sqrt 2)) / 2 without the cancellation of that formula on the left:
//
//   |x| < 1   1/2 + x p(x^2), p of degree 4: the Taylor series' first five terms, fitted
//   else      the tail Phi(-z) = e^(-z^2 / 2) g(z), z = |x|, and Phi(z) = 1 - Phi(-z). (z + 4) g(z) is a polynomial of
//             degree 9 in q = (z - 4) / (z + 4), relative error 1e-8 (the mapping is that of M. Shepherd, J.
//             Laframboise, Chebyshev Approximation of (1 + 2x) exp(x^2) erfc x, 1981). z^2 is split into two floats,
//             because an error in the exponent is one in all of the result.
//
// In all |Phi - exact| < 2^-24, and a result is within 6 units in the last place even where it is 1e-30. For the 16-bit
// types the tail alone will do, by a polynomial of degree 5 with q = (z - 3) / (z + 3), relative error 2^-15.7. The
// fits are minimax, made in 40 digits.
#pragma once

#include <cmath>

#include "../../ffn_params.h"
#include "activation_math.h"
#include "gelu_table.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

constexpr double kInverseSqrt2 = 0.70710678118654752440;
constexpr double kInverseSqrt2Low = -4.8336466567264567e-17;  // what the double above lacks
constexpr double kInverseSqrtPi = 0.56418958354775628695;
constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
constexpr double kTanhScale = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kTanhCube = 0.044715;

// Phi(x) and the density's exponential e^(-x^2 / 2).
template <typename V>
struct NormalDistribution {
  V cdf, exponential;
};

// kShort: for a result that is going to be rounded to 16 bits.
template <bool kShort, int N>
inline NormalDistribution<Vector<float, N>> normal_distribution(Vector<float, N> x) {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  const F magnitude = bit_cast<F>(bit_cast<U>(x) & 0x7fffffffu);
  const F farthest = broadcast<F>(15.0f);                   // the tail is 0 in float32 from there on
  const F z = magnitude > farthest ? farthest : magnitude;  // a NaN passes through
  if constexpr (kShort) {
    const F exponential = exp_of_sum<N>(z * z * -0.5f, F{});
    const F reciprocal = 1.0f / (z + 3.0f);
    const F q = (z - 3.0f) * reciprocal;
    F g = q * 4.989096429e-3f + -9.772569872e-3f;
    g = g * q + -4.636475444e-2f;
    g = g * q + 2.298551649e-1f;
    g = g * q + -5.094233751e-1f;
    g = g * q + 7.290908694e-1f;
    const F tail = exponential * (g * reciprocal);
    return {x < F{} ? tail : 1.0f - tail, exponential};
  }
  const F high = bit_cast<F>(bit_cast<U>(z) & 0xfffff000u);  // 12 bits, so that its square is exact
  const F exponential = exp_of_sum<N>(high * high * -0.5f, (z - high) * (z + high) * -0.5f);
  const F reciprocal = 1.0f / (z + 4.0f);
  const F q = (z - 4.0f) * reciprocal;
  F g = q * -1.341961470e-4f + 1.746598864e-4f;
  g = g * q + 1.568408799e-3f;
  g = g * q + -3.510211129e-3f;
  g = g * q + -7.524004672e-3f;
  g = g * q + 6.040348858e-2f;
  g = g * q + -1.865236610e-1f;
  g = g * q + 3.871369064e-1f;
  g = g * q + -6.078965664e-1f;
  g = g * q + 7.552851439e-1f;
  const F tail = exponential * (g * reciprocal);
  const F w = x * x;
  F p = w * 9.431737271e-5f + -1.169519266e-3f;
  p = p * w + 9.967301972e-3f;
  p = p * w + -6.648960710e-2f;
  p = p * w + 3.989422619e-1f;
  const F centre = x * p + 0.5f;
  const F outer = x < F{} ? tail : 1.0f - tail;
  return {magnitude < broadcast<F>(1.0f) ? centre : outer, exponential};
}

// erfc from the C library; the rounding of its argument, which it would magnify by z^2, is put right to first order.
template <bool kShort, int N>
inline NormalDistribution<Vector<double, N>> normal_distribution(Vector<double, N> x) {
  NormalDistribution<Vector<double, N>> result;
  for (int i = 0; i < N; ++i) {
    const double magnitude = __builtin_fabs(x[i]);
    const double z = magnitude > 40.0 ? 40.0 : magnitude;
    const double argument = z * kInverseSqrt2;
    const double lost = __builtin_fma(z, kInverseSqrt2, -argument) + z * kInverseSqrt2Low;
    const double square = z * z;
    const double exponential = ::exp(-0.5 * square) * (1.0 - 0.5 * __builtin_fma(z, z, -square));
    const double tail = 0.5 * ::erfc(argument) - lost * kInverseSqrtPi * exponential;
    result.cdf[i] = x[i] < 0.0 ? tail : 1.0 - tail;
    result.exponential[i] = exponential;
  }
  return result;
}

// sigmoid(x) and its derivative. From e^-|x|: 1 - sigmoid(x) would lose its digits on the right, where x multiplies it.
template <typename V>
struct Logistic {
  V value, slope;
};

template <int N, typename Scalar>
inline Logistic<Vector<Scalar, N>> logistic(Vector<Scalar, N> x) {
  using V = Vector<Scalar, N>;
  const V e = exp<N>(x < V{} ? x : -x);
  const V reciprocal = Scalar(1) / (Scalar(1) + e);
  const V other = e * reciprocal;
  return {x < V{} ? other : reciprocal, other * reciprocal};
}

// 1/2 (1 + tanh u) = sigmoid(2 u): this is 2 u, with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <int N, typename Scalar>
inline Vector<Scalar, N> tanh_argument(Vector<Scalar, N> x) {
  return x * (static_cast<Scalar>(2 * kTanhScale) + x * x * static_cast<Scalar>(2 * kTanhScale * kTanhCube));
}

template <bool kShort, int N, typename V>
inline V gelu(V x) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return gelu_by_table(
        x, [](V value) __attribute__((noinline)) { return value * normal_distribution<kShort, N>(value).cdf; });
  }
#endif
  return x * normal_distribution<kShort, N>(x).cdf;
}

template <FfnActivation kActivation, bool kShort, int N, typename Scalar>
inline Vector<Scalar, N> ffn_activate(Vector<Scalar, N> x) {
  using V = Vector<Scalar, N>;
  if constexpr (kActivation == FfnActivation::kGelu) return gelu<kShort, N>(x);
  if constexpr (kActivation == FfnActivation::kGeluTanh) return x / (Scalar(1) + exp<N>(-tanh_argument<N, Scalar>(x)));
  if constexpr (kActivation == FfnActivation::kSilu) return x / (Scalar(1) + exp<N>(-x));
  return x < V{} ? V{} : x;
}

// The activation and its derivative at x; at 0 the derivative of relu is 0, as in PyTorch.
template <typename V>
struct ValueAndSlope {
  V value, slope;
};

template <FfnActivation kActivation, bool kShort, int N, typename Scalar>
inline ValueAndSlope<Vector<Scalar, N>> ffn_activate_with_slope(Vector<Scalar, N> x) {
  using V = Vector<Scalar, N>;
  constexpr Scalar one = 1;
  if constexpr (kActivation == FfnActivation::kGelu) {
    const auto normal = normal_distribution<kShort, N>(x);
    return {x * normal.cdf, normal.cdf + x * (normal.exponential * static_cast<Scalar>(kInverseSqrt2Pi))};
  }
  if constexpr (kActivation == FfnActivation::kGeluTanh) {
    const auto s = logistic<N, Scalar>(tanh_argument<N, Scalar>(x));
    const V slope = static_cast<Scalar>(2 * kTanhScale) + x * x * static_cast<Scalar>(6 * kTanhScale * kTanhCube);
    return {x * s.value, s.value + x * s.slope * slope};
  }
  if constexpr (kActivation == FfnActivation::kSilu) {
    const auto s = logistic<N, Scalar>(x);
    return {x * s.value, s.value + x * s.slope};
  }
  return {x < V{} ? V{} : x, x <= V{} ? V{} : V{} + one};
}

// grad * slope at x. relu chooses, as PyTorch's does: 0 times a gradient that overflowed would be NaN.
template <FfnActivation kActivation, typename V>
inline V ffn_gradient(V grad, V x, V slope) {
  if constexpr (kActivation == FfnActivation::kRelu) return x <= V{} ? V{} : grad;
  return grad * slope;
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
