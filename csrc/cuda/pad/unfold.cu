// A convolution's kernel of few input channels, column by column: what its columns read becomes channels,
//
//   output[n, y, x, j * C + c] = pad(input)[n, c, y, x + j],    j < kernel_width
//
// after which the convolution has one column, kernel_width times as many channels, and the same multiplications; tensor
// cores have no use for three channels (cuDNN's 9x9 with 3 -> 32 channels 8x264x264 in half: 194 us forward, 425 and
// 290 backward). The other dimension of the kernel stays in the convolution: all 81 taps as channels would be nine
// times the memory.
//
// A block takes a piece of a row: its pixels with their padding go into shared memory as C elements each, where the
// columns of a pixel are neighbours: channel j * C + c of pixel x is element x * C + (j * C + c). A thread writes one
// 16-byte vector. (Without the piece in shared memory, every element's place worked out by itself, 36 us for 8x264x256
// pixels of 27 channels in half.)
#include "unfold.h"

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "source.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 512;  // pixels

template <typename Element, int kChannels>
__global__ void __launch_bounds__(kThreads)
    unfold_kernel(const __grid_constant__ UnfoldParams p, int per_pixel, int piece) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Element));
  using V = Vec<Element, kWidth>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* pixels = reinterpret_cast<Element*>(shared);
  wait_for_predecessor();
  release_successor();
  const int taken = p.kernel_width * kChannels;
  const int begin = static_cast<int>(blockIdx.x) * piece;
  const int count = min(piece, p.out_width - begin);
  const int staged = (count + p.kernel_width - 1) * kChannels;
  for (int64_t row = blockIdx.y; row < p.batch * p.out_height; row += gridDim.y) {
    const int64_t n = row / p.out_height;
    const int y = source(static_cast<int>(row - n * p.out_height) - p.pad_top, p.height, p.mode);
    const auto* from = static_cast<const Element*>(p.input) + n * p.stride[0] + (y < 0 ? 0 : y) * p.stride[2];
    for (int i = threadIdx.x; i < staged; i += kThreads) {
      const int pixel = i / kChannels;
      const int x = source(begin + pixel - p.pad_left, p.width, p.mode);
      Element value{};
      if (x >= 0 && y >= 0) value = from[(i - pixel * kChannels) * p.stride[1] + x * p.stride[3]];
      pixels[i] = value;
    }
    __syncthreads();
    auto* to = static_cast<V*>(p.output) + (row * p.out_width + begin) * per_pixel;
    for (int i = threadIdx.x; i < count * per_pixel; i += kThreads) {
      const int pixel = i / per_pixel;
      const int first = (i - pixel * per_pixel) * kWidth;
      V vector = {};
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (first + k < taken) vector.data[k] = pixels[pixel * kChannels + first + k];
      }
      to[i] = vector;
    }
    __syncthreads();  // before the next row's pixels
  }
}

template <typename Element>
cudaError_t launch_as(const UnfoldParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int per_pixel = params.out_channels * params.element_size / 16;
  const int64_t rows = params.batch * params.out_height;
  const int piece = params.out_width < kPiece ? params.out_width : kPiece;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(params.out_width, piece)),
                         static_cast<unsigned>(rows < 65535 ? rows : 65535));
  const size_t bytes = static_cast<size_t>(piece + params.kernel_width - 1) * params.channels * sizeof(Element);
  const auto with = [&](auto* kernel) {
    return launch(kernel, grid, dim3(kThreads), bytes, 1, facts, stream, params, per_pixel, piece);
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
