// Where a pixel of the result lies in an input of four phases (InstanceNormParams::phase_width): see
// csrc/cuda/upsample/launch.h. channels_last only.
#pragma once

#include "channel_tiles.cuh"

namespace styleforge::cuda {

// Index of vector `vector` (of `vectors` a phase) of output pixel `pixel` of sample `n` in
// [N, H + 1, W + 1, 4 phases x C], for an output of 2H x 2W pixels.
__device__ __forceinline__ int64_t phase_vector(const InstanceNormParams& p, int64_t n, int64_t pixel, int vectors,
                                                int vector) {
  const int width = p.phase_width;
  const int y = static_cast<int>(pixel) / width;
  const int x = static_cast<int>(pixel) - y * width;
  const int height = static_cast<int>(p.pixels) / width;
  const int64_t row = n * (height / 2 + 1) + (y + 1) / 2;  // y / 2, plus one for odd rows
  const int64_t position = row * (width / 2 + 1) + (x + 1) / 2;
  return (position * 4 + (y % 2) * 2 + x % 2) * vectors + vector;
}

// Of the thread's vector in its tile's i-th pixel, in an input that may lie in phases.
template <int kWidth>
__device__ __forceinline__ int64_t source_vector(const InstanceNormParams& p, const ChannelTile<kWidth>& at, int i) {
  if (p.phase_width == 0) return at.index(i);
  return phase_vector(p, at.n, at.begin + i, at.vectors, at.vector);
}

}  // namespace styleforge::cuda
