// fused_ffn on CUDA. Where the matrix products are not our own (fused_ffn_gemm.h) they are cuBLAS's through ATen, and
// what lies around them is ours. In the backward so are always those that sum over the rows: no operand of theirs has
// neighbouring k in memory.
#include "../fused_ffn_operators.h"

#include "../../csrc/cuda/ffn/launch.h"
#include "fused_ffn_gemm.h"
#include "launch.h"
#include "matmul.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_ffn";

template <auto kLaunch, typename Params>
void launch_on_current_stream(const Params& params, const Tensor& like) {
  const CudaScope scope(like);
  check_cuda(kOp, kLaunch(params, scope.stream()));
}

const FfnBackend kBackend{
    "ffn:cuda:aten_matmul",
    "ffn_backward:cuda:aten_matmul",
    cublas_mm,
    cublas_addmm,
    launch_on_current_stream<cuda::launch_bias_activation>,
    launch_on_current_stream<cuda::launch_bias_activation_backward>,
    launch_on_current_stream<cuda::launch_bias_residual>,
    [](const Tensor&) {},
    true,
    run_small_ffn,
    run_ffn_gemm,
    run_gemm,
    run_activation_gradient,
    run_column_sums,
};

using Operators = FfnOperators<kBackend>;

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_ffn", TORCH_BOX(&styleforge::Operators::forward));
  m.impl("_fused_ffn_forward", TORCH_BOX(&styleforge::Operators::forward_for_backward));
  m.impl("_fused_ffn_backward", TORCH_BOX(&styleforge::Operators::backward));
}
