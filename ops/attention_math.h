// Attention by matrix products and ATen's elementwise operators, a block of queries at a time: memory stays linear in
// the length, every sum has a fixed order, and any dtype, head size and mask will do. It is what runs where a device
// has no kernel for the case.
#pragma once

#include "fused_attention.h"

namespace styleforge {

// out = beta self + alpha a b, for [B, ., .]; `self` may be `out`, and with beta = 0 is not read.
using Baddbmm = void (*)(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                         double alpha);

AttentionResult math_attention(Baddbmm baddbmm, const Attention& attention);
AttentionGradient math_attention_backward(Baddbmm baddbmm, const Attention& attention,
                                          const AttentionBackward& backward);

}  // namespace styleforge
