// float32 of float16 or bfloat16 (see widen.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

struct WidenParams {
  const void* input = nullptr;  // `count` elements, aligned to 16 bytes
  void* output = nullptr;       // as many floats
  int64_t count = 0;
  DType dtype = DType::kFloat16;
};

cudaError_t launch_widen(const WidenParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
