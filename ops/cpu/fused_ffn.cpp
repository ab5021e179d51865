// fused_ffn on the CPU: the matrix products are ATen's (oneDNN), what lies around them is ours.
#include "../fused_ffn.h"

#include "../../csrc/cpu/ffn.h"
#include "../../csrc/cpu/huge_pages.h"
#include "matmul.h"
#include "parallel.h"

namespace styleforge {
namespace {

const FfnBackend kBackend{
    cpu_mm,
    cpu_addmm,
    [](const BiasActivationParams& params, const Tensor&) { cpu::bias_activation(params, parallel_for); },
    [](const BiasActivationBackwardParams& params, const Tensor&) {
      cpu::bias_activation_backward(params, parallel_for);
    },
    [](const BiasResidualParams& params, const Tensor&) { cpu::bias_residual(params, parallel_for); },
    [](const Tensor& tensor) {
      cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    },
};

FfnResult run(const FfnArgs& args, bool keep_hidden) {
  const FfnPlan plan = plan_ffn(args);
  record_path("ffn:cpu:aten_matmul");
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
  record_path("ffn_backward:cpu:aten_matmul");
  return run_ffn_backward(kBackend, {grad_output, input, hidden, fc1_weight, fc1_bias, fc2_weight, activation,
                                     needs_input, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias});
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) {
  m.impl("fused_ffn", TORCH_BOX(&styleforge::fused_ffn));
  m.impl("_fused_ffn_forward", TORCH_BOX(&styleforge::fused_ffn_forward));
  m.impl("_fused_ffn_backward", TORCH_BOX(&styleforge::fused_ffn_backward));
}
