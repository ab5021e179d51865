// The merge of full tiles' moments by a grid that is still computing them, in fewer steps than merge_tiles takes: every
// thread asks for all it needs at once, and then only for what was not there.
#pragma once

#include "../common/awaited_param.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {

// (mean, rstd * weight) of sums about `pilot`: of deviations, and of M2 and their squares.
__device__ __forceinline__ float2 finish_moments(float pilot, float sum, float squares, float share, float eps,
                                                 float weight) {
  const float shift = sum * share;
  const float m2 = relu_acc(squares - sum * shift);  // NaN stays: beside an infinite mean all of the plane is NaN
  return make_float2(pilot + shift, rsqrtf(fmaf(m2, share, eps)) * weight);
}

__device__ __forceinline__ float pixels_of_partial(const ConvSchedule& s) {
  return static_cast<float>(s.tile_height * ConvSchedule::kTileWidth * tiles_of_partial(s));
}

// `entries` of a sample; all tensors' entries times channels are few enough for an int, since their blocks are
// resident.

// By every block for its kColumns channels: a thread has two neighbouring ones of some of the entries. `sums` holds as
// many entries as the block's threads times kColumns / 32.
template <int kColumns, int kBlockThreads, typename Barrier>
__device__ __forceinline__ void merge_pairs(const ConvParams& c, const ConvSchedule& s, const InstanceNormParams& p,
                                            int entries, int n, int first_channel, const float* weights, float2* sums,
                                            float2* statistics, Barrier barrier) {
  constexpr int kPairs = kColumns / 2;
  constexpr int kGroups = kBlockThreads / kPairs;
  constexpr int kLists = kBlockThreads / (kPairs < kWarp ? kWarp : kPairs);
  constexpr int kApart = kGroups / kLists;  // of a warp
  constexpr int kBatch = 8;
  const int pair = static_cast<int>(threadIdx.x) % kPairs;
  const int group = static_cast<int>(threadIdx.x) / kPairs;
  const int channels = c.out_channels;
  const float2* own = c.moments + n * entries * channels + first_channel + 2 * pair;
  const float count = pixels_of_partial(s);
  const float share = __fdividef(1.0f, static_cast<float>(p.pixels));
  // About the first tile's mean: it is one of the population, so what cancels is bounded by the number of tiles.
  AwaitedTwo lead;
  float sum[2] = {}, m2[2] = {}, squares[2] = {};
#pragma unroll 1
  for (int base = group; base < entries; base += kBatch * kGroups) {
    AwaitedTwo part[kBatch];
#pragma unroll
    for (int u = 1; u < kBatch; ++u) {
      if (base + u * kGroups >= entries) part[u].pair[0].bits = part[u].pair[1].bits = 0;  // nothing to ask for
    }
    bool there;
    do {
      lead.look(own);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) part[u].look(own + (base + u * kGroups) * channels);
      there = lead.there();
#pragma unroll
      for (int u = 0; u < kBatch; ++u) there = there && part[u].there();
    } while (!there);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float d = base + u * kGroups < entries ? part[u].pair[k].first() - lead.pair[k].first() : 0.0f;
        sum[k] += d;
        m2[k] += part[u].pair[k].second();
        squares[k] += d * d;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    sum[k] *= count;
    m2[k] += squares[k] * count;
#pragma unroll
    for (int offset = kWarp / 2; offset >= kPairs; offset /= 2) {
      sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
      m2[k] += __shfl_xor_sync(0xffffffffu, m2[k], offset);
    }
  }
  auto* lists = reinterpret_cast<float4*>(sums);
  if (group % kApart == 0) lists[group / kApart * kPairs + pair] = make_float4(sum[0], m2[0], sum[1], m2[1]);
  barrier();
  if (group != 0) return;
#pragma unroll
  for (int list = 1; list < kLists; ++list) {
    const float4 other = lists[list * kPairs + pair];
    sum[0] += other.x;
    m2[0] += other.y;
    sum[1] += other.z;
    m2[1] += other.w;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    statistics[2 * pair + k] =
        finish_moments(lead.pair[k].first(), sum[k], m2[k], share, static_cast<float>(p.eps), weights[2 * pair + k]);
  }
}

// Of one channel, by one warp: (mean, rstd * weight).
__device__ __forceinline__ float2 merge_channel(const ConvParams& c, const ConvSchedule& s, const InstanceNormParams& p,
                                                int entries, int n, int channel) {
  constexpr int kBatch = 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int channels = c.out_channels;
  const AwaitedParam<float> weight(p.weight, p.param_dtype, n * p.param_batch_stride + channel);
  const float share = __fdividef(1.0f, static_cast<float>(p.pixels));
  const float2* own = c.moments + n * entries * channels + channel;
  float pilot = 0, sum = 0, m2 = 0, squares = 0;
#pragma unroll 1
  for (int base = 0; base < entries; base += kBatch * kWarp) {
    Awaited part[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (base + u * kWarp + lane >= entries) part[u].bits = 0;
    }
    bool there;
    do {
      there = true;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) part[u].look(own + (base + u * kWarp + lane) * channels);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) there = there && part[u].there();
    } while (!there);
    if (base == 0) pilot = __shfl_sync(0xffffffffu, part[0].first(), 0);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const float d = base + u * kWarp + lane < entries ? part[u].first() - pilot : 0.0f;
      sum += d;
      m2 += part[u].second();
      squares += d * d;
    }
  }
  const float count = pixels_of_partial(s);
  sum = warp_sum(sum * count);
  m2 = warp_sum(fmaf(squares, count, m2));
  return finish_moments(pilot, sum, m2, share, static_cast<float>(p.eps), weight.value(1.0f));
}

// Two neighbouring channels of what merge_channel found; `from` is aligned to 16 bytes.
__device__ __forceinline__ void await_merged(const float2* from, float2* to) {
  AwaitedTwo pairs;
  do {
    pairs.look(from);
  } while (!pairs.there());
#pragma unroll
  for (int i = 0; i < 2; ++i) to[i] = make_float2(pairs.pair[i].first(), pairs.pair[i].second());
}

}  // namespace styleforge::cuda
