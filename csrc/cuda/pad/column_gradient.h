// The gradient of a convolution's weights where its kernel is one column (see column_gradient.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

constexpr int kColumnChannels = 32;  // of both tensors
constexpr int kMostColumnRows = 9;   // of the kernel

struct ColumnGradientParams {
  const void* grad = nullptr;   // [batch, height, width, 32], dense, aligned to 16 bytes
  const void* input = nullptr;  // [batch, height + kernel_height - 1, width, 32]
  float* output = nullptr;      // [kernel_height, 32 of grad, 32 of input]
  float* partials = nullptr;    // workspace: [blocks] of the same
  int batch = 0, height = 0, width = 0;
  int kernel_height = 1;
  DType dtype = DType::kFloat16;  // float16 or bfloat16
};

// Blocks along a sample's rows; the workspace's bytes follow.
cudaError_t schedule_column_gradient(const ColumnGradientParams& params, int& parts, size_t& workspace_bytes);
cudaError_t launch_column_gradient(const ColumnGradientParams& params, int parts, cudaStream_t stream);

}  // namespace styleforge::cuda
