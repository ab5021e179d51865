// One (output channel, input channel) pair of a kernel's weights, brought to [rows, taps, in_channels]: neighbouring
// threads have neighbouring input channels. Their taps lie side by side in PyTorch's layout, so that the reads of a warp
// are lines that it needs as a whole, and its writes are runs of channels.
#pragma once

#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {

// Elements [row, tap, in_channel] of the result: rows * in_channels threads.
inline int64_t conv_weight_pairs(const ConvWeightsParams& p) {
  return int64_t{p.column_rows > 0 ? p.column_rows : p.out_channels} * p.in_channels;
}

template <typename T>
__device__ __forceinline__ void write_conv_weights(const ConvWeightsParams& p, int pair) {
  constexpr int kBatch = 9;  // loads in flight: a 3x3 kernel's
  const int row = pair / p.in_channels;
  const int ci = pair - row * p.in_channels;
  const bool by_columns = p.column_rows > 0;
  const int taps = by_columns ? p.kernel_h : p.kernel_h * p.kernel_w;
  const int column = by_columns ? row / p.out_channels : 0;
  const int co = by_columns ? row - column * p.out_channels : row;
  const bool exists = column < p.kernel_w;
  const T* from = static_cast<const T*>(p.weight) + co * p.stride[0] + ci * p.stride[1];
  const int64_t to = static_cast<int64_t>(row) * taps * p.in_channels + ci;
#pragma unroll 1
  for (int first = 0; first < taps; first += kBatch) {
    T value[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int tap = first + u;
      const int y = by_columns ? tap : tap / p.kernel_w;
      const int x = by_columns ? column : tap - y * p.kernel_w;
      value[u] = tap < taps && exists ? from[y * p.stride[2] + x * p.stride[3]] : T{};
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int tap = first + u;
      if (tap >= taps) continue;
      const int64_t at = to + static_cast<int64_t>(tap) * p.in_channels;
      if constexpr (sizeof(T) == 4) {
        if (p.output_lo != nullptr) {
          split_tf32(value[u], static_cast<float*>(p.output)[at], static_cast<float*>(p.output_lo)[at]);
          continue;
        }
      }
      static_cast<T*>(p.output)[at] = value[u];
    }
  }
}

}  // namespace styleforge::cuda
