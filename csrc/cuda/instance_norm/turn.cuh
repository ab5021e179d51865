// A thread's way round a ring of stages.
#pragma once

#include <cstdint>

namespace styleforge::cuda {

// Stages in their order, with the parity of the phase that their barriers are in.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace styleforge::cuda
