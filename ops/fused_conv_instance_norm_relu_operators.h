// The operator of fused_conv_instance_norm_relu on one device, by the function that runs it there.
#pragma once

#include "fused_conv_instance_norm_relu.h"

namespace styleforge {

template <OwnedHandle (*kRun)(const ConvInstanceNormOptions&, const ConvInstanceNormFacts&)>
ReturnedHandle conv_instance_norm_operator(AtenTensorHandle input, AtenTensorHandle weight, const OptionalHandle& bias,
                                           const OptionalHandle& norm_weight, const OptionalHandle& norm_bias,
                                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                           const Text& padding_mode, int64_t upsample, double eps,
                                           const Text& activation, double negative_slope,
                                           const OptionalHandle& residual, const Text& precision) {
  const OwnedHandle own_input(input), own_weight(weight), own_bias = owned(bias), own_residual = owned(residual);
  const OwnedHandle own_norm_weight = owned(norm_weight), own_norm_bias = owned(norm_bias);
  return {kRun({stride, padding, padding_mode, upsample, eps, activation, negative_slope, precision},
               {facts_of(own_input), facts_of(own_weight), facts_of(own_bias), facts_of(own_norm_weight),
                facts_of(own_norm_bias), facts_of(own_residual)})
              .release()};
}

}  // namespace styleforge
