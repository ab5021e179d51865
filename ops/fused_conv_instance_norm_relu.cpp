#include "fused_conv_instance_norm_relu.h"

#include <algorithm>

namespace styleforge {

namespace {

constexpr const char* kOp = "fused_conv_instance_norm_relu";

std::vector<int64_t> pair(const char* op, const char* name, const std::vector<int64_t>& values, int64_t least) {
  std::vector<int64_t> result = values.size() == 1 ? std::vector<int64_t>{values[0], values[0]} : values;
  if (result.size() != 2 || result[0] < least || result[1] < least) {
    std::ostringstream given;
    for (size_t i = 0; i < values.size(); ++i) given << (i ? ", " : "") << values[i];
    fail(op, name, " must be one or two integers >= ", least, ", got [", given.str(), "]");
  }
  return result;
}

}  // namespace

PaddingMode parse_padding_mode(const char* op, const std::string& name) {
  if (name == "zeros") return PaddingMode::kZeros;
  if (name == "reflect") return PaddingMode::kReflect;
  if (name == "replicate") return PaddingMode::kReplicate;
  fail(op, "padding_mode must be one of zeros, reflect, replicate, got \"", name, "\"");
}

ConvInstanceNormPlan plan_conv_instance_norm(const ConvInstanceNormOptions& options,
                                             const ConvInstanceNormFacts& tensors) {
  ConvInstanceNormPlan plan;
  const TensorFacts& input = tensors.input;
  const TensorFacts& weight = tensors.weight;
  if (input.dim != 4) fail(kOp, "input must have shape [N, C, H, W], got ", shape_text(input));
  const DType dtype = kernel_dtype(kOp, "input", input);
  const int64_t *in = input.sizes, *of = weight.sizes;
  if (weight.dim != 4 || of[1] != in[1]) {
    fail(kOp, "weight must have shape [out_channels, ", in[1], ", kernel_height, kernel_width], got ",
         shape_text(weight));
  }
  check_like(kOp, "weight", weight, input, nullptr);
  const int64_t out_channels = of[0];
  if (out_channels == 0 || in[1] == 0 || of[2] == 0 || of[3] == 0) {
    fail(kOp, "weight must have no empty dimension, got ", shape_text(weight));
  }
  if (tensors.bias.handle != nullptr) check_like(kOp, "bias", tensors.bias, input, {out_channels});
  plan.stride = pair(kOp, "stride", options.stride, 1);
  plan.padding = pair(kOp, "padding", options.padding, 0);
  plan.mode = parse_padding_mode(kOp, options.padding_mode.value);
  if (options.upsample != 1 && options.upsample != 2) fail(kOp, "upsample must be 1 or 2, got ", options.upsample);
  plan.activation = parse_activation(kOp, options.activation.value);
  plan.tf32 = parse_tf32(kOp, options.precision.value) && dtype == DType::kFloat32;
  const TensorFacts &norm_weight = tensors.norm_weight, &norm_bias = tensors.norm_bias;
  check_norm_params(kOp, "norm_weight", "norm_bias", input, norm_weight.handle != nullptr ? &norm_weight : nullptr,
                    norm_bias.handle != nullptr ? &norm_bias : nullptr, in[0], out_channels);

  plan.output_sizes = {in[0], out_channels, 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t size = in[2 + d] * options.upsample;
    if (plan.mode == PaddingMode::kReflect && plan.padding[d] >= size) {
      fail(kOp, "padding must be smaller than the (upsampled) input for padding_mode reflect, got padding ",
           plan.padding[d], " for input ", shape_text(input));
    }
    if (plan.mode == PaddingMode::kReplicate && plan.padding[d] > 0 && size == 0) {
      fail(kOp, "padding_mode replicate needs a non-empty input, got ", shape_text(input));
    }
    const int64_t room = size + 2 * plan.padding[d] - of[2 + d];
    if (room < 0) {
      fail(kOp, "weight's kernel [", of[2], ", ", of[3], "] must not be larger than the padded input, got input ",
           shape_text(input), " with padding [", plan.padding[0], ", ", plan.padding[1], "]");
    }
    plan.stride[d] = std::min(plan.stride[d], room + 1);  // beyond that there is one position whatever the stride
    plan.output_sizes[2 + d] = room / plan.stride[d] + 1;
  }
  plan.channels_last = prefers_channels_last(input);
  if (tensors.residual.handle != nullptr) check_like(kOp, "residual", tensors.residual, input, &plan.output_sizes);
  return plan;
}

InstanceNormRequest norm_request(const ConvInstanceNormOptions& options, const ConvInstanceNormPlan& plan) {
  InstanceNormRequest request;
  request.op = kOp;
  request.eps = options.eps;
  request.activation = plan.activation;
  request.negative_slope = options.negative_slope;
  request.output_channels_last = plan.channels_last;
  return request;
}

PadParams pad_params(const Tensor& input, PaddingMode mode, const std::vector<int64_t>& padding, int64_t upsample,
                     int64_t out_channels, bool channels_last) {
  PadParams params;
  params.batch = input.size(0);
  params.channels = input.size(1);
  params.out_channels = out_channels;
  params.height = input.size(2);
  params.width = input.size(3);
  params.out_height = params.height * upsample + 2 * padding[0];
  params.out_width = params.width * upsample + 2 * padding[1];
  params.pad_top = padding[0];
  params.pad_left = padding[1];
  params.upsample = static_cast<int>(upsample);
  params.mode = mode;
  params.element_size = static_cast<int>(input.element_size());
  params.channels_last = channels_last;
  return params;
}

Tensor pad_upsample(const ConvInstanceNormBackend& backend, const Tensor& input, int64_t upsample, PaddingMode mode,
                    const std::vector<int64_t>& padding, bool channels_last, int64_t out_channels) {
  out_channels = std::max(out_channels, input.size(1));
  if (upsample == 1 && padding[0] == 0 && padding[1] == 0 && out_channels == input.size(1)) return input;
  const Tensor dense = is_dense(input, channels_last) ? input : to_contiguous(input, channels_last);
  PadParams params = pad_params(input, mode, padding, upsample, out_channels, channels_last);
  Tensor padded = empty_dense(input, {params.batch, out_channels, params.out_height, params.out_width}, channels_last,
                              input.scalar_type());
  params.input = dense.const_data_ptr();
  params.output = padded.mutable_data_ptr();
  backend.pad_upsample(params, input);
  return padded;
}

Tensor checked_pad_upsample(const ConvInstanceNormBackend& backend, const Tensor& input,
                            const std::vector<int64_t>& padding, const Text& padding_mode, int64_t upsample) {
  constexpr const char* op = "_pad_upsample";
  if (input.dim() != 4) fail(op, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(op, "input", input.scalar_type());
  const auto sides = pair(op, "padding", padding, 0);
  const PaddingMode mode = parse_padding_mode(op, padding_mode.value);
  if (upsample != 1 && upsample != 2) fail(op, "upsample must be 1 or 2, got ", upsample);
  std::vector<int64_t> sizes{input.size(0), input.size(1), 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t size = input.size(2 + d) * upsample;
    if (mode == PaddingMode::kReflect && sides[d] >= size) {
      fail(op, "padding must be smaller than the (upsampled) input for padding_mode reflect, got padding ", sides[d],
           " for input ", shape_text(input));
    }
    if (mode == PaddingMode::kReplicate && sides[d] > 0 && size == 0) {
      fail(op, "padding_mode replicate needs a non-empty input, got ", shape_text(input));
    }
    sizes[2 + d] = size + 2 * sides[d];
  }
  const bool channels_last = prefers_channels_last(input);
  if (sizes[0] * sizes[1] * sizes[2] * sizes[3] == 0) {
    return empty_dense(input, sizes, channels_last, input.scalar_type());
  }
  const Tensor padded = pad_upsample(backend, input, upsample, mode, sides, channels_last);
  if (padded.get() != input.get()) return padded;
  Tensor copy = empty_dense(input, sizes, channels_last, input.scalar_type());  // a result is never the input
  return torch::stable::copy_(copy, input);
}

Tensor run_conv_instance_norm(const ConvInstanceNormBackend& backend, const ConvInstanceNormArgs& args,
                              const ConvInstanceNormPlan& plan) {
  if (plan.empty()) return empty_dense(args.input, plan.output_sizes, plan.channels_last, args.input.scalar_type());

  // Zero padding is left to the convolution; the other modes, and upsampling, are one gather before it.
  const bool zeros = plan.mode == PaddingMode::kZeros;
  const std::vector<int64_t> none{0, 0};
  const Tensor padded =
      pad_upsample(backend, args.input, args.upsample, plan.mode, zeros ? none : plan.padding, plan.channels_last);
  const Tensor conv = backend.convolution(padded, args.weight, plan.stride, zeros ? plan.padding : none, plan.tf32);

  InstanceNormRequest request = norm_request(args, plan);
  request.mixed_formats = backend.mixed_formats;
  request.in_place = has_dense_strides(conv, plan.channels_last);  // the convolution's result is ours to overwrite
  auto call = prepare_instance_norm(request, conv, args.norm_weight, args.norm_bias, args.residual);
  backend.instance_norm(call);
  return call.output;
}

}  // namespace styleforge
