// The feed-forward network on matrix products of our own (csrc/cuda/gemm), with everything else in their epilogues.
#pragma once

#include "../fused_ffn.h"

namespace styleforge {

// Nothing where the kernels do not take both products: dtype, shape, device, or cuBLAS is faster.
std::optional<FfnResult> run_ffn_gemm(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden);

}  // namespace styleforge
