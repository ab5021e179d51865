// Between the two dense memory formats, NCHW and channels_last: a transposition of each sample, [channels, pixels].
// Elements are moved, never computed, so only their size matters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace styleforge::cuda {

struct TransposeParams {
  const void* input = nullptr;
  void* output = nullptr;
  int batch = 0, channels = 0, pixels = 0;  // pixels: height * width
  int element_size = 4;                     // bytes: 2 or 4
  bool to_channels_last = true;             // from NCHW; else the other way round
};

// Whether launch_transpose takes it: sizes within the limits of a grid.
bool takes_transpose(const TransposeParams& params);
cudaError_t launch_transpose(const TransposeParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
