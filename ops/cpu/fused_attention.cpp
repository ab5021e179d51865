// fused_attention on the CPU: products (oneDNN) and attention (tiles with running softmax) are ATen's.
#include "../fused_attention_operators.h"

#include "../../csrc/cpu/huge_pages.h"
#include "../attention_math.h"
#include "matmul.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace styleforge {
namespace {

OptionalTensor bias_of(const Attention& attention) {
  return attention.key_padding_mask ? OptionalTensor(padding_bias(attention, 1)) : OptionalTensor();
}

AttentionResult attend(const Attention& attention, bool) {
  if (attention_forced(AttentionKernel::kMath)) return math_attention(cpu_baddbmm, attention);
  const OptionalTensor bias = bias_of(attention);
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr;
  double scale = attention.scale;
  AtenTensorHandle output = nullptr, logsumexp = nullptr;
  check_shim(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
                 heads_of(attention, 0).get(), heads_of(attention, 1).get(), heads_of(attention, 2).get(), 0.0,
                 attention.is_causal, bias ? &bias_handle : nullptr, &scale, &output, &logsumexp),
             "aten::_scaled_dot_product_flash_attention_for_cpu");
  return {dense_heads(swap_heads(Tensor(output))), to_contiguous(Tensor(logsumexp), false), AttentionKernel::kFlash};
}

AttentionGradient attend_backward(const Attention& attention, const AttentionBackward& backward) {
  if (attention_forced(AttentionKernel::kMath)) return math_attention_backward(cpu_baddbmm, attention, backward);
  const OptionalTensor bias = bias_of(attention);
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr;
  double scale = attention.scale;
  std::array<AtenTensorHandle, 3> gradients{};
  check_shim(
      aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
          swap_heads(backward.grad_output).get(), heads_of(attention, 0).get(), heads_of(attention, 1).get(),
          heads_of(attention, 2).get(), swap_heads(backward.output).get(), backward.logsumexp.get(), 0.0,
          attention.is_causal, bias ? &bias_handle : nullptr, &scale, &gradients[0], &gradients[1], &gradients[2]),
      "aten::_scaled_dot_product_flash_attention_for_cpu_backward");
  return {pack_gradients(attention, {Tensor(gradients[0]), Tensor(gradients[1]), Tensor(gradients[2])}),
          AttentionKernel::kFlash};
}

const AttentionBackend kBackend{
    false,
    cpu_mm,
    cpu_addmm,
    attend,
    attend_backward,
    [](const Tensor& tensor) {
      cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    },
};

using Operators = AttentionOperators<kBackend>;

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) { STYLEFORGE_IMPL_ATTENTION(m, styleforge::Operators); }
