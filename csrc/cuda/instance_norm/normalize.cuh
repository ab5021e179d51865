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

// `residual` is not looked at where the call has none.
template <typename T, int kWidth, typename Affine>
__device__ __forceinline__ Vec<T, kWidth> normalize(const InstanceNormParams& p, const Affine& affine,
                                                    const Vec<T, kWidth>& x, const Vec<T, kWidth>& residual) {
  acc_t<T> y[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) y[k] = affine(to_acc(x.data[k]), k);
  if (p.residual != nullptr) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] += to_acc(residual.data[k]);
  }
  activate(y, p.activation, p.negative_slope);
  Vec<T, kWidth> out;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) out.data[k] = from_acc<T>(y[k]);
  return out;
}

}  // namespace styleforge::cuda
