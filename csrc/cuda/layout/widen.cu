// float32 of 16-bit elements, as they lie: the last step of a gradient under autocast. ATen's copy between dtypes reads
// two bytes at a time: 12.6 us for four million elements that the L2 cache has not, and this one 6.5. (11.3 where a
// thread had eight elements, which it stores in two pieces: a warp then writes halves of sectors.)
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "widen.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // a thread's
constexpr int kWidth = 4;    // elements of one

template <typename T>
__global__ void __launch_bounds__(kThreads) widen_kernel(const T* input, float* output, int64_t count) {
  using V = Vec<T, kWidth>;
  using Out = Vec<float, kWidth>;
  wait_for_predecessor();
  release_successor();
  const int64_t vectors = count / kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kVectors + threadIdx.x;
  V in[kVectors];
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (first + u * kThreads < vectors) in[u] = load_const<V>(input, first + u * kThreads);
  }
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (first + u * kThreads >= vectors) break;
    Out out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.data[k] = to_acc(in[u].data[k]);
    store(output, first + u * kThreads, out);
  }
  const int64_t rest = vectors * kWidth + first;  // fewer than a vector's, by the first threads of the grid
  if (rest < count && first < kWidth) output[rest] = to_acc(input[rest]);
}

}  // namespace

cudaError_t launch_widen(const WidenParams& params, cudaStream_t stream) {
  if (!aligned16(params.output) || !aligned16(params.input)) return cudaErrorInvalidValue;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto grid = static_cast<unsigned>(ceil_div(params.count, kThreads * kVectors * kWidth));
  const auto with = [&]<typename T>() {
    return launch(widen_kernel<T>, dim3(grid), dim3(kThreads), 0, 1, facts, stream, static_cast<const T*>(params.input),
                  static_cast<float*>(params.output), params.count);
  };
  switch (params.dtype) {
    case DType::kFloat16:
      return with.template operator()<__half>();
    case DType::kBFloat16:
      return with.template operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
