// fused_instance_norm on the CPU.
#include "../fused_instance_norm.h"

#include "../../csrc/cpu/huge_pages.h"
#include "../../csrc/cpu/instance_norm.h"
#include "parallel.h"

namespace styleforge {
namespace {

void advise_huge_pages(const Tensor& fresh) {
  cpu::advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

void run(const InstanceNormCall& call) {
  record_path("instance_norm:cpu");
  if (call.empty()) return;
  advise_huge_pages(call.output);
  cpu::instance_norm_forward(call.params, parallel_for);
}

Tensor fused_instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           const Text& activation, double negative_slope, const OptionalTensor& residual) {
  auto call = prepare_fused_instance_norm(input, weight, bias, eps, activation, negative_slope, residual, false);
  run(call);
  return call.output;
}

std::tuple<Tensor, Tensor, Tensor> fused_instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, double eps,
                                                               const Text& activation, double negative_slope,
                                                               const OptionalTensor& residual) {
  auto call = prepare_fused_instance_norm(input, weight, bias, eps, activation, negative_slope, residual, true);
  run(call);
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
