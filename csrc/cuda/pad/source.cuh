// Where padding takes a pixel from.
#pragma once

#include "../../pad_params.h"

namespace styleforge::cuda {

// Source coordinate on an axis of `size` elements (the upsampled one), or -1 for a zero.
__device__ __forceinline__ int source(int position, int size, PaddingMode mode) {
  if (position >= 0 && position < size) return position;
  switch (mode) {
    case PaddingMode::kReflect:
      return position < 0 ? -position : 2 * (size - 1) - position;
    case PaddingMode::kReplicate:
      return position < 0 ? 0 : size - 1;
    default:
      return -1;
  }
}

}  // namespace styleforge::cuda
