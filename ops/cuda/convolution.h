// Convolutions that are not ours.
#pragma once

#include "../stable.h"

namespace styleforge {

// aten::_convolution, which takes what the global cuDNN flags would say as arguments: `tf32` holds whatever the user's
// flags are.
Tensor cudnn_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, bool tf32);

}  // namespace styleforge
