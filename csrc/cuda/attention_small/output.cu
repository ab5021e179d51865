// The second projection of launch.h: 32 columns of 16 or 32 rows a block, whose eight warps share k. The weights are on
// their way while the kernel before this one still runs.
#include "../common/cluster.cuh"
#include "kernels.h"
#include "product.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kColumns = 32;

template <typename Math, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 2)
    small_output_kernel(const __grid_constant__ SmallAttentionParams p) {
#ifdef STYLEFORGE_HAS_MMA
  using T = typename Math::T;
  using Product = ProductTile<Math, kRows, kColumns>;
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int64_t kSize = sizeof(T);
  const int first_column = blockIdx.x * kColumns, first_row = blockIdx.y * kRows;
  const int rows = min(kRows, p.batch * p.length - first_row);

  release_successor();
  __shared__ __align__(16) T bias[kColumns];
  constexpr int kWidth = 16 / sizeof(T);
  if (threadIdx.x < kColumns / kWidth) {
    const int column = first_column + threadIdx.x * kWidth;
    const bool there = p.out_bias != nullptr && column < p.embed;
    const T* from = static_cast<const T*>(there ? p.out_bias : p.out_weight);
    copy_async(shared_address(bias + threadIdx.x * kWidth), there ? from + column : from, there ? 16 : 0);
  }
  Product product;
  const ProductRows a{static_cast<const unsigned char*>(p.attended) + int64_t{first_row} * p.embed * kSize,
                      p.embed * kSize, rows};
  const ProductWeights b{static_cast<const unsigned char*>(p.out_weight) + int64_t{first_column} * p.embed * kSize,
                         p.embed * kSize, 0, min(kColumns, p.embed - first_column)};
  multiply_rows<kColumns, true>(product, shared_address(memory), a, b, p.embed * static_cast<int>(kSize),
                                [] { wait_for_predecessor(); });
  T* out = static_cast<T*>(p.output) + int64_t{first_row} * p.embed + first_column;
  add_parts(product, memory, [&](int row, int column, float (&v)[4]) {
    if (row >= rows || first_column + column >= p.embed) return;
    const auto more = *reinterpret_cast<const Vec<T, 4>*>(bias + column);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] += to_acc(more.data[c]);
    *reinterpret_cast<Vec<T, 4>*>(out + int64_t{row} * p.embed + column) = rounded<T, 4>(v);
  });
#endif
}

template <typename Math, int kRows>
cudaError_t launch_rows(const SmallAttentionParams& p, cudaStream_t stream) {
  using Product = ProductTile<Math, kRows, kColumns>;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.embed, kColumns)),
                  static_cast<unsigned>(ceil_div(int64_t{p.batch} * p.length, kRows)));
  return launch(small_output_kernel<Math, kRows>, grid, dim3(kSmallThreads), Product::kRingBytes, 1, facts, stream, p);
}

template <typename Math>
cudaError_t launch_math(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  return s.out_rows == 16 ? launch_rows<Math, 16>(p, stream) : launch_rows<Math, 32>(p, stream);
}

}  // namespace

cudaError_t launch_small_output(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return p.tf32 ? launch_math<TF32>(p, s, stream) : launch_math<Ieee>(p, s, stream);
    case DType::kFloat16:
      return launch_math<Half>(p, s, stream);
    case DType::kBFloat16:
      return launch_math<BFloat16>(p, s, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
