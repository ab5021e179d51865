// The launches behind launch.h, one for each path.
#pragma once

#include "../common/launch.h"
#include "../common/overrides.h"
#include "launch.h"

namespace styleforge::cuda {

// Part of schedule_conv: for conv_mma.cu; `preferred`: also where conv_sm90.cu takes it.
void schedule_conv_mma(const ConvParams& params, const DeviceFacts& facts, const Overrides& overrides, bool preferred,
                       ConvSchedule& schedule, bool& supported);

// `norm`: what schedule.resident needs.
cudaError_t launch_conv_sm90(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                             cudaStream_t stream);
// The same by the kernels of conv_sm90_lean.cu (schedule.lean); `taken`: these tensors are theirs.
cudaError_t launch_conv_sm90_lean(const ConvParams& params, const ConvSchedule& schedule,
                                  const InstanceNormParams& norm, cudaStream_t stream, bool& taken);
// schedule.share blocks a tile.
cudaError_t launch_conv_sm90_shared(const ConvParams& params, const ConvSchedule& schedule,
                                    const InstanceNormParams& norm, cudaStream_t stream);
cudaError_t launch_conv_mma(const ConvParams& params, const ConvSchedule& schedule, cudaStream_t stream);
// params.output is the convolution's result, channels_last; norm.output may be the same memory if it is channels_last.
cudaError_t launch_conv_finish(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                               cudaStream_t stream);
// Its second step, to NCHW; `merged`: the moments are.
cudaError_t launch_conv_finish_nchw(const ConvParams& params, const ConvSchedule& schedule,
                                    const InstanceNormParams& norm, bool merged, cudaStream_t stream);

}  // namespace styleforge::cuda
