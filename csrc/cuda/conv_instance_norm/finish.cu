// The two passes behind the convolution, channels_last. `merge` brings the moments of a sample's tiles together, once;
// `finish` normalises, adds the residual and activates, 128 bytes of channels by a range of pixels a block. It loads
// its pixels before it waits for `merge`, which starts it only after the convolution is complete.
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
constexpr int kThreads = 256;
constexpr int kBatch = 4;  // loads in flight for each thread, and as many of the residual

__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ ConvParams c, const __grid_constant__ ConvSchedule s,
                 const __grid_constant__ InstanceNormParams p) {
  constexpr int kGroups = kMergeThreads / kMergeChannels;
  __shared__ float2 sums[kGroups][kMergeChannels];
  const int n = blockIdx.y;
  const int column = threadIdx.x % kMergeChannels;
  const int group = threadIdx.x / kMergeChannels;
  const int channels = c.out_channels;
  const int channel = blockIdx.x * kMergeChannels + column;
  const bool uniform = s.tiles_y * s.tile_height == (c.phases == 1 ? c.out_height : c.height) &&
                       s.tiles_x * ConvSchedule::kTileWidth == (c.phases == 1 ? c.out_width : c.width);
  wait_for_predecessor();
  release_successor();
  // Sums about the first tile's mean: it is one of the population, so what cancels is bounded by the number of tiles.
  float2 sum = {0.0f, 0.0f};
  float pilot = 0;
  if (channel < channels) {
    const float2* own = c.moments + static_cast<int64_t>(n) * s.entries * channels + channel;
    pilot = own->x;
#pragma unroll 8
    for (int e = group; e < s.entries; e += kGroups) {
      const float2 part = own[static_cast<int64_t>(e) * channels];
      float count = static_cast<float>(s.tile_height * ConvSchedule::kTileWidth);
      if (!uniform) {
        const ConvTileAt at = conv_tile(c, s, e);
        count = static_cast<float>(at.rows * at.columns);
      }
      const float d = part.x - pilot;
      sum.x += count * d;
      sum.y += part.y + count * d * d;
    }
  }
  sums[group][column] = sum;
  __syncthreads();
  if (group != 0 || channel >= channels) return;
#pragma unroll
  for (int g = 1; g < kGroups; ++g) {
    sum.x += sums[g][column].x;
    sum.y += sums[g][column].y;
  }
  const float pixels = static_cast<float>(p.pixels);
  const float shift = sum.x / pixels;
  const float m2 = fmaxf(sum.y - sum.x * shift, 0.0f);  // fmaxf drops NaN; the mean keeps it
  const float rstd = reciprocal_sqrt(m2 / pixels + static_cast<float>(p.eps));
  const float scale = rstd * load_param(p.weight, p.param_dtype, n * p.param_batch_stride + channel, 1.0f);
  float2* statistics = c.moments + static_cast<int64_t>(c.batch) * s.entries * channels;
  statistics[static_cast<int64_t>(n) * channels + channel] = make_float2(pilot + shift, scale);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    finish_kernel(const float2* __restrict__ statistics, const __grid_constant__ InstanceNormParams p, int range) {
  using V = Vec<T, kWidth>;
  constexpr int kSlice = 128 / static_cast<int>(sizeof(T));  // channels of a block
  constexpr int kLanes = kSlice / kWidth;
  constexpr int kRows = kThreads / kLanes;

  const int64_t n = blockIdx.z;
  const int vectors = static_cast<int>(p.channels) / kWidth;
  const int vector = blockIdx.y * kLanes + threadIdx.x % kLanes;
  if (vector >= vectors) return;
  const int pixels = static_cast<int>(p.pixels);
  const int begin = blockIdx.x * range;
  const int end = min(begin + range, pixels);
  const int64_t sample = n * pixels;

  V x[kBatch];
  V r[kBatch];
  const auto load = [&](int from) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int pixel = from + u * kRows;
      if (pixel < end) x[u] = reinterpret_cast<const V*>(p.input)[(sample + pixel) * vectors + vector];
    }
    if (p.residual == nullptr) return;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int pixel = from + u * kRows;
      if (pixel < end) r[u] = load_const<V>(p.residual, (sample + pixel) * vectors + vector);
    }
  };
  int pixel = begin + threadIdx.x / kLanes;
  load(pixel);
  float bias[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    bias[k] = load_param(p.bias, p.param_dtype, n * p.param_batch_stride + vector * kWidth + k, 0.0f);
  }
  wait_for_predecessor();
  release_successor();
  float mean[kWidth], scale[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const float2 own = __ldcg(&statistics[n * p.channels + vector * kWidth + k]);
    mean[k] = own.x;
    scale[k] = own.y;
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
      activate(y, p.activation, p.negative_slope);
      V out;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.data[k] = from_acc<T>(y[k]);
      store(p.output, (sample + at) * vectors + vector, out);
    }
    pixel += kBatch * kRows;
    if (pixel < end) load(pixel);
  }
}

template <typename T, int kWidth>
cudaError_t launch_width(const float2* statistics, const InstanceNormParams& norm, const DeviceFacts& facts,
                         cudaStream_t stream) {
  constexpr int kSlice = 128 / static_cast<int>(sizeof(T));
  constexpr int64_t kRows = kThreads / (kSlice / kWidth);
  const int64_t slices = ceil_div(norm.channels, kSlice);
  // As many blocks as are resident, each with at least a pixel for every thread.
  const int64_t wanted = std::max<int64_t>(1, 4 * facts.multiprocessors / (slices * norm.batch));
  const int64_t range = std::max<int64_t>(1, ceil_div(ceil_div(norm.pixels, wanted), kRows)) * kRows;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(norm.pixels, range)), static_cast<unsigned>(slices),
                         static_cast<unsigned>(norm.batch));
  return launch(finish_kernel<T, kWidth>, grid, dim3(kThreads), 0, 1, facts, stream, statistics, norm,
                static_cast<int>(range));
}

}  // namespace

cudaError_t launch_conv_finish(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                               cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid =
      dim3(static_cast<unsigned>(ceil_div(params.out_channels, kMergeChannels)), static_cast<unsigned>(params.batch));
  if (const auto error = launch(merge_kernel, grid, dim3(kMergeThreads), 0, 1, facts, stream, params, schedule, norm)) {
    return error;
  }
  const float2* statistics = params.moments + int64_t{params.batch} * schedule.entries * params.out_channels;
  return switch_dtype(norm.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const bool vectors = norm.channels % kFullWidth<T> == 0 && aligned16(norm.input) && aligned16(norm.output) &&
                           aligned16(norm.residual);
      return vectors ? launch_width<T, kFullWidth<T>>(statistics, norm, facts, stream)
                     : launch_width<T, 2>(statistics, norm, facts, stream);
    }
  });
}

}  // namespace styleforge::cuda
