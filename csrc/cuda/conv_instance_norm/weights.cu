// Weights of any strides as [out_channels, taps, in_channels], for float32 accuracy split in two TF32 numbers.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) conv_weights_kernel(const __grid_constant__ ConvWeightsParams p) {
  wait_for_predecessor();
  release_successor();
  const int index = blockIdx.x * kThreads + threadIdx.x;
  const bool by_columns = p.column_rows > 0;
  const int taps = by_columns ? p.kernel_h : p.kernel_h * p.kernel_w;
  if (index >= (by_columns ? p.column_rows : p.out_channels) * taps * p.in_channels) return;
  const int ci = index % p.in_channels;
  const int rest = index / p.in_channels;
  const int tap = rest % taps;
  const int row = rest / taps;
  const int y = by_columns ? tap : tap / p.kernel_w;
  const int x = by_columns ? row / p.out_channels : tap - y * p.kernel_w;
  const int co = by_columns ? row - x * p.out_channels : row;
  T value{};
  if (x < p.kernel_w) {
    value = static_cast<const T*>(p.weight)[co * p.stride[0] + ci * p.stride[1] + y * p.stride[2] + x * p.stride[3]];
  }
  if constexpr (sizeof(T) == 4) {
    if (p.output_lo != nullptr) {
      split_tf32(value, static_cast<float*>(p.output)[index], static_cast<float*>(p.output_lo)[index]);
      return;
    }
  }
  static_cast<T*>(p.output)[index] = value;
}

}  // namespace

cudaError_t launch_conv_weights(const ConvWeightsParams& params, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t rows = params.column_rows > 0 ? params.column_rows : int64_t{params.out_channels} * params.kernel_w;
  const int64_t count = rows * params.in_channels * params.kernel_h;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(count, kThreads)));
  switch (params.dtype) {
    case DType::kFloat32:
      return launch(conv_weights_kernel<float>, grid, dim3(kThreads), 0, 1, facts, stream, params);
    case DType::kFloat16:
    case DType::kBFloat16:
      return launch(conv_weights_kernel<uint16_t>, grid, dim3(kThreads), 0, 1, facts, stream, params);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
