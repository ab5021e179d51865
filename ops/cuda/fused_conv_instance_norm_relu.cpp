// fused_conv_instance_norm_relu on CUDA: our convolution (fused_conv.h) where it takes the call; else cuDNN's through
// ATen between our kernels for padding and norm.
#include "../fused_conv_instance_norm_relu_operators.h"

#include "convolution.h"
#include "fused_conv.h"
#include "fused_instance_norm.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_conv_instance_norm_relu";

Tensor convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, bool tf32) {
  return cudnn_convolution(input, weight, {}, stride, padding, tf32);
}

void launch_pad_tf32(const PadParams& params, const Tensor& like) {
  PadParams rounded = params;
  rounded.round_tf32 = true;
  launch_pad_cuda(rounded, like);
}

template <const char* kPath>
void norm(const InstanceNormCall& call) {
  launch_instance_norm_cuda(kOp, call, kPath);
}

constexpr char kPlain[] = "conv_instance_norm_relu:cuda:aten_conv";
constexpr char kPhases[] = "conv_instance_norm_relu:cuda:upsample_phases";
constexpr char kPaddedChannels[] = "conv_instance_norm_relu:cuda:padded_channels";

const ConvInstanceNormBackend kBackend{launch_pad_cuda, convolution, norm<kPlain>, false};
// Where the gather feeds a convolution that surely runs on TF32 tensor cores.
const ConvInstanceNormBackend kTf32Backend{launch_pad_tf32, convolution, norm<kPlain>, false};

// A 3x3 convolution after an upsampling as one 2x2 convolution of the input with the four phases as channels: see
// csrc/cuda/upsample/launch.h. Nothing where it does not apply.
std::optional<Tensor> run_upsample_phases(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const std::vector<int64_t> one{1, 1}, none{0, 0};
  if (!takes_upsample_phases(args, args.weight, plan)) return {};
  const Tensor phases = upsample_phase_weights(args.weight, plan.tf32);
  const bool zeros = plan.mode == PaddingMode::kZeros;
  const ConvInstanceNormBackend& backend = plan.tf32 ? kTf32Backend : kBackend;
  const Tensor padded = zeros ? to_contiguous(args.input, true)
                              : pad_upsample(backend, args.input, 1, PaddingMode::kReplicate, one, true);
  Tensor conv = convolution(padded, phases, one, zeros ? one : none, plan.tf32);
  if (!is_dense(conv, true)) conv = to_contiguous(conv, true);

  const Tensor output = empty_dense(args.input, plan.output_sizes, true, args.input.scalar_type());
  auto call = prepare_instance_norm(channels_last_in_place(args, plan), output, args.norm_weight, args.norm_bias,
                                    args.residual);
  call.params.input = conv.const_data_ptr();
  call.params.phase_width = static_cast<int32_t>(plan.output_sizes[3]);
  norm<kPhases>(call);
  return in_format(output, plan.channels_last);
}

// Pictures have three channels, for which cuDNN has no fast channels_last kernel: 16 bytes of channels it takes. The
// zeros are written by the pass that pads the picture anyway.
std::optional<Tensor> run_padded_channels(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const int64_t full = 16 / static_cast<int64_t>(args.input.element_size());
  const bool tensor_cores = args.input.scalar_type() != ScalarType::Double && (full == 8 || plan.tf32);
  const int64_t taps = args.weight.size(2) * args.weight.size(3);
  if (!tensor_cores || args.upsample != 1 || args.input.size(1) >= full || taps == 1) return {};
  const std::vector<int64_t> none{0, 0};
  const ConvInstanceNormBackend& backend = plan.tf32 ? kTf32Backend : kBackend;
  const Tensor padded = pad_upsample(backend, args.input, 1, plan.mode, plan.padding, true, full);
  const Tensor weight = pad_upsample(backend, args.weight, 1, PaddingMode::kZeros, none, true, full);
  Tensor conv = convolution(padded, weight, plan.stride, none, plan.tf32);
  if (!is_dense(conv, true)) conv = to_contiguous(conv, true);
  auto call =
      prepare_instance_norm(channels_last_in_place(args, plan), conv, args.norm_weight, args.norm_bias, args.residual);
  norm<kPaddedChannels>(call);
  return in_format(call.output, plan.channels_last);
}

OwnedHandle run(const ConvInstanceNormOptions& options, const ConvInstanceNormFacts& tensors) {
  const ConvInstanceNormPlan plan = plan_conv_instance_norm(options, tensors);
  if (plan.empty()) {
    const TensorFacts& like = tensors.input;
    return owned(empty_dense(like, plan.output_sizes, plan.channels_last, like.scalar_type()));
  }
  if (auto output = run_fused_conv(options, tensors, plan)) return std::move(*output);
  const Tensor input = tensor_of(tensors.input.handle), weight = tensor_of(tensors.weight.handle);
  const OptionalTensor bias = optional_tensor_of(tensors.bias), residual = optional_tensor_of(tensors.residual);
  const OptionalTensor norm_weight = optional_tensor_of(tensors.norm_weight);
  const OptionalTensor norm_bias = optional_tensor_of(tensors.norm_bias);
  const ConvInstanceNormArgs args{options, input, weight, bias, norm_weight, norm_bias, residual};
  if (auto output = run_picture_conv(args, plan)) return owned(*output);
  if (auto output = run_fused_picture_conv(args, plan)) return owned(*output);
  if (auto output = run_upsample_phases(args, plan)) return owned(*output);
  if (auto output = run_padded_channels(args, plan)) return owned(*output);
  const bool surely_tf32 = plan.tf32 && plan.channels_last && args.input.size(1) % 4 == 0;
  return owned(run_conv_instance_norm(surely_tf32 ? kTf32Backend : kBackend, args, plan));
}

Tensor pad_upsample_operator(const Tensor& input, const std::vector<int64_t>& padding, const Text& padding_mode,
                             int64_t upsample) {
  return checked_pad_upsample(kBackend, input, padding, padding_mode, upsample);
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_conv_instance_norm_relu", TORCH_BOX(&styleforge::conv_instance_norm_operator<styleforge::run>));
  m.impl("_pad_upsample", TORCH_BOX(&styleforge::pad_upsample_operator));
}
