// The gradient of padding and upsampling in one pass: one thread writes one vector of grad_input and adds up all places
// of grad_output that were read from it. Gathered, not scattered: every sum has one order and nothing is zeroed first.
//
//   one axis, reflection of 2 (| is the border; the numbers are the pixels that were read):
//
//     2 1 | 0 1 2 ... n-1 | n-2 n-3      a pixel near a border has its own place and one across that border
//
// Inside, which is nearly all, a pixel has the one place (four after an upsampling); those loads leave together. In
// PyTorch the same is a clone of the inner part and four flips and additions, then another pass for the upsampling.
//
// A vector is channels of one pixel in channels_last; NCHW is the same with planes as samples and one channel.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // a thread's, whose loads leave together

// The places on one axis of grad_output that come from position `at` of grad_input: `direct` and, after an upsampling,
// the one behind it; then a run across the border before the picture and a run across the one behind it.
struct Places {
  int direct, own;
  int before, before_count, behind, behind_count;
  int step;

  __device__ __forceinline__ int count() const { return own + before_count + behind_count; }
  __device__ __forceinline__ int operator[](int k) const {
    if (k < own) return direct + k;
    k -= own;
    return k < before_count ? before + step * k : behind + step * (k - before_count);
  }
};

// `size`: of the upsampled axis; `pad` on both sides of it.
__device__ __forceinline__ Places places_of(int at, int upsample, int size, int pad, PaddingMode mode) {
  const int first = at * upsample;
  const int last = first + upsample - 1;
  Places p{first + pad, upsample, 0, 0, 0, 0, 1};
  if (mode == PaddingMode::kReflect) {
    // Position u shows again at pad - u and at pad + 2 (size - 1) - u, where those are in the padding.
    const int low = max(first, 1);
    const int high = max(first, size - 1 - pad);
    p.step = -1;
    p.before = pad - low;
    p.before_count = max(0, min(last, pad) - low + 1);
    p.behind = pad + 2 * (size - 1) - high;
    p.behind_count = max(0, min(last, size - 2) - high + 1);
  } else if (mode == PaddingMode::kReplicate) {
    p.before_count = first == 0 ? pad : 0;
    p.behind = pad + size;
    p.behind_count = last == size - 1 ? pad : 0;
  }
  return p;
}

template <typename T, int kWidth, int kUpsample>
__global__ void __launch_bounds__(kThreads, 3)
    fold_kernel(const __grid_constant__ PadBackwardParams p, int per_pixel, int64_t samples) {
  using Acc = acc_t<T>;
  using V = Vec<T, kWidth>;
  constexpr int kPlaces = kUpsample * kUpsample;
  const int height = static_cast<int>(p.height);
  const int width = static_cast<int>(p.width);
  const int pad_top = static_cast<int>(p.pad_top);
  const int pad_left = static_cast<int>(p.pad_left);
  const int out_height = height * kUpsample + 2 * pad_top;
  const int out_width = width * kUpsample + 2 * pad_left;
  const int count = width * per_pixel;
  wait_for_predecessor();
  release_successor();
  for (int64_t row = blockIdx.y; row < samples * height; row += gridDim.y) {
    const int64_t n = row / height;
    const Places ys = places_of(static_cast<int>(row - n * height), kUpsample, height * kUpsample, pad_top, p.mode);
    const int64_t sample = n * out_height;
    const auto load = [&](int y, int x, int c) {
      return load_const<V>(p.grad_output, ((sample + y) * out_width + x) * per_pixel + c);
    };
    const int first = blockIdx.x * kThreads * kVectors + threadIdx.x;
    V own[kVectors][kPlaces];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = first + u * kThreads;
      if (i >= count) break;
      const int pixel = i / per_pixel;
#pragma unroll
      for (int k = 0; k < kPlaces; ++k) {
        own[u][k] =
            load(ys.direct + k / kUpsample, pixel * kUpsample + pad_left + k % kUpsample, i - pixel * per_pixel);
      }
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = first + u * kThreads;
      if (i >= count) break;
      Acc sum[kWidth] = {};
#pragma unroll
      for (int k = 0; k < kPlaces; ++k) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] += to_acc(own[u][k].data[e]);
      }
      const int pixel = i / per_pixel;
      const Places xs = places_of(pixel, kUpsample, width * kUpsample, pad_left, p.mode);
      const int rows = ys.count();
      const int columns = xs.count();
      if (rows > kUpsample || columns > kUpsample) {
#pragma unroll 1
        for (int j = 0; j < rows; ++j) {
#pragma unroll 1
          for (int k = j < kUpsample ? kUpsample : 0; k < columns; ++k) {
            const V other = load(ys[j], xs[k], i - pixel * per_pixel);
#pragma unroll
            for (int e = 0; e < kWidth; ++e) sum[e] += to_acc(other.data[e]);
          }
        }
      }
      store(p.grad_input, row * count + i, rounded<T, kWidth>(sum));
    }
  }
}

template <typename T, int kWidth>
cudaError_t launch_as(const PadBackwardParams& params, const DeviceFacts& facts, cudaStream_t stream) {
  const int per_pixel = params.channels_last ? static_cast<int>(params.channels) / kWidth : 1;
  const int64_t samples = params.channels_last ? params.batch : params.batch * params.channels;
  const int64_t rows = samples * params.height;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(params.width * per_pixel, kThreads * kVectors)),
                         static_cast<unsigned>(rows < 65535 ? rows : 65535));
  auto* kernel = params.upsample == 1 ? fold_kernel<T, kWidth, 1> : fold_kernel<T, kWidth, 2>;
  return launch(kernel, grid, dim3(kThreads), 0, 1, facts, stream, params, per_pixel, samples);
}

}  // namespace

cudaError_t launch_pad_backward(const PadBackwardParams& params, cudaStream_t stream) {
  if (params.upsample < 1 || params.upsample > 2) return cudaErrorInvalidValue;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto pixel = params.channels * static_cast<int64_t>(size_of(params.dtype));
  const bool vectors =
      params.channels_last && pixel % 16 == 0 && aligned16(params.grad_output) && aligned16(params.grad_input);
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    return vectors ? launch_as<T, kFullWidth<T>>(params, facts, stream) : launch_as<T, 1>(params, facts, stream);
  });
}

}  // namespace styleforge::cuda
