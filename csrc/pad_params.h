// Padding and nearest upsampling in one gather, the input side of a convolution:
//
//   output[n, c, y, x] = up[n, c, mode(y - pad_top), mode(x - pad_left)],   up = nearest(input, upsample)
//
// Elements are moved, never computed (but for round_tf32), so only their size matters.
#pragma once

#include <cstdint>

namespace styleforge {

enum class PaddingMode : int { kZeros = 0, kReflect = 1, kReplicate = 2 };

struct PadParams {
  const void* input = nullptr;
  void* output = nullptr;

  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;  // of input
  int64_t width = 0;
  int64_t out_height = 0;  // height * upsample + padding on both sides
  int64_t out_width = 0;
  int64_t out_channels = 0;  // >= channels; the rest is zeros (channels_last only)

  int64_t pad_top = 0;
  int64_t pad_left = 0;
  int upsample = 1;
  PaddingMode mode = PaddingMode::kZeros;

  int element_size = 4;  // bytes: 2, 4 or 8
  bool channels_last = false;

  // float32 rounded to the nearest TF32 on the way (CUDA only): for a convolution whose tensor cores would cut the
  // lower bits off, always towards zero. (A norm takes most of that bias out again; what it leaves is a few percent.)
  bool round_tf32 = false;
};

}  // namespace styleforge
