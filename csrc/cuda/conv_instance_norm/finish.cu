// What follows the convolution, channels_last: the tiles' moments are merged, then `finish` normalises, adds the
// residual and activates, 128 bytes of channels by a range of pixels a block.
//
// Few tiles: every block of `finish` merges them for its channels. Many: `merge` does it once, and `finish` loads its
// first pixels before it waits for that (`merge` starts it only after the convolution is complete). Statistics go
// through shared memory, one load a block: when every thread reads the same few lines from the L2 cache, those lines'
// slices are the bottleneck (15 us on 1x128x128x128).
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "kernels.h"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kMergeChannels = 4;  // a sector of moments
constexpr int kMergeThreads = 512;
constexpr int kMaxMerged = 64;  // tiles that every block of `finish` merges for itself
constexpr int kThreads = 256;
constexpr int kBatch = 4;  // loads in flight for each thread, and as many of the residual

__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ ConvParams c, const __grid_constant__ ConvSchedule s,
                 const __grid_constant__ InstanceNormParams p) {
  __shared__ float2 sums[kMergeThreads / kWarp * kMergeChannels];
  const int n = blockIdx.y;
  const int first = blockIdx.x * kMergeChannels;
  const int channel = first + threadIdx.x % kMergeChannels;
  const float weight = norm_weight(p, n, channel);
  wait_for_predecessor();
  release_successor();
  merge_tiles<kMergeChannels, kMergeThreads>(c, s, p, n, first, weight, sums, merged(c, s, n) + first,
                                             [] { __syncthreads(); });
}

// kSmooth: the activations with transcendental functions. They are long code, which the others need not fetch.
template <typename T, int kWidth, bool kMerge, bool kSmooth>
__global__ void __launch_bounds__(kThreads, 2)
    finish_kernel(const __grid_constant__ ConvParams c, const __grid_constant__ ConvSchedule s,
                  const __grid_constant__ InstanceNormParams p, int range) {
  using V = Vec<T, kWidth>;
  constexpr int kSlice = 128 / static_cast<int>(sizeof(T));  // channels of a block
  constexpr int kLanes = kSlice / kWidth;
  constexpr int kRows = kThreads / kLanes;
  __shared__ float2 sums[kThreads];
  __shared__ float2 statistics[kSlice];  // mean, rstd * weight
  __shared__ float shifts[kSlice];

  const int n = blockIdx.z;
  const int channels = static_cast<int>(p.channels);
  const int vectors = channels / kWidth;
  const int first_channel = blockIdx.y * kSlice;
  const int vector = blockIdx.y * kLanes + threadIdx.x % kLanes;
  const int pixels = static_cast<int>(p.pixels);
  const int begin = blockIdx.x * range;
  const int end = vector < vectors ? min(begin + range, pixels) : 0;
  const int64_t first = static_cast<int64_t>(n) * pixels * vectors + vector;
  const V* input = static_cast<const V*>(c.output) + first;
  const V* residual = static_cast<const V*>(p.residual) + first;
  V* output = static_cast<V*>(p.output) + first;

  V x[kBatch];
  V r[kBatch];
  const auto load = [&](int from) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int pixel = from + u * kRows;
      if (pixel < end) x[u] = input[static_cast<int64_t>(pixel) * vectors];
    }
    if (p.residual == nullptr) return;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int pixel = from + u * kRows;
      if (pixel < end) r[u] = load_const<V>(residual, static_cast<int64_t>(pixel) * vectors);
    }
  };
  int pixel = begin + threadIdx.x / kLanes;
  const int own = threadIdx.x;
  const bool has_own = own < kSlice && first_channel + own < channels;
  if constexpr (kMerge) {
    wait_for_predecessor();
    release_successor();
    load(pixel);
    merge_tiles<kSlice, kThreads>(c, s, p, n, first_channel, norm_weight(p, n, first_channel + threadIdx.x % kSlice),
                                  sums, statistics, [] { __syncthreads(); });
  } else {
    load(pixel);
    wait_for_predecessor();
    release_successor();
    if (has_own) statistics[own] = __ldcg(merged(c, s, n) + first_channel + own);
  }
  if (has_own) shifts[own] = load_param(p.bias, p.param_dtype, n * p.param_batch_stride + first_channel + own, 0.0f);
  __syncthreads();
  const ChannelAffine<kWidth, sizeof(T) == 2> affine(statistics, shifts, threadIdx.x % kLanes * kWidth);
  while (pixel < end) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = pixel + u * kRows;
      if (at < end) output[static_cast<int64_t>(at) * vectors] = affine.template finish<kSmooth>(p, x[u], r[u]);
    }
    pixel += kBatch * kRows;
    if (pixel < end) load(pixel);
  }
}

template <typename T, int kWidth, bool kMerge>
cudaError_t launch_finish(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                          const DeviceFacts& facts, cudaStream_t stream) {
  constexpr int kSlice = 128 / static_cast<int>(sizeof(T));
  constexpr int64_t kRows = kThreads / (kSlice / kWidth);
  const int64_t slices = ceil_div(norm.channels, kSlice);
  // As many blocks as are resident, where each merges the moments half of them; each has a pixel for every thread.
  const int64_t wanted = std::max<int64_t>(1, (kMerge ? 1 : 2) * facts.multiprocessors / (slices * norm.batch));
  const int64_t range = std::max<int64_t>(1, ceil_div(ceil_div(norm.pixels, wanted), kRows)) * kRows;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(norm.pixels, range)), static_cast<unsigned>(slices),
                         static_cast<unsigned>(norm.batch));
  auto* kernel =
      is_piecewise(norm.activation) ? finish_kernel<T, kWidth, kMerge, false> : finish_kernel<T, kWidth, kMerge, true>;
  return launch(kernel, grid, dim3(kThreads), 0, 1, facts, stream, params, schedule, norm, static_cast<int>(range));
}

}  // namespace

cudaError_t launch_conv_finish(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                               cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool merge_first = schedule.entries > kMaxMerged;
  if (merge_first) {
    const auto grid =
        dim3(static_cast<unsigned>(ceil_div(params.out_channels, kMergeChannels)), static_cast<unsigned>(params.batch));
    if (const auto error =
            launch(merge_kernel, grid, dim3(kMergeThreads), 0, 1, facts, stream, params, schedule, norm)) {
      return error;
    }
  }
  if (!norm.output_channels_last) return launch_conv_finish_nchw(params, schedule, norm, merge_first, stream);
  return switch_dtype(norm.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const bool vectors = norm.channels % kFullWidth<T> == 0 && aligned16(params.output) && aligned16(norm.output) &&
                           aligned16(norm.residual);
      if (vectors) {
        return merge_first ? launch_finish<T, kFullWidth<T>, false>(params, schedule, norm, facts, stream)
                           : launch_finish<T, kFullWidth<T>, true>(params, schedule, norm, facts, stream);
      }
      return merge_first ? launch_finish<T, 2, false>(params, schedule, norm, facts, stream)
                         : launch_finish<T, 2, true>(params, schedule, norm, facts, stream);
    }
  });
}

}  // namespace styleforge::cuda
