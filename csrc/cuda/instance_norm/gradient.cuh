// The gradient before the norm, g = grad_output * activation'(...), and d = x - mean, for vectors of elements. With
// them, sums over a plane of g and of g * d are all that the rest needs: grad_input = scale * g + (d * slope + offset),
// whose factors are the same for a whole plane.
#pragma once

#include "../../instance_norm_params.h"
#include "../common/activation.cuh"

namespace styleforge::cuda {

// mean, rstd, scale (= rstd * weight) and shift (= bias) of the channels of one vector of a channels_last pixel.
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
#pragma unroll
  for (int k = 0; k < kWidth; ++k) f.scale[k] *= f.rstd[k];
  return f;
}

// Of a plane; grad_weight is rstd times the sum of g * d.
template <typename Acc>
struct GradientFactors {
  Acc slope, offset;
  __device__ __forceinline__ GradientFactors(Acc scale, Acc rstd, Acc sum_g, Acc grad_weight, int64_t pixels) {
    const Acc share = Acc(1) / static_cast<Acc>(pixels);
    slope = -scale * rstd * (grad_weight * share);
    offset = -scale * (sum_g * share);
  }
};

// The result that the derivative is taken from, or the residual; null where neither is needed.
__device__ __forceinline__ const void* further_of(const InstanceNormBackwardParams& p) {
  if (p.activation == Activation::kNone) return nullptr;
  return p.saved_output != nullptr ? p.saved_output : p.residual;
}

// Of the vectors x of the input, dy of the gradient and `further` (see above). kPiecewise: the activation is known to
// be (and no code of the others is fetched).
template <bool kPiecewise, typename T, int kWidth, typename Facts>
__device__ __forceinline__ void gradient_before_norm(const InstanceNormBackwardParams& p, const Facts& f,
                                                     const Vec<T, kWidth>& x, const Vec<T, kWidth>& dy,
                                                     const Vec<T, kWidth>& further, acc_t<T> (&g)[kWidth],
                                                     acc_t<T> (&d)[kWidth]) {
  using Acc = acc_t<T>;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    g[k] = to_acc(dy.data[k]);
    d[k] = to_acc(x.data[k]) - f.mean[k];
  }
  if (p.activation == Activation::kNone) return;
  Acc at[kWidth];
  if (p.saved_output != nullptr) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) at[k] = to_acc(further.data[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) at[k] = d[k] * f.scale[k] + f.shift[k];
    if (p.residual != nullptr) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) at[k] += to_acc(further.data[k]);
    }
  }
  if constexpr (kPiecewise) {  // from the result as from the argument: it has the same sign
    activation_backward_piecewise(g, at, p.activation, static_cast<Acc>(p.negative_slope));
  } else if (p.saved_output != nullptr) {
    activation_backward_from_output(g, at, p.activation, p.negative_slope);
  } else {
    activation_backward(g, at, p.activation, p.negative_slope);
  }
}

// Calls visit(index, g, d) for a thread's vectors begin, begin + step, ... below count of a tile; `index` says where
// they lie. Several are asked for at a time (kBytesAtOnce of each tensor where the activation is cheap): one behind the
// other they left half of the memory's rate unused (8x32x256x256 in half, channels_last, 79 -> 55 us).
template <int kBytesAtOnce, typename T, int kWidth, typename Facts, typename Index, typename Visit>
__device__ __forceinline__ void walk_gradients(const InstanceNormBackwardParams& p, const Facts& f, int begin,
                                               int count, int step, Index&& index, Visit&& visit) {
  using V = Vec<T, kWidth>;
  constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
  // As words: elements of two bytes would take a register each.
  using Raw = std::conditional_t<kBytes % 4 == 0, Vec<uint32_t, kBytes / 4>, V>;
  const auto as_vector = [](const Raw& raw) { return *reinterpret_cast<const V*>(&raw); };
  const void* from_further = further_of(p);
  const auto walk = [&]<int kAtOnce, bool kPiecewise>() {
#pragma unroll 1
    for (int base = begin; base < count; base += kAtOnce * step) {
      Raw x[kAtOnce], dy[kAtOnce], further[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (base + u * step >= count) continue;
        x[u] = load_const<Raw>(p.input, index(base + u * step));
        dy[u] = load_const<Raw>(p.grad_output, index(base + u * step));
      }
      if (from_further != nullptr) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (base + u * step < count) further[u] = load_const<Raw>(from_further, index(base + u * step));
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (base + u * step >= count) break;
        acc_t<T> g[kWidth], d[kWidth];
        gradient_before_norm<kPiecewise>(p, f, as_vector(x[u]), as_vector(dy[u]), as_vector(further[u]), g, d);
        visit(index(base + u * step), g, d);
      }
    }
  };
  if (is_piecewise(p.activation)) {
    walk.template operator()<(kBytes >= 8 ? kBytesAtOnce / kBytes : 4), true>();
  } else {
    walk.template operator()<2, false>();
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ Vec<T, kWidth> input_gradient(const acc_t<T> (&scale)[kWidth],
                                                         const acc_t<T> (&slope)[kWidth],
                                                         const acc_t<T> (&offset)[kWidth], const acc_t<T> (&g)[kWidth],
                                                         const acc_t<T> (&d)[kWidth]) {
  acc_t<T> dx[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) dx[k] = scale[k] * g[k] + (d[k] * slope[k] + offset[k]);
  return rounded<T>(dx);
}

// grad_input; also grad_residual where it is wanted.
template <typename T, int kWidth>
__device__ __forceinline__ void store_gradients(const InstanceNormBackwardParams& p, int64_t index,
                                                const acc_t<T> (&scale)[kWidth], const acc_t<T> (&slope)[kWidth],
                                                const acc_t<T> (&offset)[kWidth], const acc_t<T> (&g)[kWidth],
                                                const acc_t<T> (&d)[kWidth]) {
  store(p.grad_input, index, input_gradient<T>(scale, slope, offset, g, d));
  if (p.grad_residual != nullptr) store(p.grad_residual, index, rounded<T>(g));
}

}  // namespace styleforge::cuda
