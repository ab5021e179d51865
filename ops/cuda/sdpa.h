// ATen's attention kernels on CUDA: cuDNN's, flash (Dao: FlashAttention-2, 2023, arXiv:2307.08691) and efficient
// (CUTLASS), through the C shim of the device's kernels. None of them waits for the GPU.
#pragma once

#include "../fused_attention.h"

namespace styleforge {

// Whether `kernel` takes this case on a device of compute capability `major`. Head sizes that a kernel wants to be a
// multiple of 8 are padded here.
bool sdpa_takes(AttentionKernel kernel, const Attention& attention, int major);
bool sdpa_backward_takes(AttentionKernel kernel, const Attention& attention, int major);

AttentionResult sdpa(AttentionKernel kernel, const Attention& attention, bool keep_logsumexp);

// From the logsumexp of any of the forward kernels. efficient adds up in a fixed order (one block of threads for each
// head); flash adds to the gradient of q by atomics, in the order that they come.
AttentionGradient sdpa_backward(AttentionKernel kernel, const Attention& attention, const AttentionBackward& backward);

}  // namespace styleforge
