// Device code that the convolution's kernel and `finish` share: the merge of the tiles' moments, and the normalise step
// on vectors of neighbouring channels.
#pragma once

#include "../common/activation.cuh"
#include "../common/grid.cuh"
#include "../common/reduce.cuh"
#include "tiles.h"

namespace styleforge::cuda {

// The merged moments of kColumns neighbouring channels, by threads 0 .. kBlockThreads of a block: (mean, rstd * weight)
// in `statistics`; `weight` is the norm's of the thread's channel, first_channel + threadIdx.x % kColumns. `sums` holds
// kMergeSums entries; `barrier` is one of these threads. kWithin: of a grid that is still computing them; the tiles'
// moments are waited for. kPublished: so will others wait for the result.
template <int kColumns, int kBlockThreads>
constexpr int kMergeSums = kBlockThreads / (kColumns < kWarp ? kWarp : kColumns) * kColumns;

template <int kColumns, int kBlockThreads, bool kWithin = false, bool kPublished = false, typename Barrier>
__device__ __forceinline__ void merge_tiles(const ConvParams& c, const ConvSchedule& s, const InstanceNormParams& p,
                                            int n, int first_channel, float weight, float2* sums, float2* statistics,
                                            Barrier barrier) {
  constexpr int kGroups = kBlockThreads / kColumns;
  constexpr int kMergeBatch = kBlockThreads <= 128 ? 8 : 4;
  const int column = threadIdx.x % kColumns;
  const int group = threadIdx.x / kColumns;
  const int channels = c.out_channels;
  const int channel = first_channel + column;
  const bool uniform = s.tiles_y * s.tile_height == (c.phases == 1 ? c.out_height : c.height) &&
                       s.tiles_x * ConvSchedule::kTileWidth == (c.phases == 1 ? c.out_width : c.width) &&
                       s.entries % tiles_of_partial(s) == 0;
  const int entries = partials(s);
  // Sums about the first tile's mean: it is one of the population, so what cancels is bounded by the number of tiles.
  float2 sum = {0.0f, 0.0f};
  float pilot = 0;
  if (channel < channels) {
    const float2* own = c.moments + static_cast<int64_t>(n) * entries * channels + channel;
    const auto load = [](const float2* from) { return kWithin ? look(from) : __ldcg(from); };
    float squares = 0;
    // Loads of a batch are in flight together, also of one that is not full.
#pragma unroll 1
    for (int base = group; base < entries; base += kMergeBatch * kGroups) {
      float2 part[kMergeBatch];
      bool there;
      do {
        const float2 lead = load(own);
        pilot = lead.x;
        there = is_there(lead);
#pragma unroll
        for (int u = 0; u < kMergeBatch; ++u) {
          const int e = base + u * kGroups;
          part[u] = e < entries ? load(own + static_cast<int64_t>(e) * channels) : make_float2(0.0f, 0.0f);
        }
#pragma unroll
        for (int u = 0; u < kMergeBatch; ++u) {
          if (base + u * kGroups >= entries) part[u].x = pilot;
          there = there && is_there(part[u]);
        }
      } while (kWithin && !there);
      if (uniform) {
#pragma unroll
        for (int u = 0; u < kMergeBatch; ++u) {
          const float d = part[u].x - pilot;
          sum.x += d;
          sum.y += part[u].y;
          squares += d * d;
        }
      } else {
#pragma unroll
        for (int u = 0; u < kMergeBatch; ++u) {
          const int first = min(base + u * kGroups, entries - 1) * tiles_of_partial(s);
          const auto count = static_cast<float>(pixels_of(c, s, first, min(first + tiles_of_partial(s), s.entries)));
          const float d = part[u].x - pilot;
          sum.x += count * d;
          sum.y += part[u].y + count * d * d;
        }
      }
    }
    if (uniform) {
      const auto count = static_cast<float>(s.tile_height * ConvSchedule::kTileWidth * tiles_of_partial(s));
      sum.x *= count;
      sum.y += squares * count;
    }
  }
  // Within a warp, then over the warps: lanes of the same column are kColumns apart.
#pragma unroll
  for (int offset = kWarp / 2; offset >= kColumns; offset /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
  }
  constexpr int kSums = kMergeSums<kColumns, kBlockThreads> / kColumns;
  constexpr int kApart = kGroups / kSums;
  if (group % kApart == 0) sums[group / kApart * kColumns + column] = sum;
  barrier();
  if (group != 0 || channel >= channels) return;
#pragma unroll
  for (int g = 1; g < kSums; ++g) {
    sum.x += sums[g * kColumns + column].x;
    sum.y += sums[g * kColumns + column].y;
  }
  const float pixels = static_cast<float>(p.pixels);
  const float shift = sum.x / pixels;
  const float m2 = relu_acc(sum.y - sum.x * shift);  // NaN stays: beside an infinite mean all of the plane is NaN
  const float rstd = reciprocal_sqrt(m2 / pixels + static_cast<float>(p.eps));
  const float2 result = make_float2(pilot + shift, rstd * weight);
  if constexpr (kPublished) {
    publish(statistics + column, result);
  } else {
    statistics[column] = result;
  }
}

__device__ __forceinline__ float norm_weight(const InstanceNormParams& p, int n, int channel) {
  return channel < p.channels ? load_param(p.weight, p.param_dtype, n * p.param_batch_stride + channel, 1.0f) : 0.0f;
}

// The normalise step of kWidth neighbouring channels, in registers; from `column` on of the statistics. kFolded: mean
// and shift are one number and the step one instruction. What that loses is of the size of float32's rounding of the
// mean, which inputs of 16 bits have lost before.
template <int kWidth, bool kFolded>
struct ChannelAffine {
  float mean[kFolded ? 1 : kWidth], scale[kWidth], shift[kWidth];

  __device__ __forceinline__ ChannelAffine(const float2* statistics, const float* shifts, int column) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float2 channel = statistics[column + k];
      scale[k] = channel.y;
      if constexpr (kFolded) {
        shift[k] = fmaf(-channel.x, channel.y, shifts[column + k]);
      } else {
        mean[k] = channel.x;
        shift[k] = shifts[column + k];
      }
    }
  }
  // Of one channel, for kWidth of its pixels.
  __device__ __forceinline__ ChannelAffine(const float2& channel, float bias) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      scale[k] = channel.y;
      shift[k] = kFolded ? fmaf(-channel.x, channel.y, bias) : bias;
      if constexpr (!kFolded) mean[k] = channel.x;
    }
  }

  __device__ __forceinline__ float apply(int k, float v) const {
    return kFolded ? fmaf(v, scale[k], shift[k]) : (v - mean[kFolded ? 0 : k]) * scale[k] + shift[k];
  }

  // kSmooth: the activations with transcendental functions. They are long code, which the others need not fetch.
  template <bool kSmooth, typename T>
  __device__ __forceinline__ Vec<T, kWidth> finish(const InstanceNormParams& p, const Vec<T, kWidth>& x,
                                                   const Vec<T, kWidth>& residual) const {
    float y[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = apply(k, to_acc(x.data[k]));
    if (p.residual != nullptr) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y[k] += to_acc(residual.data[k]);
    }
    if constexpr (kSmooth) {
      activate(y, p.activation, p.negative_slope);
    } else {
      activate_piecewise(y, p.activation, static_cast<float>(p.negative_slope));
    }
    return rounded<T>(y);
  }
};

}  // namespace styleforge::cuda
