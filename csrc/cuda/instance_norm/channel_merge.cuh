// The stream path in channels_last: what the stats threads of a block have of a unit becomes one part for each channel.
#pragma once

#include "channel_sums.cuh"
#include "channel_walk.cuh"
#include "parts.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr int kSumGroups = 16;  // at most, in the merge over a block's threads
constexpr int kStatsBarrier = 1;

// Shared memory of the merge.
template <int kWidth>
struct ThreadMoments {
  // [row of threads][channel of a vector][lane], an odd number of lanes.
  float mean[kChannelStreamThreads * kWidth * 3 / 2], m2[kChannelStreamThreads * kWidth * 3 / 2];
  float count[kChannelStreamThreads];  // of a row
  float sums[2][kChannelStreamThreads];
};

// Pixels that slot `slot` has of a unit.
__device__ __forceinline__ float pixels_of(const ChannelCut& cut, int slot) {
  const int blocks = static_cast<int>(gridDim.x);
  const int base = cut.tiles / blocks;
  const int own = base + (slot < cut.tiles - base * blocks ? 1 : 0);
  const bool short_one = slot + (own - 1) * blocks == cut.tiles - 1;
  const int rows = own * cut.share - (short_one ? cut.tiles * cut.share - cut.rows : 0);
  return static_cast<float>(rows << cut.copies_log2);
}

// After a unit's last tile, by all stats threads: their moments of a channel in the order of their rows, in groups,
// then the groups in their order. `present`: channels of the unit. Publishes the block's parts of them.
template <int kWidth>
__device__ __forceinline__ void merge_threads(const ChannelCut& cut, const Walk& at, int t, int present,
                                              const ChannelMoments<kWidth, float>& own, ThreadMoments<kWidth>& of,
                                              Part<float>* parts) {
  constexpr int kThreads = kChannelStreamThreads;
  const int rows = kThreads / cut.lanes;
  const int row = t / cut.lanes;
  const int lane = t - row * cut.lanes;
  const int groups = min(kThreads / cut.channels, kSumGroups);
  const int group = t / cut.channels;
  const int channel = t - group * cut.channels;
  const int pitch = cut.lanes | 1;
  const int copies = 1 << cut.copies_log2;
  const int distance = cut.copies_log2 == 0 ? 0 : cut.channels;
  if (row < rows && lane < at.lanes()) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      of.mean[(row * kWidth + k) * pitch + lane] = own.mean[k];
      of.m2[(row * kWidth + k) * pitch + lane] = own.m2[k];
    }
    if (lane == 0) of.count[row] = own.count;
  }
  named_barrier(kStatsBarrier, kThreads);
  const bool sums = group < groups && channel < present;
  // The sum of a value over a channel's rows and copies; every thread of a channel gets it.
  const auto total = [&](float* scratch, auto&& value) {
    float sum = 0;
    if (sums) {
#pragma unroll 4
      for (int e = group; e < rows * copies; e += groups) {
        const int of_row = e >> cut.copies_log2;
        const int column = channel + (e & (copies - 1)) * distance;
        sum += value(of_row, (of_row * kWidth + column % kWidth) * pitch + column / kWidth);
      }
    }
    if (group < groups) scratch[t] = sum;
    named_barrier(kStatsBarrier, kThreads);
    sum = 0;
    if (sums) {
#pragma unroll 4
      for (int g = 0; g < groups; ++g) sum += scratch[g * cut.channels + channel];
    }
    return sum;
  };
  const float mean =
      total(of.sums[0], [&](int r, int i) { return of.count[r] * of.mean[i]; }) / pixels_of(cut, at.slot);
  const float m2 = total(of.sums[1], [&](int r, int i) {
    const float d = of.mean[i] - mean;
    return of.m2[i] + of.count[r] * d * d;
  });
  if (sums && group == 0) {
    const int64_t first = static_cast<int64_t>(at.unit) * cut.channels + channel;
    publish(&parts[first * cut.slots + at.slot], mean, m2);
  }
}

#endif  // STYLEFORGE_HAS_BULK_COPY

}  // namespace styleforge::cuda
