// fused_ffn on CUDA: the matrix products are cuBLAS's through ATen, what lies around them is ours. A path with products
// of our own (bias + activation and bias + residual in their epilogues) takes the call in run() before this one.
#include "../fused_ffn.h"

#include "../../csrc/cuda/ffn/launch.h"
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
    cublas_mm,
    cublas_addmm,
    launch_on_current_stream<cuda::launch_bias_activation>,
    launch_on_current_stream<cuda::launch_bias_activation_backward>,
    launch_on_current_stream<cuda::launch_bias_residual>,
    [](const Tensor&) {},
};

FfnResult run(const FfnArgs& args, bool keep_hidden) {
  const FfnPlan plan = plan_ffn(args);
  record_path("ffn:cuda:aten_matmul");
  return run_ffn(kBackend, args, plan, keep_hidden);
}

Tensor fused_ffn(const Tensor& input, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                 const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const Text& activation,
                 const OptionalTensor& residual, const Text& precision) {
  return run({input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision}, false).output;
}

std::tuple<Tensor, Tensor> fused_ffn_forward(const Tensor& input, const Tensor& fc1_weight,
                                             const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                             const OptionalTensor& fc2_bias, const Text& activation,
                                             const OptionalTensor& residual, const Text& precision) {
  const FfnResult result =
      run({input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision}, true);
  return {result.output, *result.hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_ffn_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& hidden, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const Text& activation, const Text&, bool needs_input,
    bool needs_fc1_weight, bool needs_fc1_bias, bool needs_fc2_weight, bool needs_fc2_bias) {
  record_path("ffn_backward:cuda:aten_matmul");
  return run_ffn_backward(kBackend, {grad_output, input, hidden, fc1_weight, fc1_bias, fc2_weight, activation,
                                     needs_input, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias});
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_ffn", TORCH_BOX(&styleforge::fused_ffn));
  m.impl("_fused_ffn_forward", TORCH_BOX(&styleforge::fused_ffn_forward));
  m.impl("_fused_ffn_backward", TORCH_BOX(&styleforge::fused_ffn_backward));
}
