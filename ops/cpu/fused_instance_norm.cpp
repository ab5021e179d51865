// fused_instance_norm on the CPU.
#include "../fused_instance_norm.h"

#include "../../csrc/cpu/huge_pages.h"
#include "../../csrc/cpu/instance_norm.h"
#include "parallel.h"

namespace styleforge {
namespace {

constexpr const char* kPath = "instance_norm:cpu";

void advise_huge_pages(const Tensor& fresh) {
  cpu::advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

void launch(const InstanceNormParams& params, const TensorFacts& output) {
  cpu::advise_huge_pages(params.output,
                         output.numel() * static_cast<int64_t>(aoti_torch_dtype_element_size(output.dtype)));
  cpu::instance_norm_forward(params, parallel_for);
}

ReturnedHandle fused_instance_norm(AtenTensorHandle input, const OptionalHandle& weight, const OptionalHandle& bias,
                                   double eps, const Text& activation, double negative_slope,
                                   const OptionalHandle& residual) {
  const auto result = run_fused_instance_norm({input, weight, bias, residual}, eps, activation, negative_slope, launch);
  record_path(kPath);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> fused_instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, double eps,
                                                               const Text& activation, double negative_slope,
                                                               const OptionalTensor& residual) {
  auto call = prepare_fused_instance_norm(input, weight, bias, eps, activation, negative_slope, residual, true);
  record_path(kPath);
  if (!call.empty()) launch(call.params, call.output);
  return {call.output, *call.mean, *call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_instance_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const Text& activation, double negative_slope,
    const OptionalTensor& residual, const OptionalTensor& output) {
  auto call = prepare_instance_norm_backward(grad_output, input, mean, rstd, weight, bias, activation, negative_slope,
                                             residual, output);
  record_path("instance_norm_backward:cpu");
  if (!call.empty()) {
    advise_huge_pages(call.grad_input);
    if (call.params.grad_residual != nullptr) advise_huge_pages(call.grad_residual);
    cpu::instance_norm_backward(call.params, parallel_for);
  }
  return finish_instance_norm_backward(call);
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) {
  m.impl("fused_instance_norm", TORCH_BOX(&styleforge::fused_instance_norm));
  m.impl("_fused_instance_norm_forward", TORCH_BOX(&styleforge::fused_instance_norm_forward));
  m.impl("_fused_instance_norm_backward", TORCH_BOX(&styleforge::fused_instance_norm_backward));
}
