// float32 to TF32 (8 bits of exponent, 10 of mantissa) in the way tensor cores do not: to nearest.
#pragma once

#include <cstdint>

namespace styleforge::cuda {

// Ties away from zero, as cvt.rna.tf32.f32; integer arithmetic, because that instruction begins with sm_80. Inf, NaN
// and what would round to Inf stay as they are: the tensor cores' own cut is right for them.
__device__ __forceinline__ uint32_t round_bits_to_tf32(uint32_t bits) {
  constexpr uint32_t kHalf = 0x1000, kCut = 0x1fff, kLastFinite = 0x7f7fffff;
  return (bits & 0x7fffffff) <= kLastFinite - kHalf ? (bits + kHalf) & ~kCut : bits;
}

}  // namespace styleforge::cuda
