// fused_instance_norm on CUDA.
#include "fused_instance_norm.h"

#include "../../csrc/cuda/instance_norm/launch.h"
#include "launch.h"

namespace styleforge {

namespace {

constexpr const char* kOp = "fused_instance_norm";

// `like`: a tensor of the call's device.
cudaError_t launch_once(const char* op, const InstanceNormParams& params, const TensorFacts& like,
                        const CudaScope& scope, bool clusters, const char*& path) {
  cuda::InstanceNormSchedule schedule;
  check_cuda(op, cuda::schedule_instance_norm(params, schedule, clusters));
  Workspace workspace;
  void* memory = workspace.allocate(like, schedule.workspace_bytes);
  path = schedule.name;
  return cuda::launch_instance_norm(params, schedule, memory, scope.stream());
}

void launch(const char* op, const InstanceNormParams& params, const TensorFacts& like, const char* before) {
  const CudaScope scope(like.device_index);
  const char* path = nullptr;
  cudaError_t error = launch_once(op, params, like, scope, true, path);
  if (error == cudaErrorInvalidClusterSize) {
    // A part of a GPU (MPS, a green context) need not have a place for a cluster that the whole GPU has.
    static_cast<void>(cudaGetLastError());
    error = launch_once(op, params, like, scope, false, path);
  }
  check_cuda(op, error);
  if (before == nullptr) {
    record_path(path);
  } else {
    record_path(before, path);
  }
}

ReturnedHandle fused_instance_norm(AtenTensorHandle input, const OptionalHandle& weight, const OptionalHandle& bias,
                                   double eps, const Text& activation, double negative_slope,
                                   const OptionalHandle& residual) {
  return run_fused_instance_norm(
      {input, weight, bias, residual}, eps, activation, negative_slope,
      [](const InstanceNormParams& params, const TensorFacts& output) { launch(kOp, params, output, nullptr); });
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

void launch_instance_norm_cuda(const char* op, const InstanceNormCall& call, const char* before) {
  if (!call.empty()) launch(op, call.params, call.output, before);
}

}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_instance_norm", TORCH_BOX(&styleforge::fused_instance_norm));
  m.impl("_fused_instance_norm_forward", TORCH_BOX(&styleforge::fused_instance_norm_forward));
  m.impl("_fused_instance_norm_backward", TORCH_BOX(&styleforge::fused_instance_norm_backward));
}
