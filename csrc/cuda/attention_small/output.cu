// The launch of the second projection. The weights are on their way while the kernel before this one still runs.
#include "../common/cluster.cuh"
#include "output.cuh"

namespace styleforge::cuda {
namespace {

template <typename Math, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 2)
    small_output_kernel(const __grid_constant__ SmallAttentionParams p) {
#ifdef STYLEFORGE_HAS_MMA
  extern __shared__ __align__(128) unsigned char memory[];
  release_successor();
  project_output<Math, kRows>(p, memory, static_cast<int>(blockIdx.x) * kOutColumns,
                              static_cast<int>(blockIdx.y) * kRows, [] { wait_for_predecessor(); });
#endif
}

template <typename Math, int kRows>
cudaError_t launch_rows(const SmallAttentionParams& p, cudaStream_t stream) {
  using Product = ProductTile<Math, kRows, kOutColumns>;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.embed, kOutColumns)),
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
