// The launches behind launch.h, one for each path.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

cudaError_t launch_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);
cudaError_t launch_small_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);

}  // namespace styleforge::cuda
