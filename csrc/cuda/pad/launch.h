// Padding + nearest upsampling on CUDA (see csrc/pad_params.h).
#pragma once

#include <cuda_runtime.h>

#include "../../pad_backward_params.h"
#include "../../pad_params.h"

namespace styleforge::cuda {

cudaError_t launch_pad_upsample(const PadParams& params, cudaStream_t stream);

// A picture: few channels, in channels_last (params.channels_last) or NCHW, to channels_last pixels of exactly 16
// bytes. Padded as above, without upsampling.
cudaError_t launch_pad_picture(const PadParams& params, cudaStream_t stream);

// The gradient of launch_pad_upsample.
cudaError_t launch_pad_backward(const PadBackwardParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
