// Instance norm over the four phases of a convolution of the 2x nearest-upsampled input.
//
// A 3x3 convolution (stride 1, padding 1) of the upsampled input is four 2x2 convolutions of the input itself, with 4/9
// of the multiplications: output row 2i reads input rows i - 1 (tap w0) and i (taps w1 + w2), row 2i + 1 reads rows i
// (w0 + w1) and i + 1 (w2); columns likewise. On the input padded by one pixel every phase (a, b) is a valid
// convolution of size [height + 1, width + 1], whose position (i + a, j + b) is the output pixel (2i + a, 2j + b).
// Reflecting and replicating one pixel of an upsampled picture are the same, and equal to replicating one pixel of the
// input.
#pragma once

#include "instance_norm.h"

namespace styleforge::cpu {

// Everything is channels_last. norm.input is unused, norm.pixels = 4 * height * width, norm.output [N, C, 2H, 2W].
struct UpsamplePhasesParams {
  InstanceNormParams norm;
  const void* phases[4] = {};  // phase (a, b) at 2a + b, each [batch, height + 1, width + 1, channels]
  int64_t height = 0;          // of the input before upsampling
  int64_t width = 0;
};

void instance_norm_phases(const UpsamplePhasesParams& params, ParallelFor parallel_for);

}  // namespace styleforge::cpu
