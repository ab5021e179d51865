// Padding + nearest upsampling: one thread writes one vector of the output and looks up where it comes from.
//
//   channels_last: vectors of neighbouring channels of one pixel: the whole vector has one source pixel
//   NCHW:          single elements of a row, neighbouring threads write neighbouring elements; a grid row is one
//                  output row, so that the row's source is worked out once
#include <type_traits>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"
#include "source.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

// What a thread moves as float32 values, each rounded to TF32.
__device__ __forceinline__ uint32_t rounded_tf32(uint32_t v) { return round_bits_to_tf32(v); }
__device__ __forceinline__ uint4 rounded_tf32(const uint4& v) {
  return {round_bits_to_tf32(v.x), round_bits_to_tf32(v.y), round_bits_to_tf32(v.z), round_bits_to_tf32(v.w)};
}

// The flag is the same for all threads: a branch that costs nothing next to the loads.
template <typename Element>
__device__ __forceinline__ Element finish(const Element& value, bool round_tf32) {
  if constexpr (std::is_same_v<Element, uint32_t> || std::is_same_v<Element, uint4>) {
    if (round_tf32) return rounded_tf32(value);
  }
  return value;
}

// Element: what a thread moves. `per_pixel` and `out_per_pixel` count those in a pixel of the input and the output.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    gather_channels_last(const __grid_constant__ PadParams p, int per_pixel, int out_per_pixel) {
  wait_for_predecessor();
  release_successor();
  const int up = p.upsample;
  const auto* in = static_cast<const Element*>(p.input);
  const int count = static_cast<int>(p.out_width) * out_per_pixel;
  for (int64_t row = blockIdx.y; row < p.batch * p.out_height; row += gridDim.y) {  // output rows of all samples
    const int64_t n = row / p.out_height;
    const int y = source(static_cast<int>(row - n * p.out_height - p.pad_top), static_cast<int>(p.height * up), p.mode);
    auto* out = static_cast<Element*>(p.output) + row * count;
    const Element* from = in + (n * p.height + y / up) * p.width * per_pixel;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
      const int pixel = i / out_per_pixel;
      const int c = i - pixel * out_per_pixel;
      const int x = source(pixel - static_cast<int>(p.pad_left), static_cast<int>(p.width * up), p.mode);
      Element value{};
      if (x >= 0 && y >= 0 && c < per_pixel) value = from[x / up * per_pixel + c];
      out[i] = finish(value, p.round_tf32);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) gather_nchw(const __grid_constant__ PadParams p) {
  wait_for_predecessor();
  release_successor();
  const int64_t rows = p.batch * p.channels * p.out_height;
  const int up = p.upsample;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t plane = row / p.out_height;
    const int y = source(static_cast<int>(row % p.out_height - p.pad_top), static_cast<int>(p.height * up), p.mode);
    const auto* in = static_cast<const Element*>(p.input) + (plane * p.height + y / up) * p.width;
    auto* out = static_cast<Element*>(p.output) + row * p.out_width;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < p.out_width; i += gridDim.x * kThreads) {
      const int x = source(static_cast<int>(i - p.pad_left), static_cast<int>(p.width * up), p.mode);
      Element value{};
      if (x >= 0 && y >= 0) value = in[x / up];
      out[i] = finish(value, p.round_tf32);
    }
  }
}

// One thread a pixel: it gathers the few channels and writes them as one vector, zeros behind them.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    gather_picture(const __grid_constant__ PadParams p, int64_t channel_stride, int pixel_stride) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(Element));
  wait_for_predecessor();
  release_successor();
  const int x = blockIdx.x * kThreads + threadIdx.x;
  if (x >= p.out_width) return;
  const int height = static_cast<int>(p.height);
  const int width = static_cast<int>(p.width);
  const int sx = source(x - static_cast<int>(p.pad_left), width, p.mode);
  for (int64_t row = blockIdx.y; row < p.batch * p.out_height; row += gridDim.y) {
    const int64_t n = row / p.out_height;
    const int sy = source(static_cast<int>(row - n * p.out_height - p.pad_top), height, p.mode);
    Vec<Element, kElements> pixel = {};
    if (sx >= 0 && sy >= 0) {
      const auto* from = static_cast<const Element*>(p.input) + n * p.channels * p.height * p.width +
                         (static_cast<int64_t>(sy) * width + sx) * pixel_stride;
#pragma unroll
      for (int c = 0; c < kElements; ++c) {
        if (c < p.channels) pixel.data[c] = from[c * channel_stride];
      }
    }
    static_cast<Vec<Element, kElements>*>(p.output)[row * p.out_width + x] = pixel;
  }
}

template <typename Element>
cudaError_t launch_as(const PadParams& params, const DeviceFacts& facts, cudaStream_t stream) {
  if (params.channels_last) {
    const int ratio = static_cast<int>(sizeof(Element)) / params.element_size;
    const int per_pixel = static_cast<int>(params.channels) / ratio;
    const int out_per_pixel = static_cast<int>(params.out_channels) / ratio;
    const int64_t rows = params.batch * params.out_height;
    const auto grid = dim3(static_cast<unsigned>(ceil_div(params.out_width * out_per_pixel, kThreads * 2)),
                           static_cast<unsigned>(rows < 65535 ? rows : 65535));
    return launch(gather_channels_last<Element>, grid, dim3(kThreads), 0, 1, facts, stream, params, per_pixel,
                  out_per_pixel);
  }
  const int64_t rows = params.batch * params.channels * params.out_height;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(params.out_width, kThreads)),
                         static_cast<unsigned>(rows < 65535 ? rows : 65535));
  return launch(gather_nchw<Element>, grid, dim3(kThreads), 0, 1, facts, stream, params);
}

}  // namespace

cudaError_t launch_pad_upsample(const PadParams& params, cudaStream_t stream) {
  if (params.round_tf32 && params.element_size != 4) return cudaErrorInvalidValue;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t pixel = params.channels * params.element_size;
  const int64_t out_pixel = params.out_channels * params.element_size;
  const bool vectors = params.channels_last && pixel % 16 == 0 && out_pixel % 16 == 0 && aligned16(params.input) &&
                       aligned16(params.output);
  if (vectors) return launch_as<uint4>(params, facts, stream);
  switch (params.element_size) {
    case 2:
      return launch_as<uint16_t>(params, facts, stream);
    case 4:
      return launch_as<uint32_t>(params, facts, stream);
    case 8:
      return launch_as<uint2>(params, facts, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_pad_picture(const PadParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t rows = params.batch * params.out_height;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(params.out_width, kThreads)),
                         static_cast<unsigned>(rows < 65535 ? rows : 65535));
  const int64_t channel_stride = params.channels_last ? 1 : params.height * params.width;
  const int pixel_stride = params.channels_last ? static_cast<int>(params.channels) : 1;
  auto* kernel = params.element_size == 2 ? gather_picture<uint16_t> : gather_picture<uint32_t>;
  return launch(kernel, grid, dim3(kThreads), 0, 1, facts, stream, params, channel_stride, pixel_stride);
}

}  // namespace styleforge::cuda
