// The activations and their derivatives on vectors. NaN and infinities come out as from PyTorch's formulas.
#pragma once

#include <cmath>

#include "../../activation.h"
#include "vec.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

// e^x for x = n ln 2 + r in float32, after Cephes' expf (S. Moshier, 1989): a polynomial of degree 7 in r, scaled by
// 2^n in two steps so that both ends of the range come out right. `shifted` is 1.5 * 2^23 + n.
template <int N>
inline Vector<float, N> exp_reduced(Vector<float, N> r, Vector<float, N> shifted) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I exponent = bit_cast<I>(shifted) - bit_cast<I>(broadcast<F>(12582912.0f));
  const I half = exponent >> 1;
  const F scale1 = bit_cast<F>((half + 127) << 23);
  const F scale2 = bit_cast<F>((exponent - half + 127) << 23);
  return p * scale1 * scale2;
}

// e^x in float32, ln 2 taken off in two parts. Error below 1 ulp.
template <int N>
inline Vector<float, N> exp(Vector<float, N> x) {
  using F = Vector<float, N>;
  const F lowest = broadcast<F>(-104.0f), highest = broadcast<F>(89.0f);
  const F clamped = x < lowest ? lowest : (x > highest ? highest : x);  // a NaN passes through
  const F magic = broadcast<F>(12582912.0f);                            // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = clamped * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  F r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  return exp_reduced<N>(r, shifted);
}

// e^(high + low) in float32 for a small `low` that high's rounding would swallow; high + low within [-120, 89].
template <int N>
inline Vector<float, N> exp_of_sum(Vector<float, N> high, Vector<float, N> low) {
  using F = Vector<float, N>;
  const F magic = broadcast<F>(12582912.0f);
  const F shifted = (high + low) * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  F r = high - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  return exp_reduced<N>(r + low, shifted);
}

template <int N>
inline Vector<double, N> exp(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = ::exp(x[i]);
  return x;
}

// tanh in float32, after Cephes' tanhf: an odd polynomial near 0, otherwise 1 - 2 / (e^(2|x|) + 1).
template <int N>
inline Vector<float, N> tanh(Vector<float, N> x) {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  const U sign = bit_cast<U>(x) & 0x80000000u;
  const F magnitude = bit_cast<F>(bit_cast<U>(x) ^ sign);
  const F large = 1.0f - 2.0f / (exp<N>(magnitude + magnitude) + 1.0f);
  const F z = x * x;
  F p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const F small = p * z * x + x;
  return magnitude < broadcast<F>(0.625f) ? small : bit_cast<F>(bit_cast<U>(large) | sign);
}

template <int N>
inline Vector<double, N> tanh(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = ::tanh(x[i]);
  return x;
}

template <Activation kActivation, int N, typename Scalar>
inline Vector<Scalar, N> activate(Vector<Scalar, N> x, Scalar slope) {
  using V = Vector<Scalar, N>;
  constexpr Scalar one = 1;
  if constexpr (kActivation == Activation::kRelu) return x < V{} ? V{} : x;
  if constexpr (kActivation == Activation::kLeakyRelu) return x > V{} ? x : x * slope;
  if constexpr (kActivation == Activation::kSilu) return x / (one + exp<N>(-x));
  if constexpr (kActivation == Activation::kSigmoid) return one / (one + exp<N>(-x));
  if constexpr (kActivation == Activation::kTanh) return tanh<N>(x);
  return x;
}

// grad * activation'(pre); `value` is the activation's result when kFromOutput, else its argument. At 0 the derivative
// of relu is 0 and that of leaky_relu is the slope, as in PyTorch.
template <Activation kActivation, bool kFromOutput, int N, typename Scalar>
inline Vector<Scalar, N> activation_gradient(Vector<Scalar, N> grad, Vector<Scalar, N> value, Scalar slope) {
  using V = Vector<Scalar, N>;
  constexpr Scalar one = 1;
  if constexpr (kActivation == Activation::kNone) return grad;
  if constexpr (kActivation == Activation::kRelu) return value <= V{} ? V{} : grad;
  if constexpr (kActivation == Activation::kLeakyRelu) return value > V{} ? grad : grad * slope;
  if constexpr (kActivation == Activation::kSilu) {
    const V sigmoid = one / (one + exp<N>(-value));
    return grad * (sigmoid * (one + value * (one - sigmoid)));
  }
  if constexpr (kActivation == Activation::kSigmoid) {
    const V y = kFromOutput ? value : activate<Activation::kSigmoid, N, Scalar>(value, slope);
    return grad * ((one - y) * y);
  }
  if constexpr (kActivation == Activation::kTanh) {
    const V y = kFromOutput ? value : activate<Activation::kTanh, N, Scalar>(value, slope);
    return grad * (one - y * y);
  }
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
