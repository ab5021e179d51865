// Backward, NCHW: pass 1 sums g and g * d (gradient.cuh) over tiles of a plane, pass 2 adds a plane's tiles in a fixed
// order and writes the gradients, last tile first (the L2 cache still holds what pass 1 read last).
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "gradient.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

template <int kWidth, typename Acc>
struct PlaneFacts {
  Acc mean[kWidth], rstd[kWidth], scale[kWidth], shift[kWidth];
};

template <int kWidth, typename Acc>
__device__ __forceinline__ PlaneFacts<kWidth, Acc> plane_facts(const InstanceNormBackwardParams& p, int64_t plane) {
  PlaneFacts<kWidth, Acc> f;
  const int64_t param = plane / p.channels * p.param_batch_stride + plane % p.channels;
  const Acc mean = static_cast<const Acc*>(p.mean)[plane];
  const Acc rstd = static_cast<const Acc*>(p.rstd)[plane];
  const Acc scale = rstd * load_param(p.weight, p.param_dtype, param, Acc(1));
  const Acc shift = load_param(p.bias, p.param_dtype, param, Acc(0));
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    f.mean[k] = mean;
    f.rstd[k] = rstd;
    f.scale[k] = scale;
    f.shift[k] = shift;
  }
  return f;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    reduce_kernel(const __grid_constant__ InstanceNormBackwardParams p, int parts, int share, acc_t<T>* partials) {
  using Acc = acc_t<T>;
  __shared__ Acc scratch[2][kMaxWarps];
  wait_for_predecessor();
  release_successor();
  const int64_t plane = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int64_t vectors = p.pixels / kWidth;
  const int64_t begin = static_cast<int64_t>(part) * share;
  const int count = static_cast<int>(min(static_cast<int64_t>(share), vectors - begin));
  const auto f = plane_facts<kWidth, Acc>(p, plane);
  Acc sum_g = 0, sum_gd = 0;
  walk_gradients<32, T, kWidth>(
      p, f, static_cast<int>(threadIdx.x), count, kThreads, [&](int i) { return plane * vectors + begin + i; },
      [&](int64_t, const Acc(&g)[kWidth], const Acc(&d)[kWidth]) {
        // A vector's own sums first: fewer additions to the long sums, less rounding in them.
        Acc vector_g = 0, vector_gd = 0;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          vector_g += g[k];
          vector_gd += g[k] * d[k];
        }
        sum_g += vector_g;
        sum_gd += vector_gd;
      });
  sum_g = block_sum(sum_g, scratch[0]);
  sum_gd = block_sum(sum_gd, scratch[1]);
  if (threadIdx.x == 0) {
    partials[blockIdx.x * int64_t(2)] = sum_g;
    partials[blockIdx.x * int64_t(2) + 1] = sum_gd;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    apply_kernel(const __grid_constant__ InstanceNormBackwardParams p, int parts, int share, const acc_t<T>* partials) {
  using Acc = acc_t<T>;
  wait_for_predecessor();
  release_successor();
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t plane = block / parts;
  const int part = static_cast<int>(block % parts);
  const int lane = threadIdx.x % kWarp;
  Acc sum_g = 0, sum_gd = 0;
  for (int j = lane; j < parts; j += kWarp) {
    sum_g += partials[(plane * parts + j) * 2];
    sum_gd += partials[(plane * parts + j) * 2 + 1];
  }
  sum_g = warp_sum(sum_g);
  sum_gd = warp_sum(sum_gd);
  const auto f = plane_facts<kWidth, Acc>(p, plane);
  const Acc grad_weight = sum_gd * f.rstd[0];
  if (part == 0 && threadIdx.x == 0) {
    static_cast<Acc*>(p.grad_bias)[plane] = sum_g;
    static_cast<Acc*>(p.grad_weight)[plane] = grad_weight;
  }
  const GradientFactors<Acc> factors(f.scale[0], f.rstd[0], sum_g, grad_weight, p.pixels);
  Acc slope[kWidth], offset[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    slope[k] = factors.slope;
    offset[k] = factors.offset;
  }
  const int64_t vectors = p.pixels / kWidth;
  const int64_t begin = static_cast<int64_t>(part) * share;
  const int count = static_cast<int>(min(static_cast<int64_t>(share), vectors - begin));
  walk_gradients<32, T, kWidth>(
      p, f, static_cast<int>(threadIdx.x), count, kThreads, [&](int i) { return plane * vectors + begin + i; },
      [&](int64_t index, const Acc(&g)[kWidth], const Acc(&d)[kWidth]) {
        store_gradients<T, kWidth>(p, index, f.scale, slope, offset, g, d);
      });
}

}  // namespace

cudaError_t launch_backward_nchw(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid = dim3(static_cast<unsigned>(params.batch * params.channels * schedule.parts));
  const int parts = static_cast<int>(schedule.parts);
  const int share = static_cast<int>(schedule.share);
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    auto* partials = static_cast<acc_t<T>*>(workspace);
    auto* reduce = schedule.vectorized ? reduce_kernel<T, kFullWidth<T>> : reduce_kernel<T, 1>;
    auto* apply = schedule.vectorized ? apply_kernel<T, kFullWidth<T>> : apply_kernel<T, 1>;
    if (const auto error = launch(reduce, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials))
      return error;
    return launch(apply, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials);
  });
}

}  // namespace styleforge::cuda
