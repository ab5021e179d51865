// Warp-wide matrix products (sm_80+) on pieces of 16 x 32 bytes and 8 x 32 bytes, alike for all types: 16 numbers of
// two bytes or 8 TF32 numbers. ldmatrix moves TF32 numbers as pairs of 16-bit ones, which is where mma wants them.
#pragma once

#include <cstdint>

#include "../common/mma.cuh"
#include "../common/tf32.cuh"
#include "../common/types.cuh"

namespace styleforge::cuda {

// Arithmetic of a product: float32 by three products of TF32 numbers, or by one; 16-bit numbers.
struct Ieee {
  using T = float;
  static constexpr bool kRound = true, kSplit = true;
};
struct TF32 {
  using T = float;
  static constexpr bool kRound = true, kSplit = false;
};
struct Half {
  using T = __half;
  static constexpr bool kRound = false, kSplit = false;
};
struct BFloat16 {
  using T = __nv_bfloat16;
  static constexpr bool kRound = false, kSplit = false;
};

// Registers of an operand; `lo` is what rounding to TF32 left out.
template <typename Math, int kCount>
struct Piece {
  uint32_t hi[kCount] = {};
  uint32_t lo[Math::kSplit ? kCount : 1] = {};
};

#ifdef STYLEFORGE_HAS_MMA

// To nearest. Ties go to even where that is one instruction; away from zero, which ptxas makes four of, elsewhere.
__device__ __forceinline__ uint32_t round_piece(float v) {
#if __CUDA_ARCH__ >= 900
  uint32_t r;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
#else
  return round_tf32(v);
#endif
}
template <typename Math, int kCount>
__device__ __forceinline__ void round_piece(Piece<Math, kCount>& piece) {
  if constexpr (Math::kRound) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float v = __uint_as_float(piece.hi[i]);
      piece.hi[i] = round_piece(v);
      if constexpr (Math::kSplit) piece.lo[i] = round_piece(v - __uint_as_float(piece.hi[i]));
    }
  }
}

// total += a b, b in registers `at` and `at` + 1 of its piece. Three products of eight numbers are added up by the
// tensor core, the small ones first, and move on to `total` by a rounding addition: the core's own cuts off.
template <typename Math, int kCount>
__device__ __forceinline__ void multiply(float (&total)[4], const Piece<Math, 4>& a, const Piece<Math, kCount>& b,
                                         int at) {
  if constexpr (Math::kSplit) {
    float d[4] = {};
    multiply<float>(d, a.lo, b.hi[at], b.hi[at + 1], d);
    multiply<float>(d, a.hi, b.lo[at], b.lo[at + 1], d);
    multiply<float>(d, a.hi, b.hi[at], b.hi[at + 1], d);
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += d[i];
  } else {
    multiply<typename Math::T>(total, a.hi, b.hi[at], b.hi[at + 1], total);
  }
}

// 16 bytes from global to shared memory, behind the back of the threads; the first `bytes` of them, zeros after.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
