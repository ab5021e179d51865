// The launches behind launch.h, one for each path.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

// `norm`: what schedule.resident needs.
cudaError_t launch_conv_sm90(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                             cudaStream_t stream);
// norm.input is the convolution's result, channels_last; norm.output may be the same memory.
cudaError_t launch_conv_finish(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                               cudaStream_t stream);

}  // namespace styleforge::cuda
