// The weights of the convolution that takes a gradient back to the input: taps the other way round, input and output
// channels exchanged. A transposition of [channels x channels] for each tap, by tiles through shared memory: a warp
// reads neighbouring input channels and writes neighbouring output channels. A launch of its own is 2 to 4 us on the
// way to the gradient of the input, so where the gradient of the weights is wanted, too, that one's kernel does it
// beside its multiplications (weight_gradient_sm90.cu).
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kThreads = 256;
constexpr int kRows = kThreads / kTile;

__global__ void __launch_bounds__(kThreads) turned_weights_kernel(const __grid_constant__ TurnedWeightsParams p) {
  __shared__ uint16_t tile[kTile][kTile + 2];
  const int lane = static_cast<int>(threadIdx.x) % kTile;
  const int warp = static_cast<int>(threadIdx.x) / kTile;
  const auto across = static_cast<unsigned>((p.in_channels + kTile - 1) / kTile);
  const int ci = static_cast<int>(blockIdx.x % across) * kTile, co = static_cast<int>(blockIdx.x / across) * kTile;
  const int tap = static_cast<int>(blockIdx.y);
  const int taps = p.kernel_h * p.kernel_w;
  const int y = tap / p.kernel_w, x = tap - y * p.kernel_w;
  const auto* from = static_cast<const uint16_t*>(p.weight) + y * p.stride[2] + x * p.stride[3];
  wait_for_predecessor();
  release_successor();
#pragma unroll
  for (int row = warp; row < kTile; row += kRows) {
    if (co + row < p.out_channels && ci + lane < p.in_channels) {
      tile[row][lane] = from[(co + row) * p.stride[0] + (ci + lane) * p.stride[1]];
    }
  }
  __syncthreads();
  auto* to = static_cast<uint16_t*>(p.output) + static_cast<int64_t>(taps - 1 - tap) * p.out_channels;
#pragma unroll
  for (int row = warp; row < kTile; row += kRows) {
    if (ci + row < p.in_channels && co + lane < p.out_channels) {
      to[static_cast<int64_t>(ci + row) * taps * p.out_channels + co + lane] = tile[lane][row];
    }
  }
}

}  // namespace

cudaError_t launch_turned_weights(const TurnedWeightsParams& params, cudaStream_t stream) {
  if (size_of(params.dtype) != 2) return cudaErrorInvalidValue;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t tiles = ceil_div(params.in_channels, kTile) * ceil_div(params.out_channels, kTile);
  const auto grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(params.kernel_h * params.kernel_w));
  return launch(turned_weights_kernel, grid, dim3(kThreads), 0, 1, facts, stream, params);
}

}  // namespace styleforge::cuda
