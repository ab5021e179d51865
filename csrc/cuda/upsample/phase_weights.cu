#include <type_traits>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

// One thread for each element of the result: the sum of the taps that fall on one input pixel, at most 2 x 2 of them.
template <typename T>
__global__ void __launch_bounds__(kThreads) phase_weights_kernel(const __grid_constant__ PhaseWeightsParams p) {
  using Acc = acc_t<T>;
  wait_for_predecessor();
  release_successor();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 16 * p.out_channels * p.in_channels) return;
  const int64_t ci = index % p.in_channels;
  const int64_t rest = index / p.in_channels;
  const int dx = static_cast<int>(rest % 2);
  const int dy = static_cast<int>(rest / 2 % 2);
  const int64_t co = rest / 4 % p.out_channels;
  const int phase = static_cast<int>(rest / 4 / p.out_channels);
  // Taps [from, to) of an axis: phase 0 splits them 0 | 1 2, phase 1 splits them 0 1 | 2.
  const auto from = [](int phase_bit, int d) { return d == 0 ? 0 : 1 + phase_bit; };
  const auto to = [](int phase_bit, int d) { return d == 0 ? 1 + phase_bit : 3; };
  const int a = phase / 2;
  const int b = phase % 2;
  const T* weight = static_cast<const T*>(p.weight) + co * p.stride[0] + ci * p.stride[1];
  Acc sum = 0;
  for (int y = from(a, dy); y < to(a, dy); ++y) {
    for (int x = from(b, dx); x < to(b, dx); ++x) sum += to_acc(weight[y * p.stride[2] + x * p.stride[3]]);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (p.round_tf32) sum = __uint_as_float(round_bits_to_tf32(__float_as_uint(sum)));
  }
  static_cast<T*>(p.output)[index] = from_acc<T>(sum);
}

}  // namespace

cudaError_t launch_phase_weights(const PhaseWeightsParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t count = 16 * params.out_channels * params.in_channels;
  return switch_dtype(params.dtype, [&]<typename T>() {
    return launch(phase_weights_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), dim3(kThreads), 0, 1,
                  facts, stream, params);
  });
}

}  // namespace styleforge::cuda
