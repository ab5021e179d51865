// The special-function unit's one-instruction approximations, to about 2^-22 of the value.
#pragma once

namespace styleforge::cuda {

__device__ __forceinline__ float exp2_approximate(float v) {
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// One instruction less: 0 where the result is smaller than normal numbers.
__device__ __forceinline__ float exp2_flushed(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

__device__ __forceinline__ float reciprocal_approximate(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

}  // namespace styleforge::cuda
