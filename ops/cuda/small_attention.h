// fused_attention by our own kernels for the whole block (csrc/cuda/attention_small): short sequences.
#pragma once

#include "../fused_attention.h"

namespace styleforge {

// Nothing where the kernels do not take the case, or are not the faster ones.
std::optional<FusedAttentionResult> run_small_attention(const AttentionArgs& args, const AttentionPlan& plan,
                                                        bool keep);

}  // namespace styleforge
