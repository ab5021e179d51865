// How a pass over [rows, columns] with a bias for each column is cut up: a thread keeps one vector of columns, whose
// bias it loads once, and goes down the rows.
//
//   block:   lanes vectors side by side (coalesced) x 256 / lanes rows
//   thread:  kRowsInFlight rows at a time, a block's height apart, all loaded before the first is used
#pragma once

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"

namespace styleforge::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowsInFlight = 4;

// A thread's place. `lanes` is a power of two.
struct RowPlace {
  int64_t vector;       // of the row's
  int64_t first, step;  // rows
  __device__ __forceinline__ explicit RowPlace(int lanes) {
    vector = static_cast<int64_t>(blockIdx.x) * lanes + (threadIdx.x & (lanes - 1));
    const int height = kRowThreads / lanes;
    first = static_cast<int64_t>(blockIdx.y) * height * kRowsInFlight + threadIdx.x / lanes;
    step = height;
  }
};

// load(row, i) for the thread's next rows, then use(row, i) for the same ones, i < kRowsInFlight being the slot.
template <typename Load, typename Use>
__device__ __forceinline__ void for_each_row(const RowPlace& at, int64_t rows, Load&& load, Use&& use) {
  for (int64_t row = at.first; row < rows; row += at.step * kRowsInFlight * gridDim.y) {
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i * at.step < rows) load(row + i * at.step, i);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i * at.step < rows) use(row + i * at.step, i);
    }
  }
}

template <typename V>
__device__ __forceinline__ V load_vector(const void* base, int64_t index) {
  return reinterpret_cast<const V*>(base)[index];
}

struct RowGrid {
  dim3 grid;
  int lanes = 1;

  RowGrid(int64_t rows, int64_t vectors) {
    while (lanes < vectors && lanes < kRowThreads) lanes *= 2;
    const int64_t tall = ceil_div(rows, static_cast<int64_t>(kRowThreads / lanes) * kRowsInFlight);
    grid = dim3(static_cast<unsigned>(ceil_div(vectors, lanes)), static_cast<unsigned>(tall < 65535 ? tall : 65535));
  }
};

// Launches vector_kernel (16-byte vectors) where `columns` and all addresses allow it, else scalar_kernel.
template <typename T, typename Params>
cudaError_t launch_rows(void (*vector_kernel)(Params, int), void (*scalar_kernel)(Params, int), const Params& params,
                        bool aligned, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool vectors = aligned && params.columns % kFullWidth<T> == 0;
  const RowGrid cut(params.rows, vectors ? params.columns / kFullWidth<T> : params.columns);
  return launch(vectors ? vector_kernel : scalar_kernel, cut.grid, dim3(kRowThreads), 0, 1, facts, stream, params,
                cut.lanes);
}

}  // namespace styleforge::cuda
