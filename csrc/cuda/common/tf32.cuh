// float32 to TF32 (8 bits of exponent, 10 of mantissa) in the way tensor cores do not: to nearest.
#pragma once

#include <cmath>
#include <cstdint>

namespace styleforge::cuda {

// Ties away from zero, as cvt.rna.tf32.f32; integer arithmetic, because that instruction begins with sm_80. Inf, NaN
// and what would round to Inf stay as they are: the tensor cores' own cut is right for them.
__device__ __forceinline__ uint32_t round_bits_to_tf32(uint32_t bits) {
  constexpr uint32_t kHalf = 0x1000, kCut = 0x1fff, kLastFinite = 0x7f7fffff;
  return (bits & 0x7fffffff) <= kLastFinite - kHalf ? (bits + kHalf) & ~kCut : bits;
}

// The same in one instruction, from sm_80 on; what rounds to Inf does so.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint32_t round_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
#endif

// value = hi + lo but for 2^-24 of it, both TF32. lo is 0 beside what is not finite.
__device__ __forceinline__ void split_tf32(float value, float& hi, float& lo) {
  hi = __uint_as_float(round_bits_to_tf32(__float_as_uint(value)));
  lo = isfinite(value) ? __uint_as_float(round_bits_to_tf32(__float_as_uint(value - hi))) : 0.0f;
}

}  // namespace styleforge::cuda
