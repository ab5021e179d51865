// fused_conv_instance_norm_relu on CUDA: the convolution is cuDNN's through ATen, the rest is ours.
#include "../fused_conv_instance_norm_relu.h"

#include "../../csrc/cuda/pad/launch.h"
#include "fused_instance_norm.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_conv_instance_norm_relu";

// aten::_convolution, which takes what the global cuDNN flags would say as arguments.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, bool tf32) {
  using torch::stable::detail::from;
  const std::vector<int64_t> dilation{1, 1};
  const std::vector<int64_t> output_padding{0, 0};
  const bool benchmark = false, deterministic = true, cudnn_enabled = true;
  std::array<StableIValue, 13> stack{from(input),           from(weight),    from(std::nullopt), from(stride),
                                     from(padding),         from(dilation),  from(false),        from(output_padding),
                                     from(int64_t{1}),      from(benchmark), from(deterministic), from(cudnn_enabled),
                                     from(tf32)};
  check_shim(torch_call_dispatcher("aten::_convolution", "", stack.data(), TORCH_ABI_VERSION), "aten::_convolution");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

const ConvInstanceNormBackend kBackend{
    [](const PadParams& params, const Tensor& like) {
      const CudaScope scope(like);
      check_cuda(kOp, cuda::launch_pad_upsample(params, scope.stream()));
    },
    convolution, [](const InstanceNormCall& call) { launch_instance_norm_cuda(kOp, call); }};

Tensor fused_conv_instance_norm_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                     const Text& padding_mode, int64_t upsample, double eps, const Text& activation,
                                     double negative_slope, const OptionalTensor& residual, const Text& precision) {
  return run_conv_instance_norm(kBackend,
                                {input, weight, bias, norm_weight, norm_bias, stride, padding, padding_mode, upsample,
                                 eps, activation, negative_slope, residual, precision});
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("fused_conv_instance_norm_relu", TORCH_BOX(&styleforge::fused_conv_instance_norm_relu));
}
