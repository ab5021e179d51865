// A kernel's weights, brought to [rows, taps, in_channels]: a thread has nine taps of one output and one input channel,
// neighbouring threads have neighbouring input channels. The taps lie side by side in PyTorch's layout, so that the
// reads of a warp are lines that it needs as a whole, and its writes are runs of channels.
#pragma once

#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {

constexpr int kWeightTaps = 9;  // of a thread, whose loads are on their way together: a 3x3 kernel's

// Of the result: a kernel's taps and rows.
__host__ __device__ inline int weight_taps(const ConvWeightsParams& p) {
  return p.column_rows > 0 ? p.kernel_h : p.kernel_h * p.kernel_w;
}
__host__ __device__ inline int weight_rows(const ConvWeightsParams& p) {
  return p.column_rows > 0 ? p.column_rows : p.out_channels;
}
inline int64_t weight_threads(const ConvWeightsParams& p) {
  return int64_t{weight_rows(p)} * p.in_channels * ((weight_taps(p) + kWeightTaps - 1) / kWeightTaps);
}

// Any `thread` from 0 on; those from weight_threads on do nothing.
template <typename T>
__device__ __forceinline__ void write_conv_weights(const ConvWeightsParams& p, int thread) {
  const int pairs = weight_rows(p) * p.in_channels;
  const int taps = weight_taps(p);
  const int first = thread / pairs * kWeightTaps;
  if (first >= taps) return;
  const int pair = thread % pairs;
  const int row = pair / p.in_channels;
  const int ci = pair - row * p.in_channels;
  const bool by_columns = p.column_rows > 0;
  const int column = by_columns ? row / p.out_channels : 0;
  const int co = by_columns ? row - column * p.out_channels : row;
  const bool exists = column < p.kernel_w;
  const T* from = static_cast<const T*>(p.weight) + co * p.stride[0] + ci * p.stride[1];
  int y = by_columns ? first : first / p.kernel_w;
  int x = by_columns ? (exists ? column : 0) : first - y * p.kernel_w;
  // No load is conditional, or they would wait for each other: beyond the last tap it is the last one again.
  T value[kWeightTaps];
#pragma unroll
  for (int u = 0; u < kWeightTaps; ++u) {
    value[u] = from[y * p.stride[2] + x * p.stride[3]];
    const bool last = first + u + 1 >= taps;
    const bool wraps = by_columns || x + 1 == p.kernel_w;
    y += !last && wraps ? 1 : 0;
    x = last || by_columns ? x : wraps ? 0 : x + 1;
  }
  const int64_t to = (static_cast<int64_t>(row) * taps + first) * p.in_channels + ci;
#pragma unroll
  for (int u = 0; u < kWeightTaps; ++u) {
    if (first + u >= taps) continue;
    const T own = exists ? value[u] : T{};
    const int64_t at = to + static_cast<int64_t>(u) * p.in_channels;
    if constexpr (sizeof(T) == 4) {
      if (p.output_lo != nullptr) {
        split_tf32(own, static_cast<float*>(p.output)[at], static_cast<float*>(p.output_lo)[at]);
        continue;
      }
    }
    static_cast<T*>(p.output)[at] = own;
  }
}

}  // namespace styleforge::cuda
