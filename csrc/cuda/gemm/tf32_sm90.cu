// wide_sm90.cuh for float32 numbers, rounded to nearest TF32 ones by the copy engine. Boxes of products take twice the
// bytes: four places, so that four stages fit. Eight places and three stages: both products in 120, 254, 451 and 1109
// us for 112, 254, 410 and 1053.
#include "wide_sm90.cuh"

namespace styleforge::cuda {

cudaError_t launch_tf32_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (s.columns == 192) return launch_wide_gemm<float, 192, 3>(p, s, facts, stream);
  const bool gelu = p.activate && p.activation == FfnActivation::kGelu && p.residual == nullptr &&
                    p.product == nullptr && p.k > (kGeluAhead - 1) * kBoxNumbers<float> && s.stages > kGeluAhead;
  if (gelu) return launch_wide_gemm<float, 256, 4, true>(p, s, facts, stream);
  return launch_wide_gemm<float, 256, 4>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
