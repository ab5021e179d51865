// channels_last: sums over the rows of a block (thread t: lane = t % lanes, row = t / lanes), each thread with kWidth
// channels of its lane. lanes is a power of two up to kMaxLanes.
#pragma once

#include "../common/reduce.cuh"
#include "../common/types.cuh"

namespace styleforge::cuda {

// Channels of one thread.
template <typename T>
constexpr int kChannelWidth = sizeof(T) == 8 ? 2 : 4;

constexpr int kMaxLanes = 16;
constexpr int kMaxTileWarps = 16;  // the blocks have up to 512 threads

template <int kWidth>
constexpr int kSumScratch = kMaxTileWarps * kMaxLanes * kWidth;

// Every thread gets the sums of its lane's channels, added in a fixed order: within warps, then warp by warp. One
// barrier; a caller that sums twice gives two scratch arrays.
template <int kWidth, typename Acc>
__device__ __forceinline__ void sum_over_rows(Acc (&v)[kWidth], int lanes, Acc* scratch) {
  const int warp = threadIdx.x / kWarp;
  const int in_warp = threadIdx.x % kWarp;
  const int lane = threadIdx.x % lanes;
  const int warps = blockDim.x / kWarp;
  using Row = Vec<Acc, kWidth>;
  Row* rows = reinterpret_cast<Row*>(scratch);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
  }
  if (in_warp < lanes) {
    Row own;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) own.data[k] = v[k];
    rows[warp * lanes + lane] = own;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kWidth; ++k) v[k] = 0;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    const Row other = rows[w * lanes + lane];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) v[k] += other.data[k];
  }
}

// Moments of kWidth channels at once over a stream of pixels: short batches about their own mean, merged into a running
// (mean, M2). One division a batch, no cancellation, no second look at the data.
template <int kWidth, typename Acc>
struct ChannelMoments {
  Acc count = 0;
  Acc mean[kWidth] = {};
  Acc m2[kWidth] = {};

  template <int kBatch, typename V>
  __device__ __forceinline__ void add(const V (&batch)[kBatch]) {
    const Acc total = count + Acc(kBatch);
    const Acc share = Acc(kBatch) * reciprocal(total);
    const Acc weight = count * share;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      Acc s = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) s += to_acc(batch[u].data[k]);
      const Acc m = s * (Acc(1) / Acc(kBatch));
      Acc q = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const Acc d = to_acc(batch[u].data[k]) - m;
        q += d * d;
      }
      const Acc delta = m - mean[k];
      mean[k] += delta * share;
      m2[k] += q + delta * weight * delta;  // in this order: delta's square may overflow where the weight is 0
    }
    count = total;
  }

  // The first `present` (at least one) of a short batch.
  template <int kBatch, typename V>
  __device__ __forceinline__ void add(const V (&batch)[kBatch], int present) {
    const Acc taken = static_cast<Acc>(present);
    const Acc total = count + taken;
    const Acc share = taken * reciprocal(total);
    const Acc weight = count * share;
    const Acc inverse = reciprocal(taken);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      Acc s = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) s += u < present ? to_acc(batch[u].data[k]) : Acc(0);
      const Acc m = s * inverse;
      Acc q = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const Acc d = u < present ? to_acc(batch[u].data[k]) - m : Acc(0);
        q += d * d;
      }
      const Acc delta = m - mean[k];
      mean[k] += delta * share;
      m2[k] += q + delta * weight * delta;
    }
    count = total;
  }
};

}  // namespace styleforge::cuda
