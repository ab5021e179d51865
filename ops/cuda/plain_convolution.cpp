// _convolution on CUDA: our convolution where it takes the call, else ATen's.
#include "plain_convolution.h"

#include <algorithm>

#include "../../csrc/cuda/common/launch.h"
#include "../../csrc/cuda/conv_instance_norm/launch.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_convolution";

int narrow(int64_t value) { return static_cast<int>(value); }

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

Tensor convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding) {
  if (input.dim() != 4) fail(kOp, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(kOp, "input", input.scalar_type());
  if (weight.dim() != 4 || weight.size(1) != input.size(1)) {
    fail(kOp, "weight must have shape [out_channels, ", input.size(1), ", kernel_height, kernel_width], got ",
         shape_text(weight));
  }
  check_like(kOp, "weight", weight, input, nullptr);
  if (stride.size() != 2 || stride[0] < 1 || stride[1] < 1) fail(kOp, "stride must be two integers >= 1");
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0) fail(kOp, "padding must be two integers >= 0");
  std::vector<int64_t> size(2);
  for (int d = 0; d < 2; ++d) {
    const int64_t room = input.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
    if (room < 0) {
      fail(kOp, "weight's kernel must not be larger than the padded input, got weight ", shape_text(weight),
           " for input ", shape_text(input));
    }
    size[d] = room / stride[d] + 1;
  }
  const bool channels_last = prefers_channels_last(input);
  OptionalTensor pixels;
  if (input.numel() > 0 && weight.numel() > 0) {
    if (const auto output = run_convolution(kOp, input, pixels, WeightView(weight), stride, padding, size)) {
      record_path("convolution:cuda:sm90");
      return in_format(*output, channels_last);
    }
  }
  record_path("convolution:cuda:aten");
  return in_format(aten_convolution(input, weight, stride, padding), channels_last);
}

}  // namespace

WeightView::WeightView(const Tensor& weight) : data(static_cast<const unsigned char*>(weight.const_data_ptr())) {
  for (int d = 0; d < 4; ++d) {
    sizes[d] = weight.size(d);
    strides[d] = weight.stride(d);
  }
  channels_last = is_dense(weight, true) && aligned(data);
}

WeightView WeightView::turned(size_t element) const {
  WeightView view = *this;
  const int64_t last = (sizes[2] - 1) * strides[2] + (sizes[3] - 1) * strides[3];
  view.data = data + static_cast<size_t>(last) * element;
  std::swap(view.sizes[0], view.sizes[1]);
  std::swap(view.strides[0], view.strides[1]);
  view.strides[2] = -strides[2];
  view.strides[3] = -strides[3];
  view.channels_last = false;
  return view;
}

Tensor channels_last_aligned(const Tensor& tensor) {
  const Tensor dense = is_dense(tensor, true) ? tensor : to_contiguous(tensor, true);
  return aligned(dense.const_data_ptr()) ? dense : torch::stable::clone(dense);
}

OptionalTensor run_convolution(const char* op, const Tensor& input, OptionalTensor& pixels, const WeightView& weight,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& output_size) {
  constexpr int64_t kMostStride = 65535, kMostPadding = 1 << 28;
  const auto type = input.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16) return {};
  if (std::min(padding[0], padding[1]) < 0 || std::max(padding[0], padding[1]) > kMostPadding ||
      std::max(stride[0], stride[1]) > kMostStride) {
    return {};
  }
  cuda::ConvParams params;
  params.batch = narrow(input.size(0));
  params.in_channels = narrow(input.size(1));
  params.height = narrow(input.size(2));
  params.width = narrow(input.size(3));
  params.out_channels = narrow(weight.sizes[0]);
  params.out_height = narrow(output_size[0]);
  params.out_width = narrow(output_size[1]);
  params.kernel_h = narrow(weight.sizes[2]);
  params.kernel_w = narrow(weight.sizes[3]);
  params.stride_h = narrow(stride[0]);
  params.stride_w = narrow(stride[1]);
  params.pad_top = narrow(padding[0]);
  params.pad_left = narrow(padding[1]);
  params.dtype = kernel_dtype(op, "input", type);
  params.norm_follows = false;
  const CudaScope scope(input);
  cuda::ConvSchedule schedule;
  bool supported = false;
  check_cuda(op, cuda::schedule_conv(params, schedule, supported));
  if (!supported || schedule.mma) return {};

  if (!pixels) pixels = channels_last_aligned(input);
  params.input = pixels->const_data_ptr();
  params.weight = weight.data;
  std::optional<Tensor> holder;
  if (!weight.channels_last) {
    cuda::ConvWeightsParams rewrite;
    rewrite.weight = weight.data;
    std::copy_n(weight.strides, 4, rewrite.stride);
    rewrite.out_channels = params.out_channels;
    rewrite.in_channels = params.in_channels;
    rewrite.kernel_h = params.kernel_h;
    rewrite.kernel_w = params.kernel_w;
    rewrite.dtype = params.dtype;
    const int64_t count = weight.sizes[0] * weight.sizes[1] * weight.sizes[2] * weight.sizes[3];
    rewrite.output = workspace(input, static_cast<size_t>(count) * cuda::size_of(params.dtype), holder);
    check_cuda(op, cuda::launch_conv_weights(rewrite, scope.stream()));
    params.weight = rewrite.output;
  }
  Tensor output = empty_dense(input, {input.size(0), weight.sizes[0], output_size[0], output_size[1]}, true, type);
  params.output = output.mutable_data_ptr();
  check_cuda(op, cuda::launch_conv(params, schedule, scope.stream()));
  return output;
}

}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_convolution", TORCH_BOX(&styleforge::convolution)); }
