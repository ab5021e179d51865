// The gradient of padding and upsampling (pad_params.h): every pixel of the input gets the sum of what was read from
// it,
//
//   grad_input[n, c, i, j] = sum of grad_output[n, c, y, x] over all (y, x) whose source is (i, j)
//
// in a fixed order, in float32 (float64 for float64), rounded once.
#pragma once

#include "activation.h"
#include "pad_params.h"

namespace styleforge {

struct PadBackwardParams {
  const void* grad_output = nullptr;
  void* grad_input = nullptr;

  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;  // of grad_input
  int64_t width = 0;
  int64_t pad_top = 0;  // as much at the bottom
  int64_t pad_left = 0;
  int upsample = 1;
  PaddingMode mode = PaddingMode::kZeros;

  DType dtype = DType::kFloat32;
  bool channels_last = false;
};

}  // namespace styleforge
