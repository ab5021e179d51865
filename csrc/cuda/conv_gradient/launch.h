// The gradients of a convolution: what the operator layer calls. That of the input is a convolution, too
// (ops/cuda/plain_convolution.h), for which the weights are brought here to what it reads.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../activation.h"
#include "../../pad_params.h"

namespace styleforge::cuda {

// output[ci, kernel_h - 1 - i, kernel_w - 1 - j, co] = weight[co, ci, i, j]
struct TurnedWeightsParams {
  const void* weight = nullptr;  // [out_channels, in_channels, kernel_h, kernel_w], any strides
  void* output = nullptr;        // [in_channels, kernel_h, kernel_w, out_channels]
  int64_t stride[4] = {};        // of weight, in elements
  int out_channels = 0, in_channels = 0, kernel_h = 1, kernel_w = 1;
  DType dtype = DType::kFloat16;  // 16-bit
};
cudaError_t launch_turned_weights(const TurnedWeightsParams& params, cudaStream_t stream);

// output[co, ci, i, j] = sum over n, y, x of grad[n, y, x, co] * input[n, y * stride_h + i - pad_top,
//                                                                      x * stride_w + j - pad_left, ci]
// with the input padded by `mode`.
struct WeightGradientParams {
  // dense, channels_last, aligned to 16 bytes
  const void* grad = nullptr;   // [batch, out_height, out_width, out_channels]
  const void* input = nullptr;  // [batch, height, width, in_channels]
  void* output = nullptr;       // [out_channels, in_channels, 3, 3]
  float* partials = nullptr;    // workspace
  int64_t output_stride[4] = {};

  int batch = 0, out_channels = 0, out_height = 0, out_width = 0;
  int in_channels = 0, height = 0, width = 0;
  int kernel_h = 3, kernel_w = 3, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
  PaddingMode mode = PaddingMode::kZeros;
  TurnedWeightsParams turned;  // with an output: the same launch writes it, too
  DType dtype = DType::kFloat16;
};

struct WeightGradientSchedule {
  int tiles_x = 0, tiles_y = 0, tiles = 0;  // of grad's pixels
  int splits = 0;                           // blocks that share the tiles of the same weights
  int sum_groups = 0;                       // of threads that share a sum over the splits
  bool discards = false;                    // parts that are added up are let go of
  int stages = 0;
  // Of a tile's input in shared memory: one box for all taps, or one for each column of the kernel.
  int boxes = 1;
  int box_width = 0, box_height = 0, box_bytes = 0;
  int tap_distance = 0;  // bytes between what two columns of the kernel read
  int row_bytes = 0;     // from a row of the kernel to the next
  int stage_bytes = 0, loaded_bytes = 0;
  size_t shared_bytes = 0, workspace_bytes = 0;
};

// Whether the kernel takes this shape on the current device; fills the schedule if so. Pointers may still be null.
cudaError_t schedule_weight_gradient(const WeightGradientParams& params, WeightGradientSchedule& schedule,
                                     bool& supported);
cudaError_t launch_weight_gradient(const WeightGradientParams& params, const WeightGradientSchedule& schedule,
                                   cudaStream_t stream);

}  // namespace styleforge::cuda
