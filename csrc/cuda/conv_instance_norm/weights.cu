// Weights of any strides as [out_channels, taps, in_channels], for float32 accuracy split in two TF32 numbers; alone,
// or with the input's transposition to channels_last in the same launch: a contiguous model has both before every
// convolution.
#include "weights.cuh"

#include <type_traits>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../layout/transpose.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = kTransposeThreads;
constexpr int kTapsAlone = 1, kTapsBeside = 3;  // of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads) conv_weights_kernel(const __grid_constant__ ConvWeightsParams p) {
  wait_for_predecessor();
  release_successor();
  write_conv_weights<T, kTapsAlone>(p, static_cast<int>(blockIdx.x * kThreads + threadIdx.x));
}

// The weights' blocks are the first planes of the grid: they have longer to go than the transposition's.
template <typename T>
__global__ void __launch_bounds__(kThreads, 6)
    conv_operands_kernel(const __grid_constant__ ConvWeightsParams p, const __grid_constant__ TransposeParams input,
                         const __grid_constant__ TransposePieces pieces, int planes) {
  wait_for_predecessor();
  release_successor();
  const int z = static_cast<int>(blockIdx.z);
  if (z >= planes) {
    transpose_tile<T, true>(input, pieces, z - planes, blockIdx.y, blockIdx.x);
    return;
  }
  const int block = (z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  write_conv_weights<T, kTapsBeside>(p, static_cast<int>(block * kThreads + threadIdx.x));
}

// The element type that moves weights: only float32 is ever computed with.
template <typename Body>
cudaError_t switch_weights(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat16:
    case DType::kBFloat16:
      return body.template operator()<uint16_t>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_conv_weights(const ConvWeightsParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(weight_threads<kTapsAlone>(params), kThreads)));
  return switch_weights(params.dtype, [&]<typename T>() {
    return launch(conv_weights_kernel<T>, grid, dim3(kThreads), 0, 1, facts, stream, params);
  });
}

cudaError_t launch_conv_operands(const ConvWeightsParams& weights, const TransposeParams& input, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  dim3 grid = transpose_grid(input);
  const int64_t plane = static_cast<int64_t>(grid.x) * grid.y;
  const auto planes = static_cast<unsigned>(ceil_div(ceil_div(weight_threads<kTapsBeside>(weights), kThreads), plane));
  if (grid.z + planes > 65535) {  // a grid's limit
    if (const auto error = launch_conv_weights(weights, stream)) return error;
    return launch_transpose(input, stream);
  }
  grid.z += planes;
  return switch_weights(weights.dtype, [&]<typename T>() {
    return launch(conv_operands_kernel<T>, grid, dim3(kThreads), 0, 1, facts, stream, weights, input,
                  transpose_pieces(input), static_cast<int>(planes));
  });
}

}  // namespace styleforge::cuda
