#include "fused_conv.h"

#include <algorithm>

#include "../../csrc/cuda/common/launch.h"
#include "../../csrc/cuda/conv_instance_norm/launch.h"
#include "../../csrc/cuda/pad/launch.h"
#include "../../csrc/cuda/upsample/launch.h"
#include "launch.h"
#include "layout.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_conv_instance_norm_relu";

// The kernels' coordinates have 32 bits. Sizes are those of tensors in memory; padding may be anything, and a stride is
// at most the padded size.
bool takes_steps(const ConvInstanceNormPlan& plan) {
  constexpr int64_t kMostStride = 65535, kMostPadding = 1 << 28;
  return std::max(plan.stride[0], plan.stride[1]) <= kMostStride &&
         std::max(plan.padding[0], plan.padding[1]) <= kMostPadding;
}

// All that a call needs besides its result, in one allocation.
class Scratch {
 public:
  // Offset of `bytes` more.
  size_t add(size_t bytes) {
    const size_t offset = size_;
    size_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  void allocate(const TensorFacts& like) { memory_ = static_cast<unsigned char*>(workspace_.allocate(like, size_)); }
  void* at(size_t offset) const { return memory_ + offset; }

 private:
  size_t size_ = 0;
  unsigned char* memory_ = nullptr;
  Workspace workspace_;
};

// Weights as the kernels read them, [rows, taps, channels], split into two TF32 numbers or not: written to scratch,
// or the tensor itself where it lies so. `column_rows`: see ConvWeightsParams.
class Weights {
 public:
  Weights(const TensorFacts& weight, bool split, DType dtype, Scratch& scratch, int column_rows = 0) : split_(split) {
    params_.weight = const_data(weight);
    rewritten_ = split_ || column_rows > 0 || !is_dense(weight, true) || !cuda::aligned16(params_.weight);
    if (!rewritten_) return;
    const int64_t* sizes = weight.sizes;
    for (int d = 0; d < 4; ++d) params_.stride[d] = weight.strides[d];
    params_.out_channels = as_int(sizes[0]);
    params_.in_channels = as_int(sizes[1]);
    params_.kernel_h = as_int(sizes[2]);
    params_.kernel_w = as_int(sizes[3]);
    params_.column_rows = column_rows;
    params_.dtype = dtype;
    const int64_t rows = column_rows > 0 ? column_rows : sizes[0] * sizes[3];
    const size_t bytes = static_cast<size_t>(rows * sizes[1] * sizes[2]) * cuda::size_of(dtype);
    high_ = scratch.add(bytes);
    if (split_) low_ = scratch.add(bytes);
  }

  bool rewritten() const { return rewritten_; }

  // Once scratch is allocated: where the convolution finds them, and what the launch that writes them takes.
  const cuda::ConvWeightsParams& place(cuda::ConvParams& conv, const Scratch& scratch) {
    conv.weight = params_.weight;
    if (!rewritten_) return params_;
    conv.weight = params_.output = scratch.at(high_);
    if (split_) conv.weight_lo = params_.output_lo = scratch.at(low_);
    return params_;
  }

 private:
  cuda::ConvWeightsParams params_;
  bool split_, rewritten_;
  size_t high_ = 0, low_ = 0;
};

}  // namespace

void launch_pad_cuda(const PadParams& params, const Tensor& like) {
  const CudaScope scope(like);
  check_cuda(kOp, cuda::launch_pad_upsample(params, scope.stream()));
}

InstanceNormRequest channels_last_in_place(const ConvInstanceNormOptions& options, const ConvInstanceNormPlan& plan) {
  InstanceNormRequest request = norm_request(options, plan);
  request.output_channels_last = true;
  request.in_place = true;
  return request;
}

bool takes_upsample_phases(const ConvInstanceNormOptions& options, const TensorFacts& weight,
                           const ConvInstanceNormPlan& plan) {
  const auto ones = [](const std::vector<int64_t>& pair) { return pair[0] == 1 && pair[1] == 1; };
  return options.upsample == 2 && weight.sizes[2] == 3 && weight.sizes[3] == 3 && ones(plan.stride) &&
         ones(plan.padding);
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

cuda::ConvPrecision precision_of(DType dtype, bool tf32) {
  if (dtype != DType::kFloat32) return cuda::ConvPrecision::kNative;
  return tf32 ? cuda::ConvPrecision::kTF32 : cuda::ConvPrecision::kIeee;
}

// Layers of a few input or output channels that run by the kernels of all layers are float32-accurate also where TF32
// is allowed: cuDNN has some of them in float32, and where no norm follows what these kernels cut off does not cancel
// (7.7e-4 of the result, cuDNN's TF32 2.9e-4). The kernels of their own round to TF32.
cuda::ConvPrecision float32_where_cudnn_has_it(cuda::ConvPrecision precision) {
  return precision == cuda::ConvPrecision::kTF32 ? cuda::ConvPrecision::kIeee : precision;
}

// The result, or what the second of two passes reads.
OwnedHandle empty_pixels(const TensorFacts& input, const ConvInstanceNormPlan& plan, bool channels_last) {
  const auto& sizes = plan.output_sizes;
  const auto strides = dense_strides_of(sizes.data(), channels_last);
  return empty_strided(input, 4, sizes.data(), strides.data(), input.dtype);
}

// How the fused kernels run it, or nothing where they do not. The tensors' device is current.
std::optional<cuda::ConvSchedule> fused_schedule(const cuda::ConvParams& params) {
  cuda::ConvSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_conv(params, schedule, supported));
  return supported ? std::optional<cuda::ConvSchedule>(schedule) : std::nullopt;
}

// Sizes that both kinds of call share.
cuda::ConvParams output_params(const TensorFacts& input, const ConvInstanceNormPlan& plan) {
  cuda::ConvParams params;
  params.batch = as_int(input.sizes[0]);
  params.out_channels = as_int(plan.output_sizes[1]);
  params.out_height = as_int(plan.output_sizes[2]);
  params.out_width = as_int(plan.output_sizes[3]);
  params.dtype = kernel_dtype(kOp, "input", input);
  params.precision = precision_of(params.dtype, plan.tf32);
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

// `residual` where the kernels read vectors of it: a copy where it begins at an address that they can not take.
OptionalTensor aligned_residual(OptionalTensor residual) {
  if (residual && !cuda::aligned16(residual->const_data_ptr())) return torch::stable::clone(*residual);
  return residual;
}

// The norm over `output` in place; what has to be copied for it is in `call`.
const InstanceNormParams& prepare_norm(const InstanceNormRequest& request, const OwnedHandle& output,
                                       const ConvInstanceNormFacts& tensors, InstanceNormParams& params,
                                       std::optional<InstanceNormCall>& call) {
  const auto given = [](const TensorFacts& tensor) { return tensor.handle != nullptr ? &tensor : nullptr; };
  const TensorFacts of_output = facts_of(output);
  if (fill_dense(request, {of_output, given(tensors.norm_weight), given(tensors.norm_bias), given(tensors.residual)},
                 params) &&
      cuda::aligned16(params.residual)) {
    params.output = mutable_data(output);
    return params;
  }
  call = prepare_instance_norm(request, tensor_of(output.get()), optional_tensor_of(tensors.norm_weight),
                               optional_tensor_of(tensors.norm_bias),
                               aligned_residual(optional_tensor_of(tensors.residual)));
  return call->params;
}

// Convolution and norm, with the input, the weights and the moments in place.
OwnedHandle launch_fused_conv(const ConvInstanceNormOptions& options, const ConvInstanceNormFacts& tensors,
                              const ConvInstanceNormPlan& plan, cuda::ConvParams& params,
                              const cuda::ConvSchedule& schedule, const CudaScope& scope) {
  OwnedHandle output = empty_pixels(tensors.input, plan, plan.channels_last);
  InstanceNormRequest request = norm_request(options, plan);
  request.in_place = true;
  InstanceNormParams own;
  std::optional<InstanceNormCall> call;
  const InstanceNormParams& norm = prepare_norm(request, output, tensors, own, call);
  const char* name = nullptr;
  check_cuda(kOp, cuda::launch_conv_one_pass(params, schedule, norm, scope.stream(), name));
  if (name == nullptr) {
    OwnedHandle raw;
    if (!plan.channels_last) raw = empty_pixels(tensors.input, plan, true);
    params.output = mutable_data(plan.channels_last ? output : raw);
    check_cuda(kOp, cuda::launch_conv_two_passes(params, schedule, norm, scope.stream(), name));
  }
  record_path("conv_instance_norm_relu:cuda", name);
  return output;
}

}  // namespace

std::optional<OwnedHandle> run_fused_conv(const ConvInstanceNormOptions& options, const ConvInstanceNormFacts& tensors,
                                          const ConvInstanceNormPlan& plan) {
  const bool phases = takes_upsample_phases(options, tensors.weight, plan);
  cuda::ConvParams params = output_params(tensors.input, plan);
  if (params.dtype == DType::kFloat64 || (options.upsample != 1 && !phases) || !takes_steps(plan)) return {};
  params.in_channels = as_int(tensors.input.sizes[1]);
  params.height = as_int(tensors.input.sizes[2]);
  params.width = as_int(tensors.input.sizes[3]);
  params.kernel_h = phases ? 2 : as_int(tensors.weight.sizes[2]);
  params.kernel_w = phases ? 2 : as_int(tensors.weight.sizes[3]);
  params.stride_h = as_int(plan.stride[0]);
  params.stride_w = as_int(plan.stride[1]);
  params.pad_top = as_int(plan.padding[0]);
  params.pad_left = as_int(plan.padding[1]);
  params.mode = phases && plan.mode == PaddingMode::kReflect ? PaddingMode::kReplicate : plan.mode;
  params.phases = phases ? 4 : 1;

  const CudaScope scope(tensors.input);
  const auto schedule = fused_schedule(params);
  if (!schedule) return {};

  Scratch scratch;
  const size_t moments = scratch.add(schedule->moments_bytes(params));
  auto transpose = transposition(tensors.input, true);
  const bool as_it_lies = !transpose && is_dense(tensors.input, true) && cuda::aligned16(const_data(tensors.input));
  OptionalTensor copy;
  if (!transpose && !as_it_lies) copy = channels_last_aligned(tensor_of(tensors.input.handle));
  const size_t bytes = static_cast<size_t>(tensors.input.numel()) * cuda::size_of(params.dtype);
  const size_t transposed = transpose ? scratch.add(bytes) : 0;
  OptionalTensor of_phases;
  if (phases) of_phases = upsample_phase_weights(tensor_of(tensors.weight.handle), plan.tf32);
  const TensorFacts weight = phases ? facts_of(of_phases) : tensors.weight;
  Weights weights(weight, schedule->split_before, params.dtype, scratch);
  scratch.allocate(tensors.input);
  params.moments = static_cast<float2*>(scratch.at(moments));
  params.input = transpose ? scratch.at(transposed) : copy ? copy->const_data_ptr() : const_data(tensors.input);
  const cuda::ConvWeightsParams& rewrite = weights.place(params, scratch);
  if (transpose) transpose->output = scratch.at(transposed);
  if (transpose && weights.rewritten()) {
    check_cuda(kOp, cuda::launch_conv_operands(rewrite, *transpose, scope.stream()));
  } else if (transpose) {
    check_cuda(kOp, cuda::launch_transpose(*transpose, scope.stream()));
  } else if (weights.rewritten()) {
    check_cuda(kOp, cuda::launch_conv_weights(rewrite, scope.stream()));
  }
  return launch_fused_conv(options, tensors, plan, params, *schedule, scope);
}

std::optional<Tensor> run_picture_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  if (args.upsample != 1 || !takes_steps(plan)) return {};
  cuda::ConvParams params = output_params(args.input, plan);
  params.in_channels = as_int(args.input.size(1));
  params.height = as_int(args.input.size(2));
  params.width = as_int(args.input.size(3));
  params.kernel_h = as_int(args.weight.size(2));
  params.kernel_w = as_int(args.weight.size(3));
  params.stride_h = as_int(plan.stride[0]);
  params.stride_w = as_int(plan.stride[1]);
  params.pad_top = as_int(plan.padding[0]);
  params.pad_left = as_int(plan.padding[1]);
  params.mode = plan.mode;

  const CudaScope scope(args.input);
  cuda::ConvSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_picture_conv(params, schedule, supported));
  if (!supported) return {};

  cuda::PictureConv picture;
  for (int d = 0; d < 4; ++d) {
    picture.input_stride[d] = args.input.stride(d);
    picture.weight_stride[d] = args.weight.stride(d);
  }
  params.input = args.input.const_data_ptr();
  params.weight = args.weight.const_data_ptr();
  Scratch scratch;
  const size_t moments = scratch.add(schedule.moments_bytes(params));
  scratch.allocate(args.input);
  params.moments = static_cast<float2*>(scratch.at(moments));
  const auto dtype = args.input.scalar_type();
  const Tensor output = empty_dense(args.input, plan.output_sizes, plan.channels_last, dtype);
  const Tensor raw = plan.channels_last ? output : empty_dense(args.input, plan.output_sizes, true, dtype);
  params.output = raw.mutable_data_ptr();
  InstanceNormRequest request = norm_request(args, plan);
  request.in_place = true;
  const auto call =
      prepare_instance_norm(request, output, args.norm_weight, args.norm_bias, aligned_residual(args.residual));
  const char* name = nullptr;
  check_cuda(kOp, cuda::launch_picture_conv(params, picture, schedule, call.params, scope.stream(), name));
  record_path("conv_instance_norm_relu:cuda", name);
  return output;
}

std::optional<Tensor> run_fused_picture_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  const int64_t full = 16 / static_cast<int64_t>(args.input.element_size());
  const int64_t kernel_w = args.weight.size(3);
  if (args.input.scalar_type() == ScalarType::Double || args.upsample != 1 || args.input.size(1) >= full) return {};
  if (!takes_steps(plan)) return {};
  cuda::ConvParams params = output_params(args.input, plan);
  params.precision = float32_where_cudnn_has_it(params.precision);
  const int64_t padded_width = args.input.size(3) + 2 * plan.padding[1];
  params.in_channels = as_int(full * kernel_w);
  params.height = as_int(args.input.size(2) + 2 * plan.padding[0]);
  params.width = params.out_width;
  params.kernel_h = as_int(args.weight.size(2));
  params.stride_h = as_int(plan.stride[0]);
  params.pixel_stride = full * plan.stride[1];
  params.row_stride = full * padded_width;

  const CudaScope scope(args.input);
  const auto schedule = fused_schedule(params);
  if (!schedule) return {};

  const Tensor input = pad_picture(args.input, plan.mode, plan.padding, scope);
  params.input = input.const_data_ptr();
  const Tensor weight = pad_picture(args.weight, PaddingMode::kZeros, {0, 0}, scope);
  Scratch scratch;
  const size_t moments = scratch.add(schedule->moments_bytes(params));
  Weights weights(weight, schedule->split_before, params.dtype, scratch);
  scratch.allocate(args.input);
  params.moments = static_cast<float2*>(scratch.at(moments));
  const cuda::ConvWeightsParams& rewrite = weights.place(params, scratch);
  if (weights.rewritten()) check_cuda(kOp, cuda::launch_conv_weights(rewrite, scope.stream()));
  const ConvInstanceNormFacts tensors{args.input,
                                      weight,
                                      facts_of(args.bias),
                                      facts_of(args.norm_weight),
                                      facts_of(args.norm_bias),
                                      facts_of(args.residual)};
  return Tensor(launch_fused_conv(args, tensors, plan, params, *schedule, scope).release());
}

namespace {

// In one kernel, where that takes it.
std::optional<Tensor> run_columns_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                       bool tf32) {
  cuda::ColumnsConv params;
  params.batch = as_int(input.size(0));
  params.in_channels = as_int(input.size(1));
  params.out_channels = as_int(weight.size(0));
  params.height = as_int(input.size(2));
  params.width = as_int(input.size(3));
  params.kernel_h = as_int(weight.size(2));
  params.kernel_w = as_int(weight.size(3));
  params.channels_last = prefers_channels_last(input);
  params.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  params.precision = precision_of(params.dtype, tf32);
  for (int d = 0; d < 4; ++d) params.weight_stride[d] = weight.stride(d);
  const CudaScope scope(input);
  bool taken = false;
  check_cuda(kOp, cuda::takes_columns_conv(params, taken));
  if (!taken) return {};

  const Tensor pixels = channels_last_aligned(input);
  params.input = pixels.const_data_ptr();
  params.weight = weight.const_data_ptr();
  const Tensor output = empty_dense(input, {input.size(0), weight.size(0), input.size(2), input.size(3)},
                                    params.channels_last, input.scalar_type());
  params.output = output.mutable_data_ptr();
  const Tensor shift = bias ? to_contiguous(*bias, false) : output;
  if (bias) params.bias = shift.const_data_ptr();
  const char* name = nullptr;
  check_cuda(kOp, cuda::launch_columns_conv(params, scope.stream(), name));
  record_path("reflect_conv2d:cuda:columns", name);
  return output;
}

}  // namespace

std::optional<Tensor> run_fused_reflect_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                             bool tf32) {
  if (input.scalar_type() == ScalarType::Double) return {};
  const int64_t full = 16 / static_cast<int64_t>(input.element_size());
  const bool channels_last = prefers_channels_last(input);
  cuda::SumColumnsParams sum;
  sum.batch = as_int(input.size(0));
  sum.channels = as_int(weight.size(0));
  sum.height = as_int(input.size(2));
  sum.width = as_int(input.size(3));
  sum.kernel_w = as_int(weight.size(3));
  sum.pitch = as_int((weight.size(0) * weight.size(3) + full - 1) / full * full);
  sum.channels_last = channels_last;
  sum.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  if (!cuda::takes_sum_columns(sum)) return {};
  if (auto output = run_columns_conv(input, weight, bias, tf32)) return output;

  cuda::ConvParams params;
  params.batch = sum.batch;
  params.in_channels = as_int(input.size(1));
  params.height = params.out_height = sum.height;
  params.width = sum.width;
  params.out_width = sum.width + sum.kernel_w - 1;
  params.out_channels = sum.pitch;
  params.kernel_h = as_int(weight.size(2));
  params.pad_top = params.kernel_h / 2;
  params.pad_left = sum.kernel_w / 2;
  params.mode = PaddingMode::kReflect;
  params.dtype = sum.dtype;
  params.norm_follows = false;
  params.precision = float32_where_cudnn_has_it(precision_of(params.dtype, tf32));
  const CudaScope scope(input);
  auto schedule = fused_schedule(params);
  if (!schedule) return {};

  const Tensor pixels = channels_last_aligned(input);
  params.input = pixels.const_data_ptr();
  Scratch scratch;
  Weights weights(weight, schedule->split_before, params.dtype, scratch, sum.pitch);
  scratch.allocate(input);
  check_cuda(kOp, cuda::launch_conv_weights(weights.place(params, scratch), scope.stream()));
  const Tensor columns =
      empty_dense(input, {sum.batch, sum.pitch, sum.height, params.out_width}, true, input.scalar_type());
  params.output = columns.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_conv(params, *schedule, scope.stream()));

  const Tensor output =
      empty_dense(input, {sum.batch, sum.channels, sum.height, sum.width}, channels_last, input.scalar_type());
  const Tensor shift = bias ? to_contiguous(*bias, false) : columns;
  if (bias) sum.bias = shift.const_data_ptr();
  sum.columns = columns.const_data_ptr();
  sum.output = output.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_sum_columns(sum, scope.stream()));
  schedule->resident = false;
  record_path("reflect_conv2d:cuda:columns", cuda::conv_name(params, *schedule));
  return output;
}

}  // namespace styleforge
