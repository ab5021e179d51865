// The operators of fused_ffn on one device, by what that device has to offer.
#pragma once

#include "fused_ffn.h"

namespace styleforge {

template <const FfnBackend& kBackend>
struct FfnOperators {
  static FfnResult run(const FfnArgs& args, bool keep_hidden) {
    const FfnPlan plan = plan_ffn(args);
    if (kBackend.whole != nullptr) {
      if (auto result = kBackend.whole(args, plan, keep_hidden)) return *result;
    }
    record_path(kBackend.path);
    return run_ffn(kBackend, args, plan, keep_hidden);
  }

  static Tensor forward(const Tensor& input, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const Text& activation,
                        const OptionalTensor& residual, const Text& precision) {
    return run({input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision}, false).output;
  }

  static std::tuple<Tensor, Tensor> forward_for_backward(const Tensor& input, const Tensor& fc1_weight,
                                                         const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                                         const OptionalTensor& fc2_bias, const Text& activation,
                                                         const OptionalTensor& residual, const Text& precision) {
    const FfnResult result =
        run({input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision}, true);
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
