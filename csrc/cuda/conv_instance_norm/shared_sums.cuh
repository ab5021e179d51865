// Two blocks of a cluster that multiply halves of a tile's input channels: each sends the other the sums of half of the
// columns and keeps the other half, so that what follows a product is shared, too.
//
// Small pictures have fewer tiles than a GPU has multiprocessors, and what a tile of fewer columns saves of products it
// reads anew of inputs and weights. The stores count bytes at the receiver's barrier (st.async), so that nobody waits
// for the cluster. The sum of two is the same in either order.
#pragma once

#include "../common/cluster.cuh"
#include "../common/mbarrier.cuh"

namespace styleforge::cuda {

// That a block receives, from `threads` threads with columns / 2 sums each.
__host__ __device__ constexpr int shared_sums_bytes(int columns, int threads) { return columns * threads; }

#ifdef STYLEFORGE_HAS_BULK_COPY

// sums[i] as wgmma leaves them: the first half is of the first columns. Each of the kThreads threads meets its like;
// `area` is in the same place in both blocks, and `there` expects its bytes.
template <int kColumns, int kThreads>
__device__ __forceinline__ void share_sums(const float (&sums)[kColumns / 2], float (&kept)[kColumns / 4], int rank,
                                           unsigned char* area, uint64_t* there) {
  constexpr int kKept = kColumns / 4;
  const uint32_t own = shared_address(area) + threadIdx.x * 16;
  const uint32_t to = map_shared(own, rank ^ 1), barrier = map_shared(shared_address(there), rank ^ 1);
  const bool upper = rank != 0;
#pragma unroll
  for (int i = 0; i < kKept; i += 4) {
    float sent[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) sent[k] = upper ? sums[i + k] : sums[kKept + i + k];
    store_remote(to + i / 4 * kThreads * 16, make_float4(sent[0], sent[1], sent[2], sent[3]), barrier);
  }
  mbarrier_wait(there, 0);  // and after that nobody writes into this block's memory: it may leave
#pragma unroll
  for (int i = 0; i < kKept; i += 4) {
    const float4 other = *reinterpret_cast<const float4*>(area + (i / 4 * kThreads + threadIdx.x) * 16);
    kept[i] = (upper ? sums[kKept + i] : sums[i]) + other.x;
    kept[i + 1] = (upper ? sums[kKept + i + 1] : sums[i + 1]) + other.y;
    kept[i + 2] = (upper ? sums[kKept + i + 2] : sums[i + 2]) + other.z;
    kept[i + 3] = (upper ? sums[kKept + i + 3] : sums[i + 3]) + other.w;
  }
}

#endif  // STYLEFORGE_HAS_BULK_COPY

}  // namespace styleforge::cuda
