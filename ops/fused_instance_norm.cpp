#include "fused_instance_norm.h"

namespace styleforge {

namespace {

ScalarType stats_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A dense tensor of the wanted format with the same values, kept alive by `held`.
const void* dense_data(const Tensor& tensor, bool channels_last, std::vector<Tensor>& held) {
  held.push_back(is_dense(tensor, channels_last) ? tensor : to_contiguous(tensor, channels_last));
  return held.back().const_data_ptr();
}

// The same of a vector or a matrix; null of nothing.
const void* param_data(const OptionalTensor& param, std::vector<Tensor>& held) {
  if (!param) return nullptr;
  held.push_back(param->is_contiguous() ? *param : to_contiguous(*param, false));
  return held.back().const_data_ptr();
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

void fill_shape(InstanceNormParams& params, const std::vector<int64_t>& sizes) {
  params.batch = sizes[0];
  params.channels = sizes[1];
  params.pixels = sizes[2] * sizes[3];
}

void fill_weight(InstanceNormParams& params, const char* op, const OptionalTensor& weight, const OptionalTensor& bias,
                 std::vector<Tensor>& held) {
  params.weight = param_data(weight, held);
  params.bias = param_data(bias, held);
  const OptionalTensor& param = weight ? weight : bias;
  params.param_batch_stride = param && param->dim() == 2 ? params.channels : 0;
  params.param_dtype = param ? kernel_dtype(op, "weight", param->scalar_type()) : DType::kFloat32;
}

void fill_request(InstanceNormParams& params, const InstanceNormRequest& request) {
  params.eps = request.eps;
  params.activation = request.activation;
  params.negative_slope = request.negative_slope;
  params.output_channels_last = request.output_channels_last;
}

InstanceNormRequest check_fused_instance_norm(const InstanceNormTensors& tensors, double eps, const Text& activation,
                                              double negative_slope) {
  const TensorFacts& input = tensors.input;
  InstanceNormRequest request;
  if (input.dim != 4) fail(request.op, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(request.op, "input", input);
  request.activation = parse_activation(request.op, activation.value);
  check_norm_params(request.op, "weight", "bias", input, tensors.weight, tensors.bias, input.sizes[0], input.sizes[1]);
  if (tensors.residual != nullptr) check_alike(request.op, "residual", *tensors.residual, input);
  request.eps = eps;
  request.negative_slope = negative_slope;
  request.output_channels_last = prefers_channels_last(input);
  return request;
}

}  // namespace

bool fill_dense(const InstanceNormRequest& request, const InstanceNormTensors& tensors, InstanceNormParams& params) {
  const TensorFacts& input = tensors.input;
  if (!is_dense(input, request.output_channels_last)) return false;
  if (tensors.residual != nullptr && !is_dense(*tensors.residual, request.output_channels_last)) return false;
  for (const TensorFacts* param : {tensors.weight, tensors.bias}) {
    if (param != nullptr && !is_contiguous(*param)) return false;
  }
  fill_request(params, request);
  params.channels_last = request.output_channels_last;
  params.batch = input.sizes[0];
  params.channels = input.sizes[1];
  params.pixels = input.sizes[2] * input.sizes[3];
  params.dtype = kernel_dtype(request.op, "input", input);
  params.input = const_data(input);
  if (tensors.residual != nullptr) params.residual = const_data(*tensors.residual);
  if (tensors.weight != nullptr) params.weight = const_data(*tensors.weight);
  if (tensors.bias != nullptr) params.bias = const_data(*tensors.bias);
  const TensorFacts* param = tensors.weight != nullptr ? tensors.weight : tensors.bias;
  if (param != nullptr) {
    params.param_batch_stride = param->dim == 2 ? params.channels : 0;
    params.param_dtype = kernel_dtype(request.op, "weight", *param);
  }
  return true;
}

ReturnedHandle run_fused_instance_norm(const InstanceNormHandles& handles, double eps, const Text& activation,
                                       double negative_slope, InstanceNormLaunch launch) {
  const OwnedHandle input(handles.input), weight = owned(handles.weight), bias = owned(handles.bias);
  const OwnedHandle residual = owned(handles.residual);
  const TensorFacts of_input = facts_of(input), of_weight = facts_of(weight), of_bias = facts_of(bias);
  const TensorFacts of_residual = facts_of(residual);
  const InstanceNormTensors tensors{of_input, weight ? &of_weight : nullptr, bias ? &of_bias : nullptr,
                                    residual ? &of_residual : nullptr};
  const auto request = check_fused_instance_norm(tensors, eps, activation, negative_slope);
  InstanceNormParams params;
  if (!fill_dense(request, tensors, params)) {
    const auto call = prepare_instance_norm(request, tensor_of(input.get()), optional_tensor_of(of_weight),
                                            optional_tensor_of(of_bias), optional_tensor_of(of_residual));
    if (!call.empty()) launch(call.params, call.output);
    return returned(call.output);
  }
  const auto strides = dense_strides_of(of_input, request.output_channels_last);
  OwnedHandle output = empty_strided(of_input, 4, of_input.sizes, strides.data(), of_input.dtype);
  if (params.batch * params.channels * params.pixels > 0) {
    params.output = mutable_data(output);
    launch(params, facts_of(output));
  }
  return {output.release()};
}

InstanceNormCall prepare_instance_norm(const InstanceNormRequest& request, const Tensor& input,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual) {
  InstanceNormCall call;
  call.held.reserve(4);
  auto& params = call.params;
  const auto sizes = sizes_of(input);
  fill_shape(params, sizes);
  params.dtype = kernel_dtype(request.op, "input", input.scalar_type());
  fill_request(params, request);
  const TensorFacts facts(input);
  params.channels_last = is_dense(facts, true) && !is_dense(facts, false);
  if (!request.mixed_formats || !is_dense(facts, params.channels_last)) {
    params.channels_last = request.output_channels_last;
  }
  params.input = dense_data(input, params.channels_last, call.held);
  if (residual) params.residual = dense_data(*residual, params.output_channels_last, call.held);
  fill_weight(params, request.op, weight, bias, call.held);

  call.output = request.in_place ? input : empty_dense(input, sizes, params.output_channels_last, input.scalar_type());
  params.output = call.output.mutable_data_ptr();
  if (request.stats) {
    const std::vector<int64_t> stat_sizes{params.batch, params.channels};
    call.mean = empty_dense(input, stat_sizes, false, stats_dtype(input));
    call.rstd = empty_dense(input, stat_sizes, false, stats_dtype(input));
    params.mean = call.mean->mutable_data_ptr();
    params.rstd = call.rstd->mutable_data_ptr();
  }
  return call;
}

InstanceNormCall prepare_fused_instance_norm(const Tensor& input, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps, const Text& activation,
                                             double negative_slope, const OptionalTensor& residual, bool stats) {
  const TensorFacts of_input(input), of_weight = facts_of(weight), of_bias = facts_of(bias);
  const TensorFacts of_residual = facts_of(residual);
  auto request = check_fused_instance_norm(
      {of_input, weight ? &of_weight : nullptr, bias ? &of_bias : nullptr, residual ? &of_residual : nullptr}, eps,
      activation, negative_slope);
  request.stats = stats;
  return prepare_instance_norm(request, input, weight, bias, residual);
}

InstanceNormBackwardCall prepare_instance_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const Text& activation, double negative_slope,
                                                        const OptionalTensor& residual, const OptionalTensor& output) {
  const char* op = "_fused_instance_norm_backward";
  if (input.dim() != 4) fail(op, "input must have shape [N, C, H, W], got ", shape_text(input));
  const auto sizes = sizes_of(input);
  check_like(op, "grad_output", grad_output, input, &sizes);
  if (residual) check_like(op, "residual", *residual, input, &sizes);
  if (output) check_like(op, "output", *output, input, &sizes);
  check_with_dtype(op, "mean", mean, input, stats_dtype(input), {sizes[0], sizes[1]});
  check_with_dtype(op, "rstd", rstd, input, stats_dtype(input), {sizes[0], sizes[1]});
  check_norm_params(op, "weight", "bias", input, weight, bias, sizes[0], sizes[1]);

  InstanceNormBackwardCall call;
  auto& params = call.params;
  fill_shape(params, sizes);
  params.dtype = kernel_dtype(op, "input", input.scalar_type());
  params.activation = parse_activation(op, activation.value);
  params.negative_slope = negative_slope;
  params.channels_last = params.output_channels_last = prefers_channels_last(input);
  const bool channels_last = params.channels_last;
  params.input = dense_data(input, channels_last, call.held);
  params.grad_output = dense_data(grad_output, channels_last, call.held);
  if (residual) params.residual = dense_data(*residual, channels_last, call.held);
  if (output) params.saved_output = dense_data(*output, channels_last, call.held);
  params.mean = const_cast<void*>(param_data(mean, call.held));  // under vmap the same for all samples: expanded
  params.rstd = const_cast<void*>(param_data(rstd, call.held));
  fill_weight(params, op, weight, bias, call.held);

  call.grad_input = empty_dense(input, sizes, channels_last, input.scalar_type());
  params.grad_input = call.grad_input.mutable_data_ptr();
  // The gradient of the residual is the gradient before the norm; without an activation that is grad_output itself.
  const bool wants_residual = (residual || output) && params.activation != Activation::kNone;
  call.grad_residual = wants_residual ? empty_dense(input, sizes, channels_last, input.scalar_type())
                                      : empty_dense(input, {0}, false, input.scalar_type());
  if (wants_residual) params.grad_residual = call.grad_residual.mutable_data_ptr();
  const std::vector<int64_t> stat_sizes{params.batch, params.channels};
  call.grad_weight = empty_dense(input, stat_sizes, false, stats_dtype(input));
  call.grad_bias = empty_dense(input, stat_sizes, false, stats_dtype(input));
  params.grad_weight = call.grad_weight.mutable_data_ptr();
  params.grad_bias = call.grad_bias.mutable_data_ptr();

  const OptionalTensor& param = weight ? weight : bias;
  call.has_weight = weight.has_value();
  call.has_bias = bias.has_value();
  call.sum_over_batch = param && param->dim() == 1;
  if (param) call.param_dtype = param->scalar_type();
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> finish_instance_norm_backward(InstanceNormBackwardCall& call) {
  const auto finish = [&](bool wanted, const Tensor& sums) {
    if (!wanted) return empty_dense(call.grad_input, {0}, false, call.param_dtype);
    Tensor grad = sums;
    if (call.sum_over_batch) {
      const int64_t dim = 0;
      grad = torch::stable::sum(grad, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
    }
    return grad.scalar_type() == call.param_dtype ? grad : to_dtype(grad, call.param_dtype);
  };
  if (call.empty()) {  // nothing ran: the sums over nothing are zero
    torch::stable::zero_(call.grad_weight);
    torch::stable::zero_(call.grad_bias);
  }
  Tensor grad_weight = finish(call.has_weight, call.grad_weight);
  Tensor grad_bias = finish(call.has_bias, call.grad_bias);
  return {call.grad_input, grad_weight, grad_bias, call.grad_residual};
}

}  // namespace styleforge
