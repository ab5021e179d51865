// The last step of every path: y = activation((x - mean) * scale + shift + residual) on one vector in registers, with
// scale = rstd * weight and shift = bias.
#pragma once

#include "../../instance_norm_params.h"
#include "../common/activation.cuh"

namespace styleforge::cuda {

// NCHW: a vector lies in one plane.
template <typename Acc>
struct PlaneAffine {
  Acc mean, scale, shift;
  __device__ __forceinline__ Acc operator()(Acc x, int) const { return (x - mean) * scale + shift; }
};

// channels_last: a vector has kWidth neighbouring channels.
template <typename Acc, int kWidth>
struct ChannelAffine {
  Acc mean[kWidth], scale[kWidth], shift[kWidth];
  __device__ __forceinline__ Acc operator()(Acc x, int k) const { return (x - mean[k]) * scale[k] + shift[k]; }
};

// What a call's last step has to do. Told apart once, outside the loops: short kernels must not fetch the long code of
// the activations with transcendental functions, nor branch for every vector.
enum class Finish { kPlain, kResidual, kSmooth };

// Calls body.template operator()<Finish>(): kPlain and kResidual have an activation of a few instructions, kSmooth any,
// and a residual perhaps.
template <typename Body>
__device__ __forceinline__ void switch_finish(const InstanceNormParams& p, Body&& body) {
  if (!is_piecewise(p.activation)) {
    body.template operator()<Finish::kSmooth>();
  } else if (p.residual != nullptr) {
    body.template operator()<Finish::kResidual>();
  } else {
    body.template operator()<Finish::kPlain>();
  }
}
template <Finish kFinish>
__device__ __forceinline__ bool has_residual(const InstanceNormParams& p) {
  return kFinish == Finish::kResidual || (kFinish == Finish::kSmooth && p.residual != nullptr);
}

// `residual` is not looked at where the call has none.
template <Finish kFinish, typename T, int kWidth, typename Affine>
__device__ __forceinline__ Vec<T, kWidth> normalize(const InstanceNormParams& p, const Affine& affine,
                                                    const Vec<T, kWidth>& x, const Vec<T, kWidth>& residual) {
  acc_t<T> y[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) y[k] = affine(to_acc(x.data[k]), k);
  if (has_residual<kFinish>(p)) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] += to_acc(residual.data[k]);
  }
  if constexpr (kFinish == Finish::kSmooth) {
    activate(y, p.activation, p.negative_slope);
  } else {
    activate_piecewise(y, p.activation, static_cast<acc_t<T>>(p.negative_slope));
  }
  return rounded<T>(y);
}

// Index of a plane's weight and bias. 32-bit: the division of two 64-bit numbers is a hundred instructions, one after
// the other, and it would stand at the head of short kernels. A launch has fewer than 2^31 blocks, so fewer planes.
__device__ __forceinline__ int64_t param_of(const InstanceNormParams& p, unsigned plane) {
  const auto channels = static_cast<unsigned>(p.channels);
  const unsigned n = plane / channels;
  return n * p.param_batch_stride + (plane - n * channels);
}

}  // namespace styleforge::cuda
