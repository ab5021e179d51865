// Padding + nearest upsampling on CUDA (see csrc/pad_params.h).
#pragma once

#include <cuda_runtime.h>

#include "../../pad_params.h"

namespace styleforge::cuda {

cudaError_t launch_pad_upsample(const PadParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
