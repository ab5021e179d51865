// What follows the convolution, channels_last: the tiles' moments are merged, then `finish` normalises, adds the
// residual and activates, 128 bytes of channels by a range of pixels a block.
//
// Few tiles: every block of `finish` merges them for its channels. Many: `merge` does it once, and `finish` loads its
// first pixels before it waits for that (`merge` starts it only after the convolution is complete). Statistics go
// through shared memory, one load a block: when every thread reads the same few lines from the L2 cache, those lines'
// slices are the bottleneck (15 us on 1x128x128x128).
#include <algorithm>

#include "../common/activation.cuh"
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "kernels.h"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kMergeChannels = 16;  // 128 bytes of moments
constexpr int kMergeThreads = 512;
constexpr int kMaxMerged = 64;  // tiles that every block of `finish` merges for itself
constexpr int kThreads = 256;
constexpr int kBatch = 4;  // loads in flight for each thread, and as many of the residual

// The merged moments of kColumns neighbouring channels, by all kBlockThreads threads: (mean, rstd * weight) in
// `statistics`. `sums` holds kBlockThreads entries.
template <int kColumns, int kBlockThreads>
__device__ __forceinline__ void merge_tiles(const ConvParams& c, const ConvSchedule& s, const InstanceNormParams& p,
                                            int n, int first_channel, float2* sums, float2* statistics) {
  constexpr int kGroups = kBlockThreads / kColumns;
  const int column = threadIdx.x % kColumns;
  const int group = threadIdx.x / kColumns;
  const int channels = c.out_channels;
  const int channel = first_channel + column;
  const bool uniform = s.tiles_y * s.tile_height == (c.phases == 1 ? c.out_height : c.height) &&
                       s.tiles_x * ConvSchedule::kTileWidth == (c.phases == 1 ? c.out_width : c.width);
  // Sums about the first tile's mean: it is one of the population, so what cancels is bounded by the number of tiles.
  float2 sum = {0.0f, 0.0f};
  float pilot = 0;
  if (channel < channels) {
    const float2* own = c.moments + static_cast<int64_t>(n) * s.entries * channels + channel;
    pilot = own->x;
    if (uniform) {
      float squares = 0;
#pragma unroll 8
      for (int e = group; e < s.entries; e += kGroups) {
        const float2 part = own[static_cast<int64_t>(e) * channels];
        const float d = part.x - pilot;
        sum.x += d;
        sum.y += part.y;
        squares += d * d;
      }
      constexpr int kTileWidth = ConvSchedule::kTileWidth;
      sum.x *= static_cast<float>(s.tile_height * kTileWidth);
      sum.y += squares * static_cast<float>(s.tile_height * kTileWidth);
    } else {
#pragma unroll 1
      for (int e = group; e < s.entries; e += kGroups) {
        const float2 part = own[static_cast<int64_t>(e) * channels];
        const ConvTileAt at = conv_tile(c, s, e);
        const float count = static_cast<float>(at.rows * at.columns);
        const float d = part.x - pilot;
        sum.x += count * d;
        sum.y += part.y + count * d * d;
      }
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || channel >= channels) return;
#pragma unroll
  for (int g = 1; g < kGroups; ++g) {
    sum.x += sums[g * kColumns + column].x;
    sum.y += sums[g * kColumns + column].y;
  }
  const float pixels = static_cast<float>(p.pixels);
  const float shift = sum.x / pixels;
  const float m2 = fmaxf(sum.y - sum.x * shift, 0.0f);  // fmaxf drops NaN; the mean keeps it
  const float rstd = reciprocal_sqrt(m2 / pixels + static_cast<float>(p.eps));
  const float scale = rstd * load_param(p.weight, p.param_dtype, n * p.param_batch_stride + channel, 1.0f);
  statistics[column] = make_float2(pilot + shift, scale);
}

__device__ __forceinline__ float2* merged(const ConvParams& c, const ConvSchedule& s, int n) {
  return c.moments + (static_cast<int64_t>(c.batch) * s.entries + n) * c.out_channels;
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ ConvParams c, const __grid_constant__ ConvSchedule s,
                 const __grid_constant__ InstanceNormParams p) {
  __shared__ float2 sums[kMergeThreads];
  const int n = blockIdx.y;
  const int first = blockIdx.x * kMergeChannels;
  wait_for_predecessor();
  release_successor();
  merge_tiles<kMergeChannels, kMergeThreads>(c, s, p, n, first, sums, merged(c, s, n) + first);
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
  const V* input = static_cast<const V*>(p.input) + first;
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
    merge_tiles<kSlice, kThreads>(c, s, p, n, first_channel, sums, statistics);
  } else {
    load(pixel);
    wait_for_predecessor();
    release_successor();
    if (has_own) statistics[own] = __ldcg(merged(c, s, n) + first_channel + own);
  }
  if (has_own) shifts[own] = load_param(p.bias, p.param_dtype, n * p.param_batch_stride + first_channel + own, 0.0f);
  __syncthreads();
  float mean[kWidth], scale[kWidth], bias[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int column = threadIdx.x % kLanes * kWidth + k;
    mean[k] = statistics[column].x;
    scale[k] = statistics[column].y;
    bias[k] = shifts[column];
  }
  while (pixel < end) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = pixel + u * kRows;
      if (at >= end) continue;
      float y[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        y[k] = (to_acc(x[u].data[k]) - mean[k]) * scale[k] + bias[k];
        if (p.residual != nullptr) y[k] += to_acc(r[u].data[k]);
      }
      if constexpr (kSmooth) {
        activate(y, p.activation, p.negative_slope);
      } else {
        activate_piecewise(y, p.activation, static_cast<float>(p.negative_slope));
      }
      V out;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.data[k] = from_acc<T>(y[k]);
      output[static_cast<int64_t>(at) * vectors] = out;
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
  return switch_dtype(norm.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const bool vectors = norm.channels % kFullWidth<T> == 0 && aligned16(norm.input) && aligned16(norm.output) &&
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
