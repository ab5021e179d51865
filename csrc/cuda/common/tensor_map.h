// Tensor maps: what the copy engine of sm_90 has to know of a tensor to move boxes of it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../../activation.h"

namespace styleforge::cuda {

// A tensor in boxes; what lies beyond its ends is zeros. Strides are in bytes. `promotion`: what the L2 cache fetches
// at once, which should not be more than a box takes of a row. `to_tf32`: float32 numbers arrive rounded to TF32.
template <int kDims>
cudaError_t tensor_map(DType dtype, const void* data, const cuuint64_t (&sizes)[kDims],
                       const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims], CUtensorMap& map,
                       CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B, bool to_tf32 = false) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<Encode>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = dtype == DType::kFloat16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : to_tf32                   ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  cuuint32_t steps[kDims];
  for (auto& step : steps) step = 1;
  const auto encoded = [&] {
    return encode(&map, type, kDims, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  auto result = encoded();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread's first call, as in autograd's: the runtime sets it up
    int device = 0;
    if (const auto error = cudaGetDevice(&device)) return error;
    if (const auto error = cudaSetDevice(device)) return error;
    result = encoded();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef __CUDACC__
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
#endif

}  // namespace styleforge::cuda
