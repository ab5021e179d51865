// Sums over the rows of a matrix, which gradients of biases are, in a fixed order: first of 128 rows each, then of
// those sums. The products that write such a matrix may give the first ones (gemm/wide_out.cuh).
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kVectors = 8, kDown = 32;  // a block's threads: 16-byte vectors side by side, rows
constexpr int kThreads = kVectors * kDown;
constexpr int kWidth = 8;  // numbers in a vector
constexpr int kColumns = kVectors * kWidth;
constexpr int kInFlight = kPartRows / kDown;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_parts_kernel(const void* matrix, float* parts, int64_t stride, int rows, int columns) {
  using V = Vec<T, kWidth>;
  __shared__ float sums[kDown][kColumns + 1];
  wait_for_predecessor();
  release_successor();
  const int x = threadIdx.x % kVectors, y = threadIdx.x / kVectors;
  const int first_column = blockIdx.x * kColumns;
  const int column = first_column + x * kWidth;
  V v[kInFlight] = {};
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kPartRows + i * kDown + y;
    if (row < rows && column < columns) {
      v[i] = *reinterpret_cast<const V*>(static_cast<const T*>(matrix) + row * stride + column);
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum += to_acc(v[i].data[j]);
    sums[y][x * kWidth + j] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kColumns || first_column + static_cast<int>(threadIdx.x) >= columns) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kDown; ++i) sum += sums[i][threadIdx.x];
  parts[static_cast<int64_t>(blockIdx.y) * columns + first_column + threadIdx.x] = sum;
}

// A block has 32 columns; 32 threads share the parts of one.
constexpr int kFinishColumns = 32, kFinishParts = 32;
template <typename T>
__global__ void __launch_bounds__(kFinishColumns* kFinishParts)
    finish_parts_kernel(const float* parts, T* output, int count, int columns) {
  __shared__ float sums[kFinishParts][kFinishColumns + 1];
  wait_for_predecessor();
  release_successor();
  const int x = threadIdx.x % kFinishColumns, y = threadIdx.x / kFinishColumns;
  const int column = blockIdx.x * kFinishColumns + x;
  float sum = 0;
  if (column < columns) {
    constexpr int kTogether = 8;
    for (int first = y; first < count; first += kFinishParts * kTogether) {
      float v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int part = first + i * kFinishParts;
        v[i] = part < count ? parts[static_cast<int64_t>(part) * columns + column] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum += v[i];
    }
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || column >= columns) return;
  float total = 0;
#pragma unroll
  for (int i = 0; i < kFinishParts; ++i) total += sums[i][x];
  output[column] = from_acc<T>(total);
}

template <typename T>
cudaError_t finish(const ColumnSumsParams& p, int count, const DeviceFacts& facts, cudaStream_t stream) {
  const auto grid = dim3(static_cast<unsigned>(ceil_div(p.columns, kFinishColumns)));
  return launch(finish_parts_kernel<T>, grid, dim3(kFinishColumns * kFinishParts), 0, 1, facts, stream, p.parts,
                static_cast<T*>(p.output), count, p.columns);
}

template <typename T>
cudaError_t sums(const ColumnSumsParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (p.matrix == nullptr) return finish<T>(p, p.part_count, facts, stream);
  const auto grid =
      dim3(static_cast<unsigned>(ceil_div(p.columns, kColumns)), static_cast<unsigned>(ceil_div(p.rows, kPartRows)));
  if (const auto error = launch(row_parts_kernel<T>, grid, dim3(kThreads), 0, 1, facts, stream, p.matrix, p.parts,
                                p.stride, p.rows, p.columns)) {
    return error;
  }
  return finish<T>(p, static_cast<int>(grid.y), facts, stream);
}

}  // namespace

cudaError_t launch_column_sums(const ColumnSumsParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kFloat16:
      return sums<__half>(params, stream);
    case DType::kBFloat16:
      return sums<__nv_bfloat16>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
