// The norm's launch, also for the operators that end in one.
#pragma once

#include "../fused_instance_norm.h"

namespace styleforge {

// Schedules and launches on the current stream. Records the norm's path, behind `before` where an operator ends in it.
void launch_instance_norm_cuda(const char* op, const InstanceNormCall& call, const char* before = nullptr);

}  // namespace styleforge
