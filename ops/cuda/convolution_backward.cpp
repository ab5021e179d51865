// _convolution_backward on CUDA: each of the two gradients by our kernels where they take it, else by ATen's.
//
//   of the input    stride 1: a convolution of grad_output with the weights' taps turned round and their channels
//                   exchanged: plain_convolution.h
//   of the weights  csrc/cuda/conv_gradient
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <tuple>

#include "../../csrc/cuda/conv_gradient/launch.h"
#include "launch.h"
#include "plain_convolution.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_convolution_backward";

struct Arguments {
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& weight;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
};

int narrow(int64_t value) { return static_cast<int>(value); }

void check_arguments(const Arguments& args) {
  const auto& [grad_output, input, weight, stride, padding] = args;
  if (input.dim() != 4) fail(kOp, "input must have shape [N, C, H, W], got ", shape_text(input));
  kernel_dtype(kOp, "input", input.scalar_type());
  if (weight.dim() != 4 || weight.size(1) != input.size(1)) {
    fail(kOp, "weight must have shape [out_channels, ", input.size(1), ", kernel_height, kernel_width], got ",
         shape_text(weight));
  }
  check_like(kOp, "weight", weight, input, nullptr);
  if (stride.size() != 2 || stride[0] < 1 || stride[1] < 1) fail(kOp, "stride must be two integers >= 1");
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0) fail(kOp, "padding must be two integers >= 0");
  std::vector<int64_t> expected{input.size(0), weight.size(0)};
  for (int d = 0; d < 2; ++d) {
    const int64_t room = input.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
    if (room < 0) {
      fail(kOp, "weight's kernel must not be larger than the padded input, got weight ", shape_text(weight),
           " for input ", shape_text(input));
    }
    expected.push_back(room / stride[d] + 1);
  }
  check_like(kOp, "grad_output", grad_output, input, &expected);
}

// aten::convolution_backward; nothing for what is not needed.
std::pair<OptionalTensor, OptionalTensor> aten_gradients(const Arguments& args, bool needs_input, bool needs_weight) {
  using torch::stable::detail::from;
  const bool mask[3] = {needs_input, needs_weight, false};
  const std::vector<int64_t> dilation{1, 1}, output_padding{0, 0};
  std::array<StableIValue, 11> stack{from(args.grad_output),
                                     from(args.input),
                                     from(args.weight),
                                     from(std::nullopt),
                                     from(args.stride),
                                     from(args.padding),
                                     from(dilation),
                                     from(false),
                                     from(output_padding),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  check_shim(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION),
             "aten::convolution_backward");
  using torch::stable::detail::to;
  const Tensor input = to<Tensor>(stack[0]), weight = to<Tensor>(stack[1]), bias = to<Tensor>(stack[2]);
  return {needs_input ? OptionalTensor(input) : std::nullopt, needs_weight ? OptionalTensor(weight) : std::nullopt};
}

bool is_16_bit(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

// `pixels`: grad_output as the kernels read it, once it is there.
OptionalTensor input_gradient(const Arguments& args, OptionalTensor& pixels) {
  const auto& [grad_output, input, weight, stride, padding] = args;
  if (stride[0] != 1 || stride[1] != 1) return {};
  const std::vector<int64_t> sides{weight.size(2) - 1 - padding[0], weight.size(3) - 1 - padding[1]};
  return run_convolution(kOp, grad_output, pixels, WeightView(weight).turned(weight.element_size()), {1, 1}, sides,
                         {input.size(2), input.size(3)});
}

OptionalTensor weight_gradient(const Arguments& args, OptionalTensor& pixels) {
  const auto& [grad_output, input, weight, stride, padding] = args;
  constexpr int64_t kMost = 1 << 16;
  if (!is_16_bit(input) || std::max({stride[0], stride[1], padding[0], padding[1]}) > kMost) return {};
  cuda::WeightGradientParams params;
  params.batch = narrow(input.size(0));
  params.out_channels = narrow(weight.size(0));
  params.out_height = narrow(grad_output.size(2));
  params.out_width = narrow(grad_output.size(3));
  params.in_channels = narrow(input.size(1));
  params.height = narrow(input.size(2));
  params.width = narrow(input.size(3));
  params.kernel_h = narrow(weight.size(2));
  params.kernel_w = narrow(weight.size(3));
  params.stride_h = narrow(stride[0]);
  params.stride_w = narrow(stride[1]);
  params.pad_top = narrow(padding[0]);
  params.pad_left = narrow(padding[1]);
  params.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  const CudaScope scope(input);
  cuda::WeightGradientSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_weight_gradient(params, schedule, supported));
  if (!supported) return {};

  if (!pixels) pixels = channels_last_aligned(grad_output);
  const Tensor of_input = channels_last_aligned(input);
  params.grad = pixels->const_data_ptr();
  params.input = of_input.const_data_ptr();
  const std::vector<int64_t> sizes{weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  const Tensor output = empty_dense(weight, sizes, prefers_channels_last(weight), weight.scalar_type());
  params.output = output.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) params.output_stride[d] = output.stride(d);
  std::optional<Tensor> holder;
  params.partials = static_cast<float*>(workspace(input, schedule.workspace_bytes, holder));
  check_cuda(kOp, cuda::launch_weight_gradient(params, schedule, scope.stream()));
  return output;
}

std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                                bool needs_input, bool needs_weight) {
  const Arguments args{grad_output, input, weight, stride, padding};
  check_arguments(args);
  OptionalTensor pixels, of_input, of_weight;
  if (grad_output.numel() > 0 && weight.numel() > 0) {
    if (needs_input) of_input = input_gradient(args, pixels);
    if (needs_weight) of_weight = weight_gradient(args, pixels);
  }
  record_path(of_input ? "convolution_backward:cuda:sm90" : "convolution_backward:cuda:aten", !needs_weight ? ""
                                                                                              : of_weight
                                                                                                  ? "weight:sm90"
                                                                                                  : "weight:aten");
  const bool aten_input = needs_input && !of_input, aten_weight = needs_weight && !of_weight;
  if (aten_input || aten_weight) {
    auto found = aten_gradients(args, aten_input, aten_weight);
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
