// Sums over a block in a fixed order, so that results repeat bit by bit, and the merge of (mean, M2) pairs.
#pragma once

namespace styleforge::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Every thread gets the sum. `scratch` holds kMaxWarps values; a caller that uses it twice gives two scratch arrays or
// has a barrier between (the trailing one here lets the same array be used again).
template <typename Acc>
__device__ __forceinline__ Acc block_sum(Acc v, Acc* scratch) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < warps ? scratch[lane] : Acc(0);
  v = warp_sum(v);
  __syncthreads();
  return v;
}

// Correctly rounded and without the subroutine that a float division calls.
__device__ __forceinline__ float reciprocal(float v) { return __frcp_rn(v); }
__device__ __forceinline__ double reciprocal(double v) { return 1.0 / v; }

__device__ __forceinline__ float reciprocal_sqrt(float v) { return 1.0f / sqrtf(v); }
__device__ __forceinline__ double reciprocal_sqrt(double v) { return 1.0 / sqrt(v); }

}  // namespace styleforge::cuda
