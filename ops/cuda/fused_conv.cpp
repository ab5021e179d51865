#include "fused_conv.h"

#include "../../csrc/cuda/conv_instance_norm/launch.h"
#include "../../csrc/cuda/pad/launch.h"
#include "../../csrc/cuda/upsample/launch.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_conv_instance_norm_relu";

int narrow(int64_t value) { return static_cast<int>(value); }

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// Dense, channels_last and aligned for 16-byte accesses: the tensor itself or a copy.
Tensor channels_last_aligned(const Tensor& tensor) {
  const Tensor dense = is_dense(tensor, true) ? tensor : to_contiguous(tensor, true);
  return aligned(dense) ? dense : torch::stable::clone(dense);
}

cuda::ConvWeightsParams weights_of(const Tensor& weight, DType dtype) {
  cuda::ConvWeightsParams params;
  params.weight = weight.const_data_ptr();
  for (int d = 0; d < 4; ++d) params.stride[d] = weight.stride(d);
  params.out_channels = narrow(weight.size(0));
  params.in_channels = narrow(weight.size(1));
  params.kernel_h = narrow(weight.size(2));
  params.kernel_w = narrow(weight.size(3));
  params.dtype = dtype;
  return params;
}

// Writes the weights as the kernels read them, [rows, taps, channels], for kIeee split into two TF32 numbers.
void write_weights(const Tensor& weight, cuda::ConvWeightsParams& prepare, const std::vector<int64_t>& sizes,
                   cuda::ConvParams& params, bool split, const CudaScope& scope, std::vector<Tensor>& held) {
  held.push_back(empty_dense(weight, sizes, true, weight.scalar_type()));
  params.weight = prepare.output = held.back().mutable_data_ptr();
  if (split) {
    held.push_back(empty_dense(weight, sizes, true, weight.scalar_type()));
    params.weight_lo = prepare.output_lo = held.back().mutable_data_ptr();
  }
  check_cuda(kOp, cuda::launch_conv_weights(prepare, scope.stream()));
}

// The same, or the weights themselves where they lie so.
void prepare_weights(const Tensor& weight, cuda::ConvParams& params, const cuda::ConvSchedule& schedule,
                     const CudaScope& scope, std::vector<Tensor>& held) {
  const bool split = schedule.takes_split_weights(params);
  if (!split && is_dense(weight, true) && aligned(weight)) {
    params.weight = weight.const_data_ptr();
    return;
  }
  auto prepare = weights_of(weight, params.dtype);
  write_weights(weight, prepare, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, params, split, scope,
                held);
}

}  // namespace

void launch_pad_cuda(const PadParams& params, const Tensor& like) {
  const CudaScope scope(like);
  check_cuda(kOp, cuda::launch_pad_upsample(params, scope.stream()));
}

InstanceNormRequest channels_last_in_place(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  InstanceNormRequest request = norm_request(args, plan);
  request.output_channels_last = true;
  request.in_place = true;
  return request;
}

bool takes_upsample_phases(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const std::vector<int64_t> one{1, 1};
  return args.upsample == 2 && args.weight.size(2) == 3 && args.weight.size(3) == 3 && plan.stride == one &&
         plan.padding == one;
}

Tensor upsample_phase_weights(const Tensor& weight, bool round_tf32) {
  const auto dtype = weight.scalar_type();
  Tensor phases = empty_dense(weight, {4 * weight.size(0), weight.size(1), 2, 2}, true, dtype);
  cuda::PhaseWeightsParams params;
  params.weight = weight.const_data_ptr();
  params.output = phases.mutable_data_ptr();
  params.out_channels = weight.size(0);
  params.in_channels = weight.size(1);
  for (int d = 0; d < 4; ++d) params.stride[d] = weight.stride(d);
  params.dtype = kernel_dtype(kOp, "weight", dtype);
  params.round_tf32 = round_tf32;
  const CudaScope scope(weight);
  check_cuda(kOp, cuda::launch_phase_weights(params, scope.stream()));
  return phases;
}

namespace {

cuda::ConvPrecision precision_of(const Tensor& input, bool tf32) {
  if (input.scalar_type() != ScalarType::Float) return cuda::ConvPrecision::kNative;
  return tf32 ? cuda::ConvPrecision::kTF32 : cuda::ConvPrecision::kIeee;
}

// cuDNN runs layers of a few input or output channels in float32 also where TF32 is allowed; ours are as accurate.
cuda::ConvPrecision float32_where_cudnn_has_it(cuda::ConvPrecision precision) {
  return precision == cuda::ConvPrecision::kTF32 ? cuda::ConvPrecision::kIeee : precision;
}

// How the fused kernels run it, or nothing where they do not. The tensors' device is current.
std::optional<cuda::ConvSchedule> fused_schedule(const cuda::ConvParams& params) {
  cuda::ConvSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_conv(params, schedule, supported));
  return supported ? std::optional<cuda::ConvSchedule>(schedule) : std::nullopt;
}

// Sizes that both kinds of call share.
cuda::ConvParams output_params(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  cuda::ConvParams params;
  params.batch = narrow(args.input.size(0));
  params.out_channels = narrow(plan.output_sizes[1]);
  params.out_height = narrow(plan.output_sizes[2]);
  params.out_width = narrow(plan.output_sizes[3]);
  params.dtype = kernel_dtype(kOp, "input", args.input.scalar_type());
  params.precision = precision_of(args.input, plan.tf32);
  return params;
}

// A tensor of few channels in channels_last pixels of 16 bytes, padded.
Tensor pad_picture(const Tensor& picture, PaddingMode mode, const std::vector<int64_t>& padding,
                   const CudaScope& scope) {
  const bool channels_last = !is_dense(picture, false);
  const Tensor dense = channels_last && !is_dense(picture, true) ? to_contiguous(picture, true) : picture;
  const int64_t full = 16 / static_cast<int64_t>(picture.element_size());
  PadParams params = pad_params(picture, mode, padding, 1, full, channels_last);
  Tensor padded = empty_dense(picture, {params.batch, params.out_channels, params.out_height, params.out_width}, true,
                              picture.scalar_type());
  params.input = dense.const_data_ptr();
  params.output = padded.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_pad_picture(params, scope.stream()));
  return padded;
}

// Convolution and norm, with the input and the weights in place.
Tensor launch_fused_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan, cuda::ConvParams& params,
                         const cuda::ConvSchedule& schedule, const CudaScope& scope) {
  std::optional<Tensor> holder;
  params.moments = static_cast<float2*>(workspace(args.input, schedule.moments_bytes(params), holder));
  const Tensor output = empty_dense(args.input, plan.output_sizes, true, args.input.scalar_type());
  params.output = output.mutable_data_ptr();
  const auto call = prepare_instance_norm(channels_last_in_place(args, plan), output, args.norm_weight, args.norm_bias,
                                          args.residual);
  const char* name = "";
  check_cuda(kOp, cuda::launch_conv_instance_norm(params, schedule, call.params, scope.stream(), name));
  record_path("conv_instance_norm_relu:cuda", name);
  return in_format(output, plan.channels_last);
}

}  // namespace

std::optional<Tensor> run_fused_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const bool phases = takes_upsample_phases(args, plan);
  if (args.input.scalar_type() == ScalarType::Double || (args.upsample != 1 && !phases)) return {};
  cuda::ConvParams params = output_params(args, plan);
  params.in_channels = narrow(args.input.size(1));
  params.height = narrow(args.input.size(2));
  params.width = narrow(args.input.size(3));
  params.kernel_h = phases ? 2 : narrow(args.weight.size(2));
  params.kernel_w = phases ? 2 : narrow(args.weight.size(3));
  params.stride_h = narrow(plan.stride[0]);
  params.stride_w = narrow(plan.stride[1]);
  params.pad_top = narrow(plan.padding[0]);
  params.pad_left = narrow(plan.padding[1]);
  params.mode = phases && plan.mode == PaddingMode::kReflect ? PaddingMode::kReplicate : plan.mode;
  params.phases = phases ? 4 : 1;

  const CudaScope scope(args.input);
  const auto schedule = fused_schedule(params);
  if (!schedule) return {};

  std::vector<Tensor> held;
  held.push_back(channels_last_aligned(args.input));
  params.input = held.back().const_data_ptr();
  if (phases) {
    const Tensor phase_weights = upsample_phase_weights(args.weight, plan.tf32);
    held.push_back(phase_weights);
    prepare_weights(phase_weights, params, *schedule, scope, held);
  } else {
    prepare_weights(args.weight, params, *schedule, scope, held);
  }
  return launch_fused_conv(args, plan, params, *schedule, scope);
}

std::optional<Tensor> run_fused_picture_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const int64_t full = 16 / static_cast<int64_t>(args.input.element_size());
  const int64_t kernel_w = args.weight.size(3);
  if (args.input.scalar_type() == ScalarType::Double || args.upsample != 1 || args.input.size(1) >= full) return {};
  cuda::ConvParams params = output_params(args, plan);
  params.precision = float32_where_cudnn_has_it(params.precision);
  const int64_t padded_width = args.input.size(3) + 2 * plan.padding[1];
  params.in_channels = narrow(full * kernel_w);
  params.height = narrow(args.input.size(2) + 2 * plan.padding[0]);
  params.width = params.out_width;
  params.kernel_h = narrow(args.weight.size(2));
  params.stride_h = narrow(plan.stride[0]);
  params.pixel_stride = full * plan.stride[1];
  params.row_stride = full * padded_width;

  const CudaScope scope(args.input);
  const auto schedule = fused_schedule(params);
  if (!schedule) return {};

  std::vector<Tensor> held;
  held.push_back(pad_picture(args.input, plan.mode, plan.padding, scope));
  params.input = held.back().const_data_ptr();
  const Tensor weight = pad_picture(args.weight, PaddingMode::kZeros, {0, 0}, scope);
  held.push_back(weight);
  prepare_weights(weight, params, *schedule, scope, held);
  return launch_fused_conv(args, plan, params, *schedule, scope);
}

std::optional<Tensor> run_fused_reflect_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                             bool tf32) {
  if (input.scalar_type() == ScalarType::Double) return {};
  const int64_t full = 16 / static_cast<int64_t>(input.element_size());
  const bool channels_last = prefers_channels_last(input);
  cuda::SumColumnsParams sum;
  sum.batch = narrow(input.size(0));
  sum.channels = narrow(weight.size(0));
  sum.height = narrow(input.size(2));
  sum.width = narrow(input.size(3));
  sum.kernel_w = narrow(weight.size(3));
  sum.pitch = narrow((weight.size(0) * weight.size(3) + full - 1) / full * full);
  sum.channels_last = channels_last;
  sum.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  if (!cuda::takes_sum_columns(sum)) return {};

  cuda::ConvParams params;
  params.batch = sum.batch;
  params.in_channels = narrow(input.size(1));
  params.height = params.out_height = sum.height;
  params.width = sum.width;
  params.out_width = sum.width + sum.kernel_w - 1;
  params.out_channels = sum.pitch;
  params.kernel_h = narrow(weight.size(2));
  params.pad_top = params.kernel_h / 2;
  params.pad_left = sum.kernel_w / 2;
  params.mode = PaddingMode::kReflect;
  params.dtype = sum.dtype;
  params.norm_follows = false;
  params.precision = float32_where_cudnn_has_it(precision_of(input, tf32));
  const CudaScope scope(input);
  auto schedule = fused_schedule(params);
  if (!schedule) return {};

  std::vector<Tensor> held;
  held.push_back(channels_last_aligned(input));
  params.input = held.back().const_data_ptr();
  auto prepare = weights_of(weight, params.dtype);
  prepare.column_rows = sum.pitch;
  write_weights(weight, prepare, {sum.pitch, weight.size(1), weight.size(2), 1}, params,
                schedule->takes_split_weights(params), scope, held);
  const Tensor columns =
      empty_dense(input, {sum.batch, sum.pitch, sum.height, params.out_width}, true, input.scalar_type());
  params.output = columns.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_conv(params, *schedule, scope.stream()));

  const Tensor output =
      empty_dense(input, {sum.batch, sum.channels, sum.height, sum.width}, channels_last, input.scalar_type());
  if (bias) {
    held.push_back(to_contiguous(*bias, false));
    sum.bias = held.back().const_data_ptr();
  }
  sum.columns = columns.const_data_ptr();
  sum.output = output.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_sum_columns(sum, scope.stream()));
  schedule->resident = false;
  record_path("reflect_conv2d:cuda:columns", cuda::conv_name(params, *schedule));
  return output;
}

}  // namespace styleforge
