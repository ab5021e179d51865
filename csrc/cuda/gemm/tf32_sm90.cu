// wide_sm90.cuh for float32 numbers, rounded to nearest TF32 ones by the copy engine. Boxes of products take twice the
// bytes: places for half of a tile's columns, so that four stages fit (eight places and three stages: 131 for 120 us).
#include "wide_sm90.cuh"

namespace styleforge::cuda {

cudaError_t launch_tf32_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (s.columns == 192) return launch_wide_gemm<float, 192, 3, false>(p, s, facts, stream);
  return launch_wide_gemm<float, 256, 4, false>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
