// The gradients of weight and bias from the sums of every sample: over the samples in their order where the parameters
// are shared by all, rounded once to the parameters' dtype. One launch for both; a sum and a cast of each would be
// four.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T, typename Acc>
__global__ void __launch_bounds__(kThreads) parameter_gradients_kernel(const Acc* weight_sums, const Acc* bias_sums,
                                                                       T* weight, T* bias, int samples, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_predecessor();
  release_successor();
  if (i >= count) return;
  const auto reduce = [&](const Acc* sums) {
    Acc sum = 0;
#pragma unroll 8
    for (int n = 0; n < samples; ++n) sum += sums[n * count + i];
    return from_acc<T>(static_cast<acc_t<T>>(sum));
  };
  if (weight != nullptr) weight[i] = reduce(weight_sums);
  if (bias != nullptr) bias[i] = reduce(bias_sums);
}

}  // namespace

cudaError_t launch_parameter_gradients(const ParameterGradients& g, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(g.count, kThreads)));
  const auto run = [&]<typename T, typename Acc>() -> cudaError_t {
    return launch(parameter_gradients_kernel<T, Acc>, grid, dim3(kThreads), 0, 1, facts, stream,
                  static_cast<const Acc*>(g.weight_sums), static_cast<const Acc*>(g.bias_sums),
                  static_cast<T*>(g.weight), static_cast<T*>(g.bias), static_cast<int>(g.samples), g.count);
  };
  return switch_dtype(g.dtype, [&]<typename T>() -> cudaError_t {
    return g.sums_in_double ? run.template operator()<T, double>() : run.template operator()<T, float>();
  });
}

}  // namespace styleforge::cuda
