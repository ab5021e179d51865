// A kernel's weights, brought to [rows, taps, in_channels]: a thread has a few taps of one output and one input
// channel, neighbouring threads have neighbouring input channels. The taps lie side by side in PyTorch's layout, so
// that the reads of a warp's turns are the same lines, and its writes are runs of channels.
//
// Few taps make many blocks, and that counts for more than the index arithmetic they share: blocks come early, while
// the multiprocessors are full of the kernel before, and crowd on those that are not. Alone, one tap is best (nine: up
// to 2 us later on 128x128x3x3), beside a transposition three.
#pragma once

#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {

// Of the result: a kernel's taps and rows.
__host__ __device__ inline int weight_taps(const ConvWeightsParams& p) {
  return p.column_rows > 0 ? p.kernel_h : p.kernel_h * p.kernel_w;
}
__host__ __device__ inline int weight_rows(const ConvWeightsParams& p) {
  return p.column_rows > 0 ? p.column_rows : p.out_channels;
}
template <int kTaps>
int64_t weight_threads(const ConvWeightsParams& p) {
  return int64_t{weight_rows(p)} * p.in_channels * ((weight_taps(p) + kTaps - 1) / kTaps);
}

// Any `thread` from 0 on; those from weight_threads on do nothing.
template <typename T, int kTaps>
__device__ __forceinline__ void write_conv_weights(const ConvWeightsParams& p, int thread) {
  const int pairs = weight_rows(p) * p.in_channels;
  const int taps = weight_taps(p);
  const int first = thread / pairs * kTaps;
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
  T value[kTaps];
#pragma unroll
  for (int u = 0; u < kTaps; ++u) {
    value[u] = from[y * p.stride[2] + x * p.stride[3]];
    const bool last = first + u + 1 >= taps;
    const bool wraps = by_columns || x + 1 == p.kernel_w;
    y += !last && wraps ? 1 : 0;
    x = last || by_columns ? x : wraps ? 0 : x + 1;
  }
  const int64_t to = (static_cast<int64_t>(row) * taps + first) * p.in_channels + ci;
#pragma unroll
  for (int u = 0; u < kTaps; ++u) {
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
