// Weights to nearest TF32 numbers, for float32 accuracy with what that leaves out in a second one.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gemm_weights_kernel(const __grid_constant__ GemmWeightsParams w) {
  wait_for_predecessor();
  release_successor();
  const int vectors = (w.k + 3) / 4;
  const bool whole =
      w.stride[1] == 1 && w.stride[0] % 4 == 0 && w.k % 4 == 0 && reinterpret_cast<uintptr_t>(w.weight) % 16 == 0;
  // A warp has 128 numbers of a row at a time.
  const int pieces = (vectors + 31) / 32;
  const int warps = gridDim.x * (kThreads / 32);
  int row = (blockIdx.x * kThreads + threadIdx.x) / 32 / pieces;
  int piece = (blockIdx.x * kThreads + threadIdx.x) / 32 - row * pieces;
  const int row_step = warps / pieces, piece_step = warps - row_step * pieces;
  for (; row < w.rows;) {
    const int vector = piece * 32 + threadIdx.x % 32;
    const int64_t i = static_cast<int64_t>(row) * vectors + vector;
    const int k = vector * 4;
    const float* from = w.weight + row * w.stride[0] + k * w.stride[1];
    row += row_step;
    piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++row;
    }
    if (vector >= vectors) continue;
    Vec<float, 4> v{}, hi, lo;
    if (whole) {
      v = load_const<Vec<float, 4>>(from, 0);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (k + j < w.k) v.data[j] = from[j * w.stride[1]];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) split_tf32(v.data[j], hi.data[j], lo.data[j]);
    store(w.hi, i, hi);
    if (w.lo != nullptr) store(w.lo, i, lo);
  }
}

// The same of a transposed matrix, whose rows are neighbours in memory: a lane a row, eight numbers of k at a time, so
// that loads are whole lines and stores whole sectors.
constexpr int kTransposedK = 8;
__global__ void __launch_bounds__(kThreads) gemm_transposed_kernel(const __grid_constant__ GemmWeightsParams w) {
  wait_for_predecessor();
  release_successor();
  const int blocks_k = (w.k + kTransposedK - 1) / kTransposedK;
  const int64_t pieces = static_cast<int64_t>((w.rows + 31) / 32) * blocks_k;
  const int vectors = (w.k + 3) / 4;
  for (int64_t piece = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32; piece < pieces;
       piece += static_cast<int64_t>(gridDim.x) * (kThreads / 32)) {
    const int row = static_cast<int>(piece / blocks_k) * 32 + threadIdx.x % 32;
    const int k = static_cast<int>(piece % blocks_k) * kTransposedK;
    if (row >= w.rows) continue;
    const float* from = w.weight + row * w.stride[0] + k * w.stride[1];
    float v[kTransposedK];
#pragma unroll
    for (int j = 0; j < kTransposedK; ++j) v[j] = k + j < w.k ? from[j * w.stride[1]] : 0.0f;
#pragma unroll
    for (int h = 0; h < kTransposedK / 4; ++h) {
      if (k / 4 + h >= vectors) continue;
      Vec<float, 4> hi, lo;
#pragma unroll
      for (int j = 0; j < 4; ++j) split_tf32(v[4 * h + j], hi.data[j], lo.data[j]);
      const int64_t i = static_cast<int64_t>(row) * vectors + k / 4 + h;
      store(w.hi, i, hi);
      if (w.lo != nullptr) store(w.lo, i, lo);
    }
  }
}

}  // namespace

cudaError_t launch_gemm_weights(const GemmWeightsParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool transposed = params.stride[0] == 1 && params.stride[1] != 1;
  const int64_t pieces = transposed ? ceil_div(params.rows, 32) * ceil_div(params.k, kTransposedK)
                                    : params.rows * ceil_div(params.k, 128);  // one a warp
  const int64_t fill = int64_t{facts.multiprocessors} * 8;                    // blocks at a time
  const auto grid = dim3(static_cast<unsigned>(std::min(ceil_div(pieces, kThreads / 32), fill)));
  return launch(transposed ? gemm_transposed_kernel : gemm_weights_kernel, grid, dim3(kThreads), 0, 1, facts, stream,
                params);
}

}  // namespace styleforge::cuda
