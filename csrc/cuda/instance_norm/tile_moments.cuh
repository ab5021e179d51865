// The moments of one tile of the stream path, by kStatsWarps warps: from shared memory where the tile's owner takes
// them, from global memory where a warp of another block helps. To the bit the same, as both cut and merge alike.
#pragma once

#include <cstdint>

#include "moments.cuh"
#include "parts.cuh"

namespace styleforge::cuda {

constexpr int kStatsWarps = 4;
// Vectors that a stats thread takes from shared memory at a time: as many as its registers hold converted.
template <typename V>
constexpr int kBatch = V::kWidth == 4 ? 8 : 4;

// Moments of a tile's vectors that stats warp `w` takes (warp_vectors); every lane gets the result.
template <typename V, typename Acc, typename Load>
__device__ __forceinline__ Moments<Acc> warp_moments(int w, int count, Load&& load) {
  constexpr int kStride = kStatsWarps * kWarp;
  Moments<Acc> own;
  int base = w * kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (; base + (kBatch<V> - 1) * kStride + kWarp <= count; base += kBatch<V> * kStride) {
    V v[kBatch<V>];
#pragma unroll
    for (int u = 0; u < kBatch<V>; ++u) v[u] = load(base + lane + u * kStride);
    own.add(v, kBatch<V>);
  }
  for (; base < count; base += kBatch<V> * kStride) {
    V v[kBatch<V>];
    const int present = min(max((count - base - lane + kStride - 1) / kStride, 0), kBatch<V>);
#pragma unroll
    for (int u = 0; u < kBatch<V>; ++u) {
      if (u < present) v[u] = load(base + lane + u * kStride);
    }
    own.add(v, present);
  }
  return merge_lanes(static_cast<Acc>(warp_vectors<kStatsWarps * kWarp>(w, count) * V::kWidth), own);
}

template <int kWidth, typename Acc>
__device__ __forceinline__ Moments<Acc> merge_warps(int count, const Moments<Acc> (&of)[kStatsWarps]) {
  return merge_moments(
      static_cast<Acc>(count) * kWidth,
      [&](auto visit) {
#pragma unroll
        for (int w = 0; w < kStatsWarps; ++w) visit(of[w]);
      },
      [](Acc v) { return v; });
}

// A warp takes and publishes what is missing of a plane's parts. Not inlined: it is hardly ever called, and its
// registers would count for all.
template <typename T>
__device__ __noinline__ void help(Part<acc_t<T>>* first, int count, const uint4* from, int vectors, int share) {
  using V = Vec<T, kFullWidth<T>>;
  using Acc = acc_t<T>;
  for (int j = 0; j < count; ++j, from += share, vectors -= share) {
    Moments<Acc> seen;
    if (__all_sync(0xffffffffu, look(first + j, seen))) continue;
    const int own = min(share, vectors);
    Moments<Acc> mine;  // lane w holds those of stats warp w: a loop that is not unrolled needs fewer registers
#pragma unroll 1
    for (int w = 0; w < kStatsWarps; ++w) {
      const auto taken = warp_moments<V, Acc>(w, own, [&](int i) {
        V v;
        *reinterpret_cast<uint4*>(&v) = __ldcg(from + i);
        return v;
      });
      if (static_cast<int>(threadIdx.x) % kWarp == w) mine = taken;
    }
    Moments<Acc> of[kStatsWarps];
#pragma unroll
    for (int w = 0; w < kStatsWarps; ++w) {
      of[w] = {__shfl_sync(0xffffffffu, mine.count, w), __shfl_sync(0xffffffffu, mine.mean, w),
               __shfl_sync(0xffffffffu, mine.m2, w)};
    }
    const auto taken = merge_warps<V::kWidth>(own, of);
    __threadfence();
    if (__any_sync(0xffffffffu, look(first + j, seen))) continue;
    if (threadIdx.x % kWarp == 0) publish(first + j, taken.mean, taken.m2);
    __syncwarp();
  }
}

}  // namespace styleforge::cuda
