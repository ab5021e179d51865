// What each instruction set's build of the kernels offers; csrc/cpu/dispatch.cpp chooses among them at run time.
#pragma once

#include "../ffn.h"
#include "../instance_norm.h"
#include "../upsample_phases.h"

#define STYLEFORGE_DECLARE_KERNELS(isa)                                                                \
  namespace styleforge::cpu::isa {                                                                     \
  void instance_norm_forward(const InstanceNormParams& params, ParallelFor parallel_for);              \
  void instance_norm_backward(const InstanceNormBackwardParams& params, ParallelFor parallel_for);     \
  void instance_norm_phases(const UpsamplePhasesParams& params, ParallelFor parallel_for);             \
  void bias_activation(const BiasActivationParams& params, ParallelFor parallel_for);                  \
  void transposed_bias_activation(const BiasActivationParams& params, ParallelFor parallel_for);       \
  void bias_activation_backward(const BiasActivationBackwardParams& params, ParallelFor parallel_for); \
  void bias_residual(const BiasResidualParams& params, ParallelFor parallel_for);                      \
  void transposed_sum(const TransposedSumParams& params, ParallelFor parallel_for);                    \
  }

STYLEFORGE_DECLARE_KERNELS(baseline)
STYLEFORGE_DECLARE_KERNELS(avx2)
STYLEFORGE_DECLARE_KERNELS(avx512)

#undef STYLEFORGE_DECLARE_KERNELS
