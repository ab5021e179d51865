// fused_instance_norm on CUDA.
#include "fused_instance_norm.h"

#include "../../csrc/cuda/instance_norm/launch.h"
#include "launch.h"

namespace styleforge {

void launch_instance_norm_cuda(const char* op, const InstanceNormCall& call, const char* before) {
  if (call.empty()) return;
  const CudaScope scope(call.output);
  cuda::InstanceNormSchedule schedule;
  check_cuda(op, cuda::schedule_instance_norm(call.params, schedule));
  std::optional<Tensor> holder;
  void* memory = workspace(call.output, schedule.workspace_bytes, holder);
  check_cuda(op, cuda::launch_instance_norm(call.params, schedule, memory, scope.stream()));
  if (before == nullptr) {
    record_path(schedule.name);
  } else {
    record_path(before, schedule.name);
  }
}

namespace {

constexpr const char* kOp = "fused_instance_norm";

Tensor fused_instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                           const Text& activation, double negative_slope, const OptionalTensor& residual) {
  auto call = prepare_fused_instance_norm(input, weight, bias, eps, activation, negative_slope, residual, false);
  launch_instance_norm_cuda(kOp, call);
  return call.output;
}

std::tuple<Tensor, Tensor, Tensor> fused_instance_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                                               const OptionalTensor& bias, double eps,
                                                               const Text& activation, double negative_slope,
                                                               const OptionalTensor& residual) {
  auto call = prepare_fused_instance_norm(input, weight, bias, eps, activation, negative_slope, residual, true);
  launch_instance_norm_cuda(kOp, call);
  return {call.output, *call.mean, *call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_instance_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const Text& activation, double negative_slope,
    const OptionalTensor& residual, const OptionalTensor& output) {
  auto call = prepare_instance_norm_backward(grad_output, input, mean, rstd, weight, bias, activation, negative_slope,
                                             residual, output);
  if (!call.empty()) {
    const CudaScope scope(input);
    cuda::InstanceNormSchedule schedule;
    check_cuda(kOp, cuda::schedule_instance_norm_backward(call.params, schedule));
    std::optional<Tensor> holder;
    void* memory = workspace(input, schedule.workspace_bytes, holder);
    check_cuda(kOp, cuda::launch_instance_norm_backward(call.params, schedule, memory, scope.stream()));
    record_path(schedule.name);
  }
  return finish_instance_norm_backward(call);
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_instance_norm", TORCH_BOX(&styleforge::fused_instance_norm));
  m.impl("_fused_instance_norm_forward", TORCH_BOX(&styleforge::fused_instance_norm_forward));
  m.impl("_fused_instance_norm_backward", TORCH_BOX(&styleforge::fused_instance_norm_backward));
}
