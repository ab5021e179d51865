// CPU kernel of padding + nearest upsampling (see csrc/pad_params.h).
#pragma once

#include "../pad_params.h"
#include "instance_norm.h"

namespace styleforge::cpu {

void pad_upsample(const PadParams& params, ParallelFor parallel_for);

}  // namespace styleforge::cpu
