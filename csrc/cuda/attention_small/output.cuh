// The second projection of launch.h: 32 columns of 16 or 32 rows a block, whose eight warps share k.
#pragma once

#include "kernels.h"
#include "product.cuh"

namespace styleforge::cuda {

constexpr int kOutColumns = 32;

#ifdef STYLEFORGE_HAS_MMA

// `wait` is called when the weights are on their way; nothing of `attended` is read before.
template <typename Math, int kRows, typename Wait>
__device__ __forceinline__ void project_output(const SmallAttentionParams& p, unsigned char* memory, int first_column,
                                               int first_row, const Wait& wait) {
  using T = typename Math::T;
  using Product = ProductTile<Math, kRows, kOutColumns>;
  constexpr int64_t kSize = sizeof(T);
  const int rows = min(kRows, p.batch * p.length - first_row);
  __shared__ __align__(16) T bias[kOutColumns];
  constexpr int kWidth = 16 / sizeof(T);
  if (threadIdx.x < kOutColumns / kWidth) {
    const int column = first_column + threadIdx.x * kWidth;
    const bool there = p.out_bias != nullptr && column < p.embed;
    const T* from = static_cast<const T*>(there ? p.out_bias : p.out_weight);
    copy_async(shared_address(bias + threadIdx.x * kWidth), there ? from + column : from, there ? 16 : 0);
  }
  Product product;
  const ProductRows a{static_cast<const unsigned char*>(p.attended) + int64_t{first_row} * p.embed * kSize,
                      p.embed * kSize, rows};
  const ProductWeights b{static_cast<const unsigned char*>(p.out_weight) + int64_t{first_column} * p.embed * kSize,
                         p.embed * kSize, 0, min(kOutColumns, p.embed - first_column)};
  multiply_rows<kOutColumns, true>(product, shared_address(memory), a, b, p.embed * static_cast<int>(kSize), wait);
  T* out = static_cast<T*>(p.output) + int64_t{first_row} * p.embed + first_column;
  add_parts(product, memory, [&](int row, int column, float (&v)[4]) {
    if (row >= rows || first_column + column >= p.embed) return;
    const auto more = *reinterpret_cast<const Vec<T, 4>*>(bias + column);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] += to_acc(more.data[c]);
    *reinterpret_cast<Vec<T, 4>*>(out + int64_t{row} * p.embed + column) = rounded<T, 4>(v);
  });
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
