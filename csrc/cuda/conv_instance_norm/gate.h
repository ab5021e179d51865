// Launches of resident grids that are not cooperative: common/grid.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/launch.h"

namespace styleforge::cuda {

constexpr uint32_t kGates = 16384;

// gates[place] of a launch (0: none, the launch is cooperative), and how long its blocks wait for each other.
struct GateOfLaunch {
  uint32_t place = 0, nanoseconds = 0;
};

// STYLEFORGE_CONV_TUNE="gate=3": every grid is called off before it begins; patience=nanoseconds
GateOfLaunch gate_of_launch(const DeviceFacts& facts, cudaStream_t stream);

}  // namespace styleforge::cuda
