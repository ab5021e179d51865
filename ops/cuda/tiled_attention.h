// Attention of float32 heads by kernels of our own (csrc/cuda/attention), to float32 accuracy on tensor cores; of 16
// bits the backward.
#pragma once

#include "../fused_attention.h"

namespace styleforge {

// Nothing where the kernels do not take the case: dtype, device, head size, mask, or ATen's are faster.
std::optional<AttentionResult> tiled_attention(const Attention& attention, bool keep_logsumexp);

// From the logsumexp of any of the forward kernels; nothing where the kernels do not take the case.
std::optional<AttentionGradient> tiled_attention_backward(const Attention& attention,
                                                          const AttentionBackward& backward);

}  // namespace styleforge
