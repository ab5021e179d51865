// The operators of fused_ffn on one device, by what that device has to offer.
#pragma once

#include "fused_ffn.h"

namespace styleforge {

template <const FfnBackend& kBackend>
struct FfnOperators {
  static FfnResult run(const FfnFacts& facts, bool keep_hidden) {
    const FfnPlan plan = plan_ffn(facts);
    if (kBackend.small != nullptr) {
      if (auto result = kBackend.small(facts, plan, keep_hidden)) return *result;
    }
    const Tensor input = tensor_of(facts.input.handle);
    const Tensor fc1_weight = tensor_of(facts.fc1_weight.handle), fc2_weight = tensor_of(facts.fc2_weight.handle);
    const OptionalTensor fc1_bias = optional_tensor_of(facts.fc1_bias), fc2_bias = optional_tensor_of(facts.fc2_bias);
    const OptionalTensor residual = optional_tensor_of(facts.residual);
    const FfnArgs args{input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, facts.activation, residual, facts.precision};
    if (kBackend.whole != nullptr) {
      if (auto result = kBackend.whole(args, plan, keep_hidden)) return *result;
    }
    record_path(kBackend.path);
    return run_ffn(kBackend, args, plan, keep_hidden);
  }

  static Tensor forward(AtenTensorHandle input, AtenTensorHandle fc1_weight, const OptionalHandle& fc1_bias,
                        AtenTensorHandle fc2_weight, const OptionalHandle& fc2_bias, const Text& activation,
                        const OptionalHandle& residual, const Text& precision) {
    const OwnedHandle own_input(input), own_fc1_weight(fc1_weight), own_fc1_bias = owned(fc1_bias);
    const OwnedHandle own_fc2_weight(fc2_weight), own_fc2_bias = owned(fc2_bias), own_residual = owned(residual);
    return run({facts_of(own_input), facts_of(own_fc1_weight), facts_of(own_fc1_bias), facts_of(own_fc2_weight),
                facts_of(own_fc2_bias), activation, facts_of(own_residual), precision},
               false)
        .output;
  }

  static std::tuple<Tensor, Tensor> forward_for_backward(const Tensor& input, const Tensor& fc1_weight,
                                                         const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                                         const OptionalTensor& fc2_bias, const Text& activation,
                                                         const OptionalTensor& residual, const Text& precision) {
    const FfnResult result = run({input, fc1_weight, facts_of(fc1_bias), fc2_weight, facts_of(fc2_bias), activation,
                                  facts_of(residual), precision},
                                 true);
    return {result.output, *result.hidden};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& hidden, const Tensor& fc1_weight,
      const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const Text& activation, const Text& precision,
      bool needs_input, bool needs_fc1_weight, bool needs_fc1_bias, bool needs_fc2_weight, bool needs_fc2_bias) {
    record_path(kBackend.backward_path);
    return run_ffn_backward(
        kBackend, {grad_output, input, hidden, fc1_weight, fc1_bias, fc2_weight, activation, precision, needs_input,
                   needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias});
  }
};

}  // namespace styleforge
