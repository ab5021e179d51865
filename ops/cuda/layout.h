// Between NCHW and channels_last by our own kernel: csrc/cuda/layout. ATen's copy takes three to five times as long.
// `to_contiguous` and `in_format` come here by themselves.
#pragma once

#include "../../csrc/cuda/layout/launch.h"
#include "../stable.h"

#include <optional>

namespace styleforge {

// How the kernel brings a 4-d tensor to the other format; nothing where it does not: of neither format or already of
// the wanted one, or of other element sizes. The output is the caller's to fill.
std::optional<cuda::TransposeParams> transposition(const TensorFacts& tensor, bool to_channels_last);

// Dense, channels_last and aligned for 16-byte accesses: the tensor itself or a copy.
Tensor channels_last_aligned(const Tensor& tensor);

}  // namespace styleforge
