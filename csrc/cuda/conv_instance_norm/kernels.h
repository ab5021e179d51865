// The launches behind launch.h, one for each path.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

cudaError_t launch_conv_sm90(const ConvParams& params, const ConvSchedule& schedule, cudaStream_t stream);

}  // namespace styleforge::cuda
