#include "convolution.h"

namespace styleforge {

Tensor cudnn_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, bool tf32) {
  using torch::stable::detail::from;
  const std::vector<int64_t> dilation{1, 1};
  const std::vector<int64_t> output_padding{0, 0};
  const bool benchmark = false, deterministic = true, cudnn_enabled = true;
  std::array<StableIValue, 13> stack{from(input),      from(weight),    from(bias),          from(stride),
                                     from(padding),    from(dilation),  from(false),         from(output_padding),
                                     from(int64_t{1}), from(benchmark), from(deterministic), from(cudnn_enabled),
                                     from(tf32)};
  check_shim(torch_call_dispatcher("aten::_convolution", "", stack.data(), TORCH_ABI_VERSION), "aten::_convolution");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace styleforge
