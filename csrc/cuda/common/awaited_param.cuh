// A weight or a bias on its way: asked for where the object is made, awaited where its value is.
//
// load_param converts numbers of 16 bits in a branch of their own, and so waits for each at once, behind all that is on
// its way already: 3.7 us of 18 for both (4x64x256x256 in half, H200); of 32 bits nothing. held_plane.cu, whose way is
// short, has a form without branches.
#pragma once

#include "types.cuh"

namespace styleforge::cuda {

template <typename Acc>
class AwaitedParam {
 public:
  AwaitedParam() = default;
  __device__ __forceinline__ AwaitedParam(const void* base, DType dtype, int64_t index)
      : present_(base != nullptr), dtype_(dtype) {
    if (!present_) return;
    switch (dtype) {
      case DType::kFloat16:
      case DType::kBFloat16:
        bits_ = reinterpret_cast<const uint16_t*>(base)[index];
        break;
      case DType::kFloat32:
        bits_ = reinterpret_cast<const uint32_t*>(base)[index];
        break;
      default:
        bits_ = __float_as_uint(static_cast<float>(reinterpret_cast<const double*>(base)[index]));
    }
  }

  __device__ __forceinline__ float value(float absent) const {
    if (!present_) return absent;
    if (dtype_ == DType::kFloat16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits_)));
    return __uint_as_float(dtype_ == DType::kBFloat16 ? bits_ << 16 : bits_);
  }

 private:
  uint32_t bits_ = 0;
  bool present_ = false;
  DType dtype_ = DType::kFloat32;
};

// For checks, not for speed.
template <>
class AwaitedParam<double> {
 public:
  AwaitedParam() = default;
  __device__ __forceinline__ AwaitedParam(const void* base, DType dtype, int64_t index)
      : present_(base != nullptr), value_(load_param(base, dtype, index, 0.0)) {}
  __device__ __forceinline__ double value(double absent) const { return present_ ? value_ : absent; }

 private:
  bool present_ = false;
  double value_ = 0;
};

}  // namespace styleforge::cuda
