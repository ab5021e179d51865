// (count, mean, M2 = sum of squares about the mean) of a set of values, and the one way in which this operator merges
// several of them (Chan, Golub, LeVeque 1983): the common mean first, then the squares about it. Nothing cancels.
#pragma once

#include "../../instance_norm_params.h"
#include "../common/reduce.cuh"
#include "../common/types.cuh"

namespace styleforge::cuda {

template <typename Acc>
struct Moments {
  Acc count = 0;
  Acc mean = 0;
  Acc m2 = 0;

  // Takes up another set; counts of 0 are no special case on either side.
  __device__ __forceinline__ void add(const Moments& other) {
    if (other.count == Acc(0)) return;
    if (count == Acc(0)) {
      *this = other;
      return;
    }
    const Acc total = count + other.count;
    const Acc share = other.count * reciprocal(total);
    const Acc delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * (count * share) * delta;
    count = total;
  }

  // Takes up the first `present` vectors of a short batch.
  template <int kVectors, typename V>
  __device__ __forceinline__ void add(const V (&batch)[kVectors], int present) {
    if (present == 0) return;
    Acc column[V::kWidth] = {};
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (u >= present) continue;
#pragma unroll
      for (int k = 0; k < V::kWidth; ++k) column[k] += to_acc(batch[u].data[k]);
    }
    Moments own;
    own.count = static_cast<Acc>(present * V::kWidth);
    Acc sum = 0;
#pragma unroll
    for (int k = 0; k < V::kWidth; ++k) sum += column[k];
    own.mean = sum * reciprocal(own.count);
#pragma unroll
    for (int k = 0; k < V::kWidth; ++k) column[k] = 0;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (u >= present) continue;
#pragma unroll
      for (int k = 0; k < V::kWidth; ++k) {
        const Acc d = to_acc(batch[u].data[k]) - own.mean;
        column[k] += d * d;
      }
    }
#pragma unroll
    for (int k = 0; k < V::kWidth; ++k) own.m2 += column[k];
    add(own);
  }

  __device__ __forceinline__ Acc rstd(double eps) const { return reciprocal_sqrt(m2 / count + static_cast<Acc>(eps)); }
};

// Merges the sets of all threads that take part: `each(visit)` calls visit(Moments) for every set of this thread,
// always in the same order; `sum(value)` adds over the threads in a fixed order and gives every one the result.
template <typename Acc, typename Each, typename Sum>
__device__ __forceinline__ Moments<Acc> merge_moments(Acc total, Each&& each, Sum&& sum) {
  Moments<Acc> merged;
  merged.count = total;
  Acc own = 0;
  each([&](const Moments<Acc>& part) { own += part.count * part.mean; });
  merged.mean = sum(own) / max(total, Acc(1));
  own = 0;
  each([&](const Moments<Acc>& part) {
    const Acc d = part.mean - merged.mean;
    own += part.m2 + part.count * d * d;
  });
  merged.m2 = sum(own);
  return merged;
}

// The sets of a warp's lanes, one each.
template <typename Acc>
__device__ __forceinline__ Moments<Acc> merge_lanes(Acc total, const Moments<Acc>& own) {
  return merge_moments(total, [&](auto visit) { visit(own); }, [](Acc v) { return warp_sum(v); });
}

// Of `count` vectors that threads of a group of kStride take in turn (thread t takes t, t + kStride, ...): how many
// warp `w` of the group has.
template <int kStride>
__device__ __forceinline__ int warp_vectors(int w, int count) {
  const int rows = count / kStride;
  return rows * kWarp + min(max(count - rows * kStride - w * kWarp, 0), kWarp);
}

// The sets of a block's kWarps warps, one each (`own`, the same in every lane); every thread gets the result. One
// barrier. kWarps is a power of two.
template <int kWarps, typename Acc>
__device__ __forceinline__ Moments<Acc> merge_warps_of_block(Acc total, const Moments<Acc>& own,
                                                             Acc (&scratch)[3][kWarps]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) {
    scratch[0][warp] = own.count;
    scratch[1][warp] = own.mean;
    scratch[2][warp] = own.m2;
  }
  __syncthreads();
  const int from = lane % kWarps;
  const Moments<Acc> part{scratch[0][from], scratch[1][from], scratch[2][from]};
  return merge_moments(
      total, [&](auto visit) { visit(part); },
      [](Acc v) {
#pragma unroll
        for (int offset = kWarps / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
        return v;
      });
}

template <typename Acc>
__device__ __forceinline__ void store_statistics(const InstanceNormParams& p, int64_t plane, Acc mean, Acc rstd) {
  if (p.mean == nullptr) return;
  reinterpret_cast<Acc*>(p.mean)[plane] = mean;
  reinterpret_cast<Acc*>(p.rstd)[plane] = rstd;
}

}  // namespace styleforge::cuda
