// The norm's launch, also for the operators that end in one.
#pragma once

#include "../fused_instance_norm.h"

namespace styleforge {

// Schedules and launches on the current stream; records the path unless `quiet`.
void launch_instance_norm_cuda(const char* op, const InstanceNormCall& call);

}  // namespace styleforge
