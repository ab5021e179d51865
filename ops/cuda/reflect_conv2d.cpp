// _reflect_conv2d on CUDA: our convolution where it takes the call, else our padding and ATen's convolution.
#include "convolution.h"
#include "fused_conv.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_reflect_conv2d";

Tensor reflect_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Text& precision) {
  if (input.dim() != 4) fail(kOp, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(kOp, "input", input.scalar_type());
  if (weight.dim() != 4 || weight.size(1) != input.size(1) || weight.size(2) % 2 == 0 || weight.size(3) % 2 == 0) {
    fail(kOp, "weight must have shape [out_channels, ", input.size(1), ", odd kernel_height, odd kernel_width], got ",
         shape_text(weight));
  }
  check_like(kOp, "weight", weight, input, nullptr);
  if (bias) {
    const std::vector<int64_t> expected{weight.size(0)};
    check_like(kOp, "bias", *bias, input, &expected);
  }
  const std::vector<int64_t> padding{weight.size(2) / 2, weight.size(3) / 2};
  if (padding[0] >= input.size(2) || padding[1] >= input.size(3)) {
    fail(kOp, "half of weight's kernel must be smaller than the input, got weight ", shape_text(weight), " for input ",
         shape_text(input));
  }
  const bool channels_last = prefers_channels_last(input);
  if (input.size(1) == 0 || weight.size(0) == 0) {
    fail(kOp, "weight must have no empty dimension, got ", shape_text(weight));
  }
  if (input.size(0) == 0) {
    return empty_dense(input, {0, weight.size(0), input.size(2), input.size(3)}, channels_last, input.scalar_type());
  }
  const bool tf32 = parse_tf32(kOp, precision.value) && input.scalar_type() == ScalarType::Float;
  if (auto output = run_fused_reflect_conv(input, weight, bias, tf32)) return *output;
  const ConvInstanceNormBackend backend{launch_pad_cuda, nullptr, nullptr, false};
  const Tensor padded = pad_upsample(backend, input, 1, PaddingMode::kReflect, padding, channels_last);
  record_path("reflect_conv2d:cuda:aten_conv");
  return in_format(cudnn_convolution(padded, weight, bias, {1, 1}, {0, 0}, tf32), channels_last);
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_reflect_conv2d", TORCH_BOX(&styleforge::reflect_conv2d)); }
