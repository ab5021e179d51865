// The operators of fused_attention on one device, by what that device has to offer.
#pragma once

#include "fused_attention.h"

namespace styleforge {

template <const AttentionBackend& kBackend>
struct AttentionOperators {
  static FusedAttentionResult run(const AttentionArgs& args, bool keep) {
    const AttentionPlan plan = plan_attention(args);
    if (kBackend.whole != nullptr) {
      if (auto result = kBackend.whole(args, plan, keep)) return *std::move(result);
    }
    return run_attention(kBackend, args, plan, keep);
  }

  template <AttentionVersion kVersion>
  static ReturnedHandle forward(AtenTensorHandle input, AtenTensorHandle qkv_weight, const OptionalHandle& qkv_bias,
                                AtenTensorHandle out_weight, const OptionalHandle& out_bias, int64_t num_heads,
                                std::optional<double> scale, bool is_causal, const OptionalHandle& key_padding_mask,
                                const Text& precision) {
    const OwnedHandle own_input(input), own_qkv_weight(qkv_weight), own_qkv_bias = owned(qkv_bias);
    const OwnedHandle own_out_weight(out_weight), own_out_bias = owned(out_bias), own_mask = owned(key_padding_mask);
    FusedAttentionResult result =
        run({kVersion, facts_of(own_input), facts_of(own_qkv_weight), facts_of(own_qkv_bias), facts_of(own_out_weight),
             facts_of(own_out_bias), num_heads, scale, is_causal, facts_of(own_mask), precision},
            false);
    return {result.output.release()};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_for_backward(
      const Tensor& input, const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& out_weight,
      const OptionalTensor& out_bias, int64_t num_heads, std::optional<double> scale, bool is_causal,
      const OptionalTensor& key_padding_mask, const Text& precision, int64_t version) {
    if (version < 0 || version > 2) fail("_fused_attention_forward", "version must be 0, 1 or 2, got ", version);
    FusedAttentionResult result =
        run({static_cast<AttentionVersion>(version), input, qkv_weight, facts_of(qkv_bias), out_weight,
             facts_of(out_bias), num_heads, scale, is_causal, facts_of(key_padding_mask), precision},
            true);
    return {Tensor(result.output.release()), *result.qkv, *result.attention, *result.logsumexp};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& qkv, const Tensor& attention,
      const Tensor& logsumexp, const Tensor& qkv_weight, const Tensor& out_weight, int64_t num_heads,
      std::optional<double> scale, bool is_causal, const OptionalTensor& key_padding_mask, const Text& precision,
      bool needs_input, bool needs_qkv_weight, bool needs_qkv_bias, bool needs_out_weight, bool needs_out_bias) {
    return run_attention_backward(kBackend, {grad_output, input, qkv, attention, logsumexp, qkv_weight, out_weight,
                                             num_heads, scale, is_causal, key_padding_mask, precision, needs_input,
                                             needs_qkv_weight, needs_qkv_bias, needs_out_weight, needs_out_bias});
  }
};

// To be used in a STABLE_TORCH_LIBRARY_IMPL.
#define STYLEFORGE_IMPL_ATTENTION(m, Operators)                                                    \
  m.impl("fused_attention", TORCH_BOX(&Operators::forward<styleforge::AttentionVersion::kAuto>));  \
  m.impl("fused_attention_v1", TORCH_BOX(&Operators::forward<styleforge::AttentionVersion::kV1>)); \
  m.impl("fused_attention_v2", TORCH_BOX(&Operators::forward<styleforge::AttentionVersion::kV2>)); \
  m.impl("_fused_attention_forward", TORCH_BOX(&Operators::forward_for_backward));                 \
  m.impl("_fused_attention_backward", TORCH_BOX(&Operators::backward))

}  // namespace styleforge
