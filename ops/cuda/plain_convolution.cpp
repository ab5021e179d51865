// _convolution on CUDA: our convolution where it takes the call, else ATen's.
#include "plain_convolution.h"

#include <algorithm>

#include "../../csrc/cuda/common/launch.h"
#include "fused_conv.h"
#include "launch.h"
#include "layout.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_convolution";

Tensor convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const Text& padding_mode) {
  const ConvolutionArguments args{input, weight, stride, padding, parse_padding_mode(kOp, padding_mode.value)};
  const std::vector<int64_t> size = args.check(kOp);
  const bool channels_last = prefers_channels_last(input);
  if (auto own = OwnConvolution::take(kOp, input, weight, false, stride, padding, args.mode, size)) {
    record_path("convolution:cuda:sm90");
    return in_format(own->run(channels_last_aligned(input)), channels_last);
  }
  const bool zeros = args.mode == PaddingMode::kZeros;
  const Tensor wide = zeros ? input : padded(input, padding, args.mode);
  record_path("convolution:cuda:aten");
  const std::vector<int64_t> none{0, 0};
  return in_format(aten_convolution(wide, weight, stride, zeros ? padding : none), channels_last);
}

}  // namespace

std::vector<int64_t> ConvolutionArguments::check(const char* op) const {
  if (input.dim() != 4) fail(op, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(op, "input", input.scalar_type());
  if (weight.dim() != 4 || weight.size(1) != input.size(1)) {
    fail(op, "weight must have shape [out_channels, ", input.size(1), ", kernel_height, kernel_width], got ",
         shape_text(weight));
  }
  check_like(op, "weight", weight, input, nullptr);
  if (stride.size() != 2 || stride[0] < 1 || stride[1] < 1) fail(op, "stride must be two integers >= 1");
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0) fail(op, "padding must be two integers >= 0");
  std::vector<int64_t> size(2);
  for (int d = 0; d < 2; ++d) {
    if (mode == PaddingMode::kReflect && padding[d] >= input.size(2 + d) && padding[d] > 0) {
      fail(op, "padding must be smaller than the input for padding_mode reflect, got padding ", padding[d],
           " for input ", shape_text(input));
    }
    const int64_t room = input.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
    if (room < 0) {
      fail(op, "weight's kernel must not be larger than the padded input, got weight ", shape_text(weight),
           " for input ", shape_text(input));
    }
    size[d] = room / stride[d] + 1;
  }
  return size;
}

Tensor padded(const Tensor& input, const std::vector<int64_t>& padding, PaddingMode mode) {
  if (input.numel() == 0) {
    return empty_dense(input,
                       {input.size(0), input.size(1), input.size(2) + 2 * padding[0], input.size(3) + 2 * padding[1]},
                       prefers_channels_last(input), input.scalar_type());
  }
  const ConvInstanceNormBackend backend{launch_pad_cuda, nullptr, nullptr, false};
  return pad_upsample(backend, input, 1, mode, padding, prefers_channels_last(input));
}

namespace {

// The same fields in both.
template <typename Params>
void fill_weights(Params& params, const Tensor& weight, void* output, DType dtype) {
  params.weight = weight.const_data_ptr();
  params.output = output;
  for (int d = 0; d < 4; ++d) params.stride[d] = weight.stride(d);
  params.out_channels = as_int(weight.size(0));
  params.in_channels = as_int(weight.size(1));
  params.kernel_h = as_int(weight.size(2));
  params.kernel_w = as_int(weight.size(3));
  params.dtype = dtype;
}

}  // namespace

std::optional<OwnConvolution> OwnConvolution::take(const char* op, const Tensor& input, const Tensor& weight,
                                                   bool turned, const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding, PaddingMode mode,
                                                   const std::vector<int64_t>& output_size) {
  constexpr int64_t kMostStride = 65535, kMostPadding = 1 << 28;
  const auto type = input.scalar_type();
  if (!is_16_bit(type)) return {};
  if (input.numel() == 0 || weight.numel() == 0 || std::min(padding[0], padding[1]) < 0 ||
      std::max(padding[0], padding[1]) > kMostPadding || std::max(stride[0], stride[1]) > kMostStride) {
    return {};
  }
  OwnConvolution own(op, weight, turned);
  cuda::ConvParams& params = own.params_;
  params.batch = as_int(input.size(0));
  params.in_channels = as_int(input.size(1));
  params.height = as_int(input.size(2));
  params.width = as_int(input.size(3));
  params.out_channels = as_int(weight.size(turned ? 1 : 0));
  params.out_height = as_int(output_size[0]);
  params.out_width = as_int(output_size[1]);
  params.kernel_h = as_int(weight.size(2));
  params.kernel_w = as_int(weight.size(3));
  params.stride_h = as_int(stride[0]);
  params.stride_w = as_int(stride[1]);
  params.pad_top = as_int(padding[0]);
  params.pad_left = as_int(padding[1]);
  params.mode = mode;
  params.dtype = kernel_dtype(op, "input", type);
  params.norm_follows = false;
  const CudaScope scope(input);
  bool supported = false;
  check_cuda(op, cuda::schedule_conv(params, own.schedule_, supported));
  if (!supported || own.schedule_.mma) return {};
  return own;
}

cuda::TurnedWeightsParams OwnConvolution::turned_elsewhere() {
  const size_t bytes = static_cast<size_t>(weight_.numel()) * cuda::size_of(params_.dtype);
  cuda::TurnedWeightsParams rewrite;
  fill_weights(rewrite, weight_, workspace(weight_, bytes, rewritten_), params_.dtype);
  return rewrite;
}

Tensor OwnConvolution::run(const Tensor& pixels) {
  const CudaScope scope(pixels);
  if (turned_ && !rewritten_) check_cuda(op_, cuda::launch_turned_weights(turned_elsewhere(), scope.stream()));
  if (!turned_ && !(is_dense(weight_, true) && cuda::aligned16(weight_.const_data_ptr()))) {
    const size_t bytes = static_cast<size_t>(weight_.numel()) * cuda::size_of(params_.dtype);
    cuda::ConvWeightsParams rewrite;
    fill_weights(rewrite, weight_, workspace(weight_, bytes, rewritten_), params_.dtype);
    check_cuda(op_, cuda::launch_conv_weights(rewrite, scope.stream()));
  }
  Tensor output = empty_dense(pixels, {pixels.size(0), params_.out_channels, params_.out_height, params_.out_width},
                              true, pixels.scalar_type());
  params_.input = pixels.const_data_ptr();
  params_.weight = rewritten_ ? rewritten_->const_data_ptr() : weight_.const_data_ptr();
  params_.output = output.mutable_data_ptr();
  check_cuda(op_, cuda::launch_conv(params_, schedule_, scope.stream()));
  return output;
}

}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_convolution", TORCH_BOX(&styleforge::convolution)); }
