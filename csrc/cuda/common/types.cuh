// Element types: conversion to the accumulation type and 16-byte (or single-element) vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../activation.h"

namespace styleforge::cuda {

// What sums, statistics and activations are computed in.
template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccumulateIn<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_acc(acc_t<T> v);
template <>
__device__ __forceinline__ float from_acc<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_acc<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// kSize elements that move as one load or store.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  static constexpr int kWidth = kSize;
  T data[kSize];
};

// All elements of a vector rounded to T; those of two bytes in pairs, which is one instruction.
template <typename T, int kSize>
__device__ __forceinline__ Vec<T, kSize> rounded(const acc_t<T> (&v)[kSize]) {
  Vec<T, kSize> out;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int k = 0; k < kSize; k += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        *reinterpret_cast<__half2*>(&out.data[k]) = __floats2half2_rn(v[k], v[k + 1]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(&out.data[k]) = __floats2bfloat162_rn(v[k], v[k + 1]);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) out.data[k] = from_acc<T>(v[k]);
  }
  return out;
}

template <typename T>
constexpr int kFullWidth = 16 / sizeof(T);

// Through the read-only path: for tensors that nothing writes while the kernel runs.
template <typename V>
__device__ __forceinline__ V load_const(const void* base, int64_t index) {
  V value;
  const V* address = reinterpret_cast<const V*>(base) + index;
  if constexpr (sizeof(V) == 16) {
    *reinterpret_cast<uint4*>(&value) = __ldg(reinterpret_cast<const uint4*>(address));
  } else {
    value = *address;
  }
  return value;
}
template <typename V>
__device__ __forceinline__ void store(void* base, int64_t index, const V& value) {
  reinterpret_cast<V*>(base)[index] = value;
}

// weight[index] of whichever dtype the parameters have; `absent` where there is none.
template <typename Acc>
__device__ __forceinline__ Acc load_param(const void* base, DType dtype, int64_t index, Acc absent) {
  if (base == nullptr) return absent;
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<Acc>(reinterpret_cast<const float*>(base)[index]);
    case DType::kFloat16:
      return static_cast<Acc>(to_acc(reinterpret_cast<const __half*>(base)[index]));
    case DType::kBFloat16:
      return static_cast<Acc>(to_acc(reinterpret_cast<const __nv_bfloat16*>(base)[index]));
    default:
      return static_cast<Acc>(reinterpret_cast<const double*>(base)[index]);
  }
}

}  // namespace styleforge::cuda
