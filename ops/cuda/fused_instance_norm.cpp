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
  if (error == cudaErrorInvalidClusterSize || error == cudaErrorCooperativeLaunchTooLarge ||
      error == cudaErrorNotSupported) {
    // A part of a GPU (MPS, a green context) need not have a place for a cluster that the whole GPU has, or for all
    // blocks at once.
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

cudaError_t launch_backward_once(const InstanceNormBackwardCall& call, const CudaScope& scope, bool resident,
                                 const char*& path) {
  cuda::InstanceNormSchedule schedule;
  check_cuda(kOp, cuda::schedule_instance_norm_backward(call.params, schedule, resident));
  std::optional<Tensor> holder;
  void* memory = workspace(call.grad_input, schedule.workspace_bytes, holder);
  path = schedule.name;
  return cuda::launch_instance_norm_backward(call.params, schedule, memory, scope.stream());
}

// The results, weight's and bias's gradients made of the samples' sums: those as they are where that is what is asked,
// else by one launch.
std::tuple<Tensor, Tensor, Tensor, Tensor> with_parameter_gradients(const InstanceNormBackwardCall& call,
                                                                    const CudaScope& scope) {
  const auto& params = call.params;
  const bool summed = call.sum_over_batch;
  const std::vector<int64_t> sizes =
      summed ? std::vector<int64_t>{params.channels} : std::vector<int64_t>{params.batch, params.channels};
  const bool as_they_are = call.param_dtype == call.grad_weight.scalar_type() && (!summed || params.batch == 1);
  cuda::ParameterGradients gradients;
  const auto result = [&](bool wanted, const Tensor& sums, const void*& from, void*& to) {
    if (!wanted) return empty_dense(call.grad_input, {0}, false, call.param_dtype);
    if (as_they_are) return summed ? strided_view(sums, sizes, {1}) : sums;
    const Tensor made = empty_dense(sums, sizes, false, call.param_dtype);
    from = sums.const_data_ptr();
    to = made.mutable_data_ptr();
    return made;
  };
  const Tensor weight = result(call.has_weight, call.grad_weight, gradients.weight_sums, gradients.weight);
  const Tensor bias = result(call.has_bias, call.grad_bias, gradients.bias_sums, gradients.bias);
  if (gradients.weight != nullptr || gradients.bias != nullptr) {
    gradients.samples = summed ? params.batch : 1;
    gradients.count = (summed ? 1 : params.batch) * params.channels;
    gradients.dtype = kernel_dtype(kOp, "weight", call.param_dtype);
    gradients.sums_in_double = params.dtype == DType::kFloat64;
    check_cuda(kOp, cuda::launch_parameter_gradients(gradients, scope.stream()));
  }
  return {call.grad_input, weight, bias, call.grad_residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_instance_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const Text& activation, double negative_slope,
    const OptionalTensor& residual, const OptionalTensor& output) {
  auto call = prepare_instance_norm_backward(grad_output, input, mean, rstd, weight, bias, activation, negative_slope,
                                             residual, output);
  if (call.empty()) return finish_instance_norm_backward(call);
  const CudaScope scope(input);
  const char* path = nullptr;
  cudaError_t error = launch_backward_once(call, scope, true, path);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    // A part of a GPU (MPS, a green context) has fewer multiprocessors than the whole one's facts say.
    static_cast<void>(cudaGetLastError());
    error = launch_backward_once(call, scope, false, path);
  }
  check_cuda(kOp, error);
  record_path(path);
  return with_parameter_gradients(call, scope);
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
