// The launches behind launch.h, one for each path.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

constexpr int kMaxGemmStages = 8;
constexpr int kMaxGemmParts = 8;  // of k, the blocks of a cluster

cudaError_t launch_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);
cudaError_t launch_half_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);
cudaError_t launch_tf32_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);
cudaError_t launch_small_gemm_sm90(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);

}  // namespace styleforge::cuda
