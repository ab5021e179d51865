// A 3x3 convolution (stride 1, padding 1) of a 2x nearest-upsampled input as one 2x2 convolution of the input itself,
// with 4/9 of the multiplications.
//
// Output row 2i reads input rows i - 1 (tap w0) and i (taps w1 + w2), row 2i + 1 reads rows i (w0 + w1) and i + 1 (w2);
// columns likewise. So with the weights of the four phases (a, b) stacked as 4 x Co output channels, a 2x2 convolution
// of the input padded by one pixel has at position (i + a, j + b), channels of phase 2a + b, the output pixel (2i + a,
// 2j + b). The norm reads that layout directly (InstanceNormParams::phase_width). Reflecting and replicating one pixel
// of an upsampled picture are the same, and equal to replicating one pixel of the input.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

struct PhaseWeightsParams {
  const void* weight = nullptr;  // [out_channels, in_channels, 3, 3], any strides
  void* output = nullptr;        // [4 * out_channels, 2, 2, in_channels] in memory: channels_last
  int64_t out_channels = 0;
  int64_t in_channels = 0;
  int64_t stride[4] = {};  // of weight, in elements
  DType dtype = DType::kFloat32;
  bool round_tf32 = false;  // kFloat32 only: see PadParams
};

// Sums are taken in float32 (float64 for kFloat64) and rounded once (float32 not at all without round_tf32).
cudaError_t launch_phase_weights(const PhaseWeightsParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
