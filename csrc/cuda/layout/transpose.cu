// From one memory format to the other: a tile a block (transpose.cuh).
#include "transpose.cuh"

#include "../common/cluster.cuh"
#include "../common/launch.h"

namespace styleforge::cuda {
namespace {

template <typename Element, bool kToChannelsLast>
__global__ void __launch_bounds__(kTransposeThreads, 8)
    transpose_kernel(const __grid_constant__ TransposeParams p, const __grid_constant__ TransposePieces pieces) {
  wait_for_predecessor();
  release_successor();
  transpose_tile<Element, kToChannelsLast>(p, pieces, blockIdx.z, blockIdx.y, blockIdx.x);
}

template <typename Element>
cudaError_t launch_as(const TransposeParams& p, const DeviceFacts& facts, cudaStream_t stream) {
  auto* kernel = p.to_channels_last ? transpose_kernel<Element, true> : transpose_kernel<Element, false>;
  return launch(kernel, transpose_grid(p), dim3(kTransposeThreads), 0, 1, facts, stream, p, transpose_pieces(p));
}

}  // namespace

bool takes_transpose(const TransposeParams& p) {
  const dim3 grid = transpose_grid(p);
  return (p.element_size == 2 || p.element_size == 4) && grid.y <= 65535 && grid.z <= 65535 && p.batch > 0 &&
         p.channels > 0 && p.pixels > 0;
}

cudaError_t launch_transpose(const TransposeParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (p.element_size) {
    case 2:
      return launch_as<uint16_t>(p, facts, stream);
    case 4:
      return launch_as<uint32_t>(p, facts, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
