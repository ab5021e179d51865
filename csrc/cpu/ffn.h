// CPU kernels around the matrix products of a feed-forward network (see csrc/ffn_params.h).
#pragma once

#include "../ffn_params.h"
#include "instance_norm.h"

namespace styleforge::cpu {

void bias_activation(const BiasActivationParams& params, ParallelFor parallel_for);
// The same with hidden units in rows: `params.rows` of them, a bias each, and a column for each row of the
// input. float32 alone.
void transposed_bias_activation(const BiasActivationParams& params, ParallelFor parallel_for);
void bias_activation_backward(const BiasActivationBackwardParams& params, ParallelFor parallel_for);
void bias_residual(const BiasResidualParams& params, ParallelFor parallel_for);
void transposed_sum(const TransposedSumParams& params, ParallelFor parallel_for);

}  // namespace styleforge::cpu
