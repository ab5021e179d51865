// How a tile's input and weights come to shared memory: by the copy engine in boxes (sm_90), or by cp.async where the
// padding is index arithmetic.
#pragma once

#include "../common/mbarrier.cuh"
#include "../common/tensor_map.h"
#include "launch.h"

namespace styleforge::cuda {

// The source coordinate of a reflected or replicated one; beyond the padding (tiles stand over) it stays inside.
__device__ __forceinline__ int padded_source(int position, int size, PaddingMode mode) {
  if (mode == PaddingMode::kReflect) position = position < 0 ? -position : min(position, 2 * (size - 1) - position);
  return min(max(position, 0), size - 1);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest of the 16 is zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
#endif

#ifdef STYLEFORGE_HAS_BULK_COPY

// Arrives once this thread's copies so far are there.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int channel, int x, int y, int n,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(channel), "r"(x), "r"(y), "r"(n), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void load_weights(uint32_t to, const CUtensorMap* map, int channel, int tap, int row,
                                             uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(map), "r"(channel), "r"(tap), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

#endif  // STYLEFORGE_HAS_BULK_COPY

}  // namespace styleforge::cuda
