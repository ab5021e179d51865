// CPU kernels of instance norm (see csrc/instance_norm_params.h for the formulas). Work is cut into independent tasks
// so that the operator layer can run them on PyTorch's own thread pool.
#pragma once

#include <cstdint>

#include "../instance_norm_params.h"

namespace styleforge::cpu {

// Runs body(begin, end) over [0, count) on however many threads the caller has; results must not depend on the split.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

void instance_norm_forward(const InstanceNormParams& params, ParallelFor parallel_for);
void instance_norm_backward(const InstanceNormBackwardParams& params, ParallelFor parallel_for);

// The instruction set the kernels were dispatched to: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace styleforge::cpu
