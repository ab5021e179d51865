// The gradient before the norm: g = grad_output * activation'(...), and xhat, for one vector of elements.
#pragma once

#include "../../instance_norm_params.h"
#include "../common/activation.cuh"

namespace styleforge::cuda {

// mean, rstd, scale (= weight) and shift (= bias) of the channels of one vector of a channels_last pixel.
template <int kWidth, typename Acc>
struct ChannelFacts {
  Acc mean[kWidth], rstd[kWidth], scale[kWidth], shift[kWidth];
};

// load_param of neighbours. The dtype is asked for once: between loads in branches of their own each would wait for the
// one before, sixteen journeys through the L2 cache at the head of a kernel of ten microseconds.
template <int kWidth, typename Acc>
__device__ __forceinline__ void load_params(const void* base, DType dtype, int64_t index, Acc absent,
                                            Acc (&out)[kWidth]) {
  const auto load = [&](const auto* from) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = static_cast<Acc>(to_acc(from[index + k]));
  };
  if (base == nullptr) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = absent;
  } else if (dtype == DType::kFloat32) {
    load(static_cast<const float*>(base));
  } else if (dtype == DType::kFloat16) {
    load(static_cast<const __half*>(base));
  } else if (dtype == DType::kBFloat16) {
    load(static_cast<const __nv_bfloat16*>(base));
  } else {
    load(static_cast<const double*>(base));
  }
}

template <int kWidth, typename Acc>
__device__ __forceinline__ ChannelFacts<kWidth, Acc> channel_facts(const InstanceNormBackwardParams& p, int64_t n,
                                                                   int vector) {
  ChannelFacts<kWidth, Acc> f;
  const int64_t c = static_cast<int64_t>(vector) * kWidth;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    f.mean[k] = static_cast<const Acc*>(p.mean)[n * p.channels + c + k];
    f.rstd[k] = static_cast<const Acc*>(p.rstd)[n * p.channels + c + k];
  }
  load_params<kWidth>(p.weight, p.param_dtype, n * p.param_batch_stride + c, Acc(1), f.scale);
  load_params<kWidth>(p.bias, p.param_dtype, n * p.param_batch_stride + c, Acc(0), f.shift);
  return f;
}

// mean, rstd, scale (= weight) and shift (= bias) of each element's channel; `index` says where the vectors x of the
// input and dy of the gradient lie, and with them those of the result and of the residual.
template <typename T, int kWidth>
__device__ __forceinline__ void gradient_before_norm(const InstanceNormBackwardParams& p, int64_t index,
                                                     const Vec<T, kWidth>& x, const Vec<T, kWidth>& dy,
                                                     const acc_t<T> (&mean)[kWidth], const acc_t<T> (&rstd)[kWidth],
                                                     const acc_t<T> (&scale)[kWidth], const acc_t<T> (&shift)[kWidth],
                                                     acc_t<T> (&g)[kWidth], acc_t<T> (&xhat)[kWidth]) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    g[k] = to_acc(dy.data[k]);
    xhat[k] = (to_acc(x.data[k]) - mean[k]) * rstd[k];
  }
  if (p.activation == Activation::kNone) return;
  Acc at[kWidth];
  if (p.saved_output != nullptr) {
    const V y = load_const<V>(p.saved_output, index);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) at[k] = to_acc(y.data[k]);
    activation_backward_from_output(g, at, p.activation, p.negative_slope);
    return;
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) at[k] = (to_acc(x.data[k]) - mean[k]) * (rstd[k] * scale[k]) + shift[k];
  if (p.residual != nullptr) {
    const V r = load_const<V>(p.residual, index);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) at[k] += to_acc(r.data[k]);
  }
  activation_backward(g, at, p.activation, p.negative_slope);
}

// The same of vectors in memory.
template <typename T, int kWidth>
__device__ __forceinline__ void gradient_before_norm(const InstanceNormBackwardParams& p, int64_t index,
                                                     const acc_t<T> (&mean)[kWidth], const acc_t<T> (&rstd)[kWidth],
                                                     const acc_t<T> (&scale)[kWidth], const acc_t<T> (&shift)[kWidth],
                                                     acc_t<T> (&g)[kWidth], acc_t<T> (&xhat)[kWidth]) {
  using V = Vec<T, kWidth>;
  const V x = load_const<V>(p.input, index);
  const V dy = load_const<V>(p.grad_output, index);
  gradient_before_norm<T, kWidth>(p, index, x, dy, mean, rstd, scale, shift, g, xhat);
}

// grad_input from g, xhat and the channel's means of g and g * xhat; also stores grad_residual where it is wanted.
template <typename T, int kWidth>
__device__ __forceinline__ void store_gradients(const InstanceNormBackwardParams& p, int64_t index,
                                                const acc_t<T> (&factor)[kWidth], const acc_t<T> (&mean_g)[kWidth],
                                                const acc_t<T> (&mean_gx)[kWidth], const acc_t<T> (&g)[kWidth],
                                                const acc_t<T> (&xhat)[kWidth]) {
  using V = Vec<T, kWidth>;
  V dx;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) dx.data[k] = from_acc<T>(factor[k] * (g[k] - mean_g[k] - xhat[k] * mean_gx[k]));
  store(p.grad_input, index, dx);
  if (p.grad_residual == nullptr) return;
  V dr;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) dr.data[k] = from_acc<T>(g[k]);
  store(p.grad_residual, index, dr);
}

}  // namespace styleforge::cuda
