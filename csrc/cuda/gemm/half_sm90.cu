// wide_sm90.cuh and wide_gradient_sm90.cuh for 16-bit numbers.
#include "wide_gradient_sm90.cuh"
#include "wide_sm90.cuh"

namespace styleforge::cuda {
namespace {

template <typename T>
cudaError_t launch_dtype(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  if (p.gradient) return launch_wide_gradient<T>(p, s, facts, stream);
  if (s.columns == 192) return launch_wide_gemm<T, 192, 3>(p, s, facts, stream);
  return launch_wide_gemm<T, 256, 4>(p, s, facts, stream);
}

}  // namespace

cudaError_t launch_half_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
