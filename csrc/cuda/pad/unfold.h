// The columns of a convolution's kernel as channels of its input (see unfold.cu).
#pragma once

#include <cuda_runtime.h>

#include "../../pad_params.h"

namespace styleforge::cuda {

constexpr int kMostUnfoldChannels = 4;
constexpr int kMostUnfoldWidth = 512;  // of a kernel

struct UnfoldParams {
  const void* input = nullptr;
  void* output = nullptr;  // channels_last, dense, aligned to 16 bytes
  int64_t stride[4] = {};  // of the input, in elements
  int64_t batch = 0;
  int channels = 0;           // of the input, 1 to kMostUnfoldChannels
  int height = 0, width = 0;  // of the input
  int out_height = 0;         // height + 2 * pad_top
  int out_width = 0;          // width + 2 * pad_left - kernel_width + 1
  int out_channels = 0;       // kernel_width * channels, up to a multiple of 16 bytes
  int kernel_width = 1;       // up to kMostUnfoldWidth
  int pad_top = 0, pad_left = 0;
  PaddingMode mode = PaddingMode::kZeros;
  int element_size = 2;  // bytes: 2 or 4
};

cudaError_t launch_unfold_columns(const UnfoldParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
