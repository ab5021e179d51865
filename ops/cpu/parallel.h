// PyTorch's thread pool for the CPU kernels.
#pragma once

#include <cstdint>

namespace styleforge {

// torch_parallel_for, in the signature that csrc/cpu takes.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

}  // namespace styleforge
