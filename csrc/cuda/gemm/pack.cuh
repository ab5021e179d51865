// Pairs of 16-bit numbers in a register, and which wgmma multiplies them.
#pragma once

#include "../common/types.cuh"
#include "../common/wgmma.cuh"

namespace styleforge::cuda {

template <typename T>
constexpr MmaKind kMmaKind = std::is_same_v<T, float>    ? MmaKind::kTF32
                             : std::is_same_v<T, __half> ? MmaKind::kF16
                                                         : MmaKind::kBF16;

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const float pair[2] = {first, second};
  const auto v = rounded<T>(pair);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

}  // namespace styleforge::cuda
