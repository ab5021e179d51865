// What the kernel of whole.cuh is made of: its tile in shared memory, loads, stores and lanes.
//
// Shared memory is rows of 128 bytes, boxes of 64 columns, with the 128-byte swizzle.
#pragma once

#include "../common/approximate.cuh"
#include "../common/cluster.cuh"
#include "../gemm/boxes.cuh"
#include "../gemm/pack.cuh"
#include "kernels.h"
#include "wgmma_transposed.cuh"

namespace styleforge::cuda {

constexpr int kWholeThreads = 256;

template <typename T_, int kEmbed_, int kHeadDim_, int kRows_, int kChunks_>
struct WholeTile {
  using T = T_;
  static constexpr int kEmbed = kEmbed_, kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;      // queries
  static constexpr int kChunks = kChunks_;  // of 128 tokens, 64 a warpgroup
  static constexpr int kHeads = kEmbed / kHeadDim;
  static constexpr int kBoxes = kEmbed / 64;
  static constexpr int kKeys = 128 * kChunks;
  static constexpr int kValues = kRows / 4;  // queries of a thread in a transposed result
  // The columns of a head fill a row of 64 or half of it; what else lies there is multiplied and left alone.
  static_assert((kHeadDim == 32 || kHeadDim == 64) && kEmbed % 128 == 0 && (kRows == 16 || kRows == 32));

  static constexpr int kTokenBox = 128 * kBoxRowBytes, kWeightBox = kHeadDim * kBoxRowBytes,
                       kRowBox = kRows * kBoxRowBytes;
  static constexpr int kChunk = kBoxes * kTokenBox;
  static constexpr int kWeight = kBoxes * kWeightBox;
  // Weights one after the other, or, for want of room, those of values and output in place of keys' and queries'.
  static constexpr bool kInPlace = 4 * kWeight > 64 * 1024;
  static constexpr int kTokensAt = 0;
  static constexpr int kQueryWeightAt = kChunks * kChunk;
  static constexpr int kKeyWeightAt = kQueryWeightAt + kWeight;
  static constexpr int kValueWeightAt = kInPlace ? kKeyWeightAt : kKeyWeightAt + kWeight;
  static constexpr int kOutWeightAt = kInPlace ? kQueryWeightAt : kValueWeightAt + kWeight;
  // First: queries, the tokens' weighted mean, the output. Second: the queries' tokens, queries times the keys'
  // weights, the softmax.
  static constexpr int kFirstAt = kQueryWeightAt + (kInPlace ? 2 : 4) * kWeight;
  static constexpr int kSecondAt = kFirstAt + kBoxes * kRowBox;
  static constexpr int kStatisticsAt = kSecondAt + (kEmbed > kKeys ? kEmbed : kKeys) / 64 * kRowBox;
  static constexpr int kBarriersAt = kStatisticsAt + (2 * 8 + 1) * kRows * static_cast<int>(sizeof(float));
  static constexpr int kBarriers = kChunks + 5;
  static constexpr int kBytes = kBarriersAt + kBarriers * 8;
  static constexpr int kAllHeadsAt = kTokensAt;  // results of all heads, once nobody reads the tokens
};

#ifdef STYLEFORGE_HAS_WGMMA

// Whole rows, 64 columns a box, one box after the other: the maps have the boxes as a dimension of their own.
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2}], [%4];" ::
          "r"(to),
      "l"(map), "r"(0), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, int row, int sample, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(0), "r"(row), "r"(sample), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// A warp's 16 rows of a transposed result, 2 kCount numbers a row, as 16 columns of 2 kCount rows of a box, from its
// 16-byte unit `unit` on.
template <typename T, int kCount>
__device__ __forceinline__ void store_columns(uint32_t box, int unit, const float (&d)[kCount]) {
  const int lane = threadIdx.x % 32;
  const uint32_t at = box + (lane / 16 * 8 + lane % 8) * kBoxRowBytes + (((unit + lane / 8 % 2) ^ (lane % 8)) << 4);
#pragma unroll
  for (int g = 0; g < kCount / 8; ++g) {
    const float* v = d + 8 * g;
    store_matrices_transposed(at + g * 16 * kBoxRowBytes, pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]),
                              pack<T>(v[6], v[7]));
  }
}

// A thread's numbers of kValues queries, one each, to the queries' totals over the warp's lanes of the same queries.
// The query that a lane ends up with is owned_value.
template <int kValues, typename Merge>
__device__ __forceinline__ float merge_lanes(float (&v)[kValues], const Merge& merge) {
  const int lane = threadIdx.x % 32;
  int mask = 16;
#pragma unroll
  for (int count = kValues / 2; count > 0; count /= 2) {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const bool upper = (lane & mask) != 0;
      const float kept = upper ? v[count + j] : v[j], sent = upper ? v[j] : v[count + j];
      v[j] = merge(kept, __shfl_xor_sync(0xffffffffu, sent, mask));
    }
    mask /= 2;
  }
  float r = v[0];
  if constexpr (kValues == 4) r = merge(r, __shfl_xor_sync(0xffffffffu, r, 4));
  return r;
}
template <int kValues>
__device__ __forceinline__ int owned_query() {
  const int lane = threadIdx.x % 32;
  const int value = kValues == 8 ? lane / 4 : lane / 8;
  return value / 2 * 8 + lane % 4 * 2 + value % 2;
}
// Of lanes with the same one, one.
template <int kValues>
__device__ __forceinline__ bool owns_query() {
  return kValues == 8 || threadIdx.x % 8 < 4;
}
// Back to all lanes.
template <int kValues>
__device__ __forceinline__ void share_lanes(float (&v)[kValues], float owned) {
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    v[j] = __shfl_sync(0xffffffffu, owned, j * (32 / kValues) + static_cast<int>(threadIdx.x) % 4);
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
