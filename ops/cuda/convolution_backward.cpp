// _convolution_backward on CUDA: each of the two gradients by our kernels where they take it, else by ATen's.
//
//   of the input    stride 1: a convolution of grad_output with the weights' taps turned round and their channels
//                   exchanged: plain_convolution.h
//   of the weights  csrc/cuda/conv_gradient
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "../fused_conv_instance_norm_relu.h"
#include "launch.h"
#include "layout.h"
#include "plain_convolution.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_convolution_backward";

struct Arguments : ConvolutionArguments {
  const Tensor& grad_output;
  const Text& padding_mode;

  bool zeros() const { return mode == PaddingMode::kZeros; }
};

// What both gradients read, once one of them has asked for it.
struct Operands {
  OptionalTensor pixels;  // grad_output as our kernels read it
  OptionalTensor wide;    // the input with its padding around it

  const Tensor& grad_pixels(const Arguments& args) {
    if (!pixels) pixels = channels_last_aligned(args.grad_output);
    return *pixels;
  }

  const Tensor& padded_input(const Arguments& args) {
    if (!wide) wide = padded(args.input, args.padding, args.mode);
    return *wide;
  }
};

// aten::convolution_backward; nothing for what is not needed.
std::pair<OptionalTensor, OptionalTensor> aten_gradients(const Arguments& args, Operands& operands, bool needs_input,
                                                         bool needs_weight) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const bool mask[3] = {needs_input, needs_weight, false};
  const std::vector<int64_t> ones{1, 1}, none{0, 0};
  const Tensor& wide = args.zeros() ? args.input : operands.padded_input(args);
  std::array<StableIValue, 11> stack{from(args.grad_output),
                                     from(wide),
                                     from(args.weight),
                                     from(std::nullopt),
                                     from(args.stride),
                                     from(args.zeros() ? args.padding : none),
                                     from(ones),
                                     from(false),
                                     from(none),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  check_shim(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION),
             "aten::convolution_backward");
  const Tensor input = to<Tensor>(stack[0]), weight = to<Tensor>(stack[1]), bias = to<Tensor>(stack[2]);
  OptionalTensor of_input, of_weight;
  if (needs_input) of_input = args.zeros() ? input : pad_upsample_backward(input, args.padding, args.padding_mode, 1);
  if (needs_weight) of_weight = weight;
  return {of_input, of_weight};
}

bool path_is_forced() {
  const char* path = std::getenv("STYLEFORGE_PATH");
  return path != nullptr && *path != '\0';
}

std::optional<OwnConvolution> take_input_gradient(const Arguments& args) {
  if (args.stride[0] != 1 || args.stride[1] != 1) return {};
  // 32 to 64 channels of 8x258x258 pixels take 95 us and cuDNN 64; 64 to 128 of 8x130x130 48 and 39.
  if (args.weight.size(0) < args.input.size(1) && !path_is_forced()) return {};
  std::vector<int64_t> sides(2), size(2);  // of the padded input where the padding is not zeros
  for (int d = 0; d < 2; ++d) {
    sides[d] = args.weight.size(2 + d) - 1 - (args.zeros() ? args.padding[d] : 0);
    size[d] = args.input.size(2 + d) + (args.zeros() ? 0 : 2 * args.padding[d]);
  }
  return OwnConvolution::take(kOp, args.grad_output, args.weight, true, {1, 1}, sides, PaddingMode::kZeros, size);
}

// `for_input`: the other gradient, whose weights the same launch can make.
OptionalTensor weight_gradient(const Arguments& args, Operands& operands, std::optional<OwnConvolution>& for_input) {
  const auto& weight = args.weight;
  const auto& grad_output = args.grad_output;
  const auto& stride = args.stride;
  constexpr int64_t kMost = 1 << 16;
  Tensor input = args.input;
  std::vector<int64_t> padding = args.padding;
  if (!is_16_bit(input.scalar_type()) || grad_output.numel() == 0 || weight.numel() == 0 ||
      std::max({stride[0], stride[1], padding[0], padding[1]}) > kMost)
    return {};
  cuda::WeightGradientParams params;
  params.batch = as_int(input.size(0));
  params.out_channels = as_int(weight.size(0));
  params.out_height = as_int(grad_output.size(2));
  params.out_width = as_int(grad_output.size(3));
  params.in_channels = as_int(input.size(1));
  params.kernel_h = as_int(weight.size(2));
  params.kernel_w = as_int(weight.size(3));
  params.stride_h = as_int(stride[0]);
  params.stride_w = as_int(stride[1]);
  params.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  const CudaScope scope(input);
  cuda::WeightGradientSchedule schedule;
  bool supported = false;
  const auto schedule_padded_by = [&](PaddingMode mode) {
    params.height = as_int(input.size(2));
    params.width = as_int(input.size(3));
    params.pad_top = as_int(padding[0]);
    params.pad_left = as_int(padding[1]);
    params.mode = mode;
    check_cuda(kOp, cuda::schedule_weight_gradient(params, schedule, supported));
  };
  schedule_padded_by(args.mode);
  if (!supported && !args.zeros()) {
    input = operands.padded_input(args);
    padding = {0, 0};
    schedule_padded_by(PaddingMode::kZeros);
  }
  if (!supported) return {};

  const Tensor of_input = channels_last_aligned(input);
  params.grad = operands.grad_pixels(args).const_data_ptr();
  params.input = of_input.const_data_ptr();
  const std::vector<int64_t> sizes{weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  const Tensor output = empty_dense(weight, sizes, prefers_channels_last(weight), weight.scalar_type());
  params.output = output.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) params.output_stride[d] = output.stride(d);
  std::optional<Tensor> holder;
  params.partials = static_cast<float*>(workspace(input, schedule.workspace_bytes, holder));
  if (for_input) params.turned = for_input->turned_elsewhere();
  check_cuda(kOp, cuda::launch_weight_gradient(params, schedule, scope.stream()));
  return output;
}

std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                                const Text& padding_mode, bool needs_input, bool needs_weight) {
  const PaddingMode mode = parse_padding_mode(kOp, padding_mode.value);
  const Arguments args{{input, weight, stride, padding, mode}, grad_output, padding_mode};
  const auto size = args.check(kOp);
  const std::vector<int64_t> expected{input.size(0), weight.size(0), size[0], size[1]};
  check_like(kOp, "grad_output", grad_output, input, &expected);
  Operands operands;
  OptionalTensor of_input, of_weight;
  auto own = needs_input ? take_input_gradient(args) : std::nullopt;
  if (needs_weight) of_weight = weight_gradient(args, operands, own);
  // Weights that are turned by a launch of their own cost 2 to 4 us more.
  const int64_t grad_pixels = grad_output.size(0) * grad_output.size(2) * grad_output.size(3);
  if (own && !of_weight && grad_pixels < 8192 && !path_is_forced()) own.reset();
  if (own) {
    of_input = own->run(operands.grad_pixels(args));
    if (!args.zeros()) of_input = pad_upsample_backward(*of_input, padding, padding_mode, 1);
  }
  record_path(of_input ? "convolution_backward:cuda:sm90" : "convolution_backward:cuda:aten", !needs_weight ? ""
                                                                                              : of_weight
                                                                                                  ? "weight:sm90"
                                                                                                  : "weight:aten");
  const bool aten_input = needs_input && !of_input, aten_weight = needs_weight && !of_weight;
  if (aten_input || aten_weight) {
    auto found = aten_gradients(args, operands, aten_input, aten_weight);
    if (aten_input) of_input = found.first;
    if (aten_weight) of_weight = found.second;
  }
  const auto none = [&] { return empty_strided(input, {0}, {1}, input.scalar_type()); };
  return {of_input ? in_format(*of_input, prefers_channels_last(input)) : none(),
          of_weight ? in_format(*of_weight, prefers_channels_last(weight)) : none()};
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("_convolution_backward", TORCH_BOX(&styleforge::convolution_backward));
}
