// A convolution's kernel of few input channels, column by column: what its columns read becomes channels,
//
//   output[n, y, x, j * C + c] = pad(input)[n, c, y, x + j],    j < kernel_width
//
// after which the convolution has one column, kernel_width times as many channels, and the same multiplications; tensor
// cores have no use for three channels (cuDNN's 9x9 with 3 -> 32 channels 8x264x264 in half: 194 us forward, 425 and
// 290 backward). The other dimension of the kernel stays in the convolution: all 81 taps as channels would be nine
// times the memory.
//
// One thread writes one 16-byte vector of a pixel. It reads its elements one by one, through the L1 cache: nine pixels
// in a row want each of them. Padding is where an element is read from.
#include "unfold.h"

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

// Source coordinate on an axis of `size` elements, or -1 for a zero.
__device__ __forceinline__ int source(int position, int size, PaddingMode mode) {
  if (position >= 0 && position < size) return position;
  switch (mode) {
    case PaddingMode::kReflect:
      return position < 0 ? -position : 2 * (size - 1) - position;
    case PaddingMode::kReplicate:
      return position < 0 ? 0 : size - 1;
    default:
      return -1;
  }
}

template <typename Element, int kChannels>
__global__ void __launch_bounds__(kThreads) unfold_kernel(const __grid_constant__ UnfoldParams p, int per_pixel) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Element));
  wait_for_predecessor();
  release_successor();
  const int count = p.out_width * per_pixel;
  const int taken = p.kernel_width * kChannels;
  for (int64_t row = blockIdx.y; row < p.batch * p.out_height; row += gridDim.y) {
    const int64_t n = row / p.out_height;
    const int y = source(static_cast<int>(row - n * p.out_height) - p.pad_top, p.height, p.mode);
    const auto* from = static_cast<const Element*>(p.input) + n * p.stride[0] + (y < 0 ? 0 : y) * p.stride[2];
    auto* to = static_cast<Vec<Element, kWidth>*>(p.output) + row * count;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
      const int pixel = i / per_pixel;
      const int first = (i - pixel * per_pixel) * kWidth;
      Vec<Element, kWidth> vector = {};
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int j = (first + k) / kChannels;
        const int c = (first + k) - j * kChannels;
        const int x = source(pixel + j - p.pad_left, p.width, p.mode);
        if (first + k < taken && x >= 0 && y >= 0) vector.data[k] = from[c * p.stride[1] + x * p.stride[3]];
      }
      to[i] = vector;
    }
  }
}

template <typename Element>
cudaError_t launch_as(const UnfoldParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int per_pixel = params.out_channels * params.element_size / 16;
  const int64_t rows = params.batch * params.out_height;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(static_cast<int64_t>(params.out_width) * per_pixel, kThreads)),
                         static_cast<unsigned>(rows < 65535 ? rows : 65535));
  const auto with = [&](auto* kernel) {
    return launch(kernel, grid, dim3(kThreads), 0, 1, facts, stream, params, per_pixel);
  };
  switch (params.channels) {
    case 1:
      return with(unfold_kernel<Element, 1>);
    case 2:
      return with(unfold_kernel<Element, 2>);
    case 3:
      return with(unfold_kernel<Element, 3>);
    case 4:
      return with(unfold_kernel<Element, 4>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_unfold_columns(const UnfoldParams& params, cudaStream_t stream) {
  if (!aligned16(params.output) || params.out_channels * params.element_size % 16 != 0) return cudaErrorInvalidValue;
  switch (params.element_size) {
    case 2:
      return launch_as<uint16_t>(params, stream);
    case 4:
      return launch_as<uint32_t>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace styleforge::cuda
