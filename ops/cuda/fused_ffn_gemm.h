// The feed-forward network on matrix products of our own (csrc/cuda/gemm), with everything else in their epilogues.
#pragma once

#include "../fused_ffn.h"

namespace styleforge {

// In one launch; nothing where the kernels for that do not take it, or more launches are faster.
std::optional<FfnResult> run_small_ffn(const FfnFacts& args, const FfnPlan& plan, bool keep_hidden);

// Nothing where the kernels do not take both products: dtype, shape, device, or cuBLAS is faster.
std::optional<FfnResult> run_ffn_gemm(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden);

// out = a b, a [m, k] with neighbouring k in memory, b [k, n] of any strides, out [m, n] dense; for the backward. Does
// nothing and says false where the kernels do not take it.
bool run_gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool tf32);

// out = rows weight^T + bias, weight [n, k] of any strides, out dense; as run_gemm, and no path is recorded.
bool run_linear(const Tensor& out, const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, bool tf32);

// See FfnBackend; of 16-bit numbers.
bool run_activation_gradient(const FfnActivationGradient& args);
bool run_column_sums(const Tensor& out, const Tensor& matrix);

}  // namespace styleforge
