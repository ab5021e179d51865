// A convolution with few output channels that conv_columns.cu does not take, by the columns of its kernel: a [Co, Ci,
// kh, kw] kernel is the sum of its kw columns, each a kernel of kh x 1 that reads its input one pixel further right.
// One convolution with kw * Co output channels (conv_sm90.cu) fills the matrix units, which compute at least 32 of
// them; this pass adds up the shifted terms:
//
//   output[y][x][c] = bias[c] + sum over j of columns[y][x + j][j * Co + c]
//
// A block has a run of one row: the pixels it needs pass through shared memory, whose rows are padded so that
// neighbouring pixels fall into different banks.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kPixels = 128;  // of a block, one a thread
constexpr int kMaxChannels = 4;
constexpr int kMaxPitch = 64;
constexpr int kMaxKernel = 16;

template <typename T>
__global__ void __launch_bounds__(kPixels) sum_columns_kernel(const __grid_constant__ SumColumnsParams p) {
  constexpr int kWord = 4 / static_cast<int>(sizeof(T));  // elements of a bank
  __shared__ uint32_t held[(kPixels + kMaxKernel) * (kMaxPitch / kWord + 1)];
  const int row = blockIdx.y;  // of all samples
  const int first = blockIdx.x * kPixels;
  const int width = p.width + p.kernel_w - 1;  // of `columns`
  const int count = min(kPixels + p.kernel_w - 1, width - first);
  const int words = p.pitch / kWord;
  wait_for_predecessor();
  release_successor();
  const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.columns) +
                                                       (static_cast<int64_t>(row) * width + first) * p.pitch);
  for (int i = threadIdx.x; i < count * words; i += kPixels) {
    const int pixel = i / words;
    held[pixel * (words + 1) + i - pixel * words] = from[i];
  }
  __syncthreads();
  const int x = first + threadIdx.x;
  if (x >= p.width) return;
  float sum[kMaxChannels];
#pragma unroll
  for (int c = 0; c < kMaxChannels; ++c) {
    sum[c] = c < p.channels && p.bias != nullptr ? to_acc(static_cast<const T*>(p.bias)[c]) : 0.0f;
  }
  for (int j = 0; j < p.kernel_w; ++j) {
    const T* own = reinterpret_cast<const T*>(&held[(threadIdx.x + j) * (words + 1)]) + j * p.channels;
#pragma unroll
    for (int c = 0; c < kMaxChannels; ++c) {
      if (c < p.channels) sum[c] += to_acc(own[c]);
    }
  }
  const int n = row / p.height;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int64_t pixel = static_cast<int64_t>(row - n * p.height) * p.width + x;
  T* output = static_cast<T*>(p.output) + n * plane * p.channels;
#pragma unroll
  for (int c = 0; c < kMaxChannels; ++c) {
    if (c < p.channels) output[p.channels_last ? pixel * p.channels + c : c * plane + pixel] = from_acc<T>(sum[c]);
  }
}

}  // namespace

bool takes_sum_columns(const SumColumnsParams& p) {
  return p.channels <= kMaxChannels && p.pitch <= kMaxPitch && p.kernel_w <= kMaxKernel &&
         int64_t{p.batch} * p.height <= 65535;
}

cudaError_t launch_sum_columns(const SumColumnsParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(p.width, kPixels)), static_cast<unsigned>(p.batch * p.height));
  return switch_dtype(p.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      return launch(sum_columns_kernel<T>, grid, dim3(kPixels), 0, 1, facts, stream, p);
    }
  });
}

}  // namespace styleforge::cuda
