// Chooses the build of the kernels that suits the processor, once. STYLEFORGE_CPU_CAPABILITY=baseline|avx2|avx512 in
// the environment asks for a lower one (for tests and comparisons, like PyTorch's ATEN_CPU_CAPABILITY).
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace styleforge::cpu {
namespace {

struct Kernels {
  const char* name;
  void (*forward)(const InstanceNormParams&, ParallelFor);
  void (*backward)(const InstanceNormBackwardParams&, ParallelFor);
  void (*phases)(const UpsamplePhasesParams&, ParallelFor);
  void (*bias_activation)(const BiasActivationParams&, ParallelFor);
  void (*transposed_bias_activation)(const BiasActivationParams&, ParallelFor);
  void (*bias_activation_backward)(const BiasActivationBackwardParams&, ParallelFor);
  void (*bias_residual)(const BiasResidualParams&, ParallelFor);
  void (*transposed_sum)(const TransposedSumParams&, ParallelFor);
};

#define STYLEFORGE_KERNELS(isa)                                                                                     \
  Kernels {                                                                                                         \
    #isa, isa::instance_norm_forward, isa::instance_norm_backward, isa::instance_norm_phases, isa::bias_activation, \
        isa::transposed_bias_activation, isa::bias_activation_backward, isa::bias_residual, isa::transposed_sum     \
  }

Kernels choose() {
  const char* wish = std::getenv("STYLEFORGE_CPU_CAPABILITY");
  const std::string wanted = wish == nullptr ? "" : wish;
  const auto take = [&](const char* name, bool supported) { return supported && (wanted.empty() || wanted == name); };
#ifdef STYLEFORGE_CPU_X86
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, which not all compilers' __builtin_cpu_supports know.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (take("avx512", avx512)) return STYLEFORGE_KERNELS(avx512);
  if (take("avx2", avx2)) return STYLEFORGE_KERNELS(avx2);
#endif
  if (take("baseline", true)) return STYLEFORGE_KERNELS(baseline);
  throw std::runtime_error(
      "STYLEFORGE_CPU_CAPABILITY must be baseline, avx2 or avx512 and supported by this processor, "
      "got \"" +
      wanted + "\"");
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void instance_norm_forward(const InstanceNormParams& params, ParallelFor parallel_for) {
  kernels().forward(params, parallel_for);
}

void instance_norm_backward(const InstanceNormBackwardParams& params, ParallelFor parallel_for) {
  kernels().backward(params, parallel_for);
}

void instance_norm_phases(const UpsamplePhasesParams& params, ParallelFor parallel_for) {
  kernels().phases(params, parallel_for);
}

void bias_activation(const BiasActivationParams& params, ParallelFor parallel_for) {
  kernels().bias_activation(params, parallel_for);
}

void transposed_bias_activation(const BiasActivationParams& params, ParallelFor parallel_for) {
  kernels().transposed_bias_activation(params, parallel_for);
}

void bias_activation_backward(const BiasActivationBackwardParams& params, ParallelFor parallel_for) {
  kernels().bias_activation_backward(params, parallel_for);
}

void bias_residual(const BiasResidualParams& params, ParallelFor parallel_for) {
  kernels().bias_residual(params, parallel_for);
}

void transposed_sum(const TransposedSumParams& params, ParallelFor parallel_for) {
  kernels().transposed_sum(params, parallel_for);
}

const char* instruction_set() { return kernels().name; }

}  // namespace styleforge::cpu
