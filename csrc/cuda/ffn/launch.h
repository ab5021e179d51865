// The passes around the matrix products of a feed-forward network on CUDA (see csrc/ffn_params.h). They belong to
// products that are not ours; a product of our own has them in its epilogue.
#pragma once

#include <cuda_runtime.h>

#include "../../ffn_params.h"

namespace styleforge::cuda {

cudaError_t launch_bias_activation(const BiasActivationParams& params, cudaStream_t stream);
cudaError_t launch_bias_activation_backward(const BiasActivationBackwardParams& params, cudaStream_t stream);
cudaError_t launch_bias_residual(const BiasResidualParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
