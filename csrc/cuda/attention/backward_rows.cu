// What both gradient kernels need of every query: its logsumexp in powers of two, and delta, the sum of its
// grad_output * output. Rounded up to whole tiles, so that they read them without a look at the length: what is not
// there has a logsumexp of infinity, and with it weights of 0. A query that sees no key has it, too.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/types.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // of a row

template <typename T>
__global__ void __launch_bounds__(kThreads) attention_rows_kernel(const __grid_constant__ AttentionRows r) {
  wait_for_predecessor();
  release_successor();
  constexpr int kWidth = kFullWidth<T>;
  constexpr int kVectors = kHalfAttentionBackwardHead / kWidth / kLanes;  // of a lane, at most
  const int padded = attention_rows(r.length);
  // Heads of a token lie side by side.
  const uint32_t i = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int token = static_cast<int>(i / static_cast<uint32_t>(r.heads));
  const int head = static_cast<int>(i - static_cast<uint32_t>(token) * static_cast<uint32_t>(r.heads));
  const int lane = threadIdx.x % kLanes;
  const bool there = token < r.length;
  const int64_t row = (static_cast<int64_t>(blockIdx.y) * r.length + token) * r.heads + head;
  Vec<T, kWidth> x[kVectors], g[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = (lane + kLanes * k) * kWidth;
    x[k] = g[k] = {};
    if (there && column < r.head_dim) {
      const int64_t at = (row * r.head_dim + column) / kWidth;
      x[k] = load_const<Vec<T, kWidth>>(r.output, at);
      g[k] = load_const<Vec<T, kWidth>>(r.grad_output, at);
    }
  }
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = fmaf(to_acc(g[k].data[j]), to_acc(x[k].data[j]), sum);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  if (lane != 0 || token >= padded) return;
  constexpr float kInfinity = __builtin_huge_valf();
  const int64_t which = static_cast<int64_t>(blockIdx.y) * r.heads + head;
  const float logsumexp = there ? r.logsumexp[which * r.length + token] : kInfinity;
  r.rows_logsumexp[which * padded + token] = logsumexp == -kInfinity ? kInfinity : logsumexp * kLog2E;
  r.rows_delta[which * padded + token] = sum;
}

}  // namespace

cudaError_t launch_attention_rows(const AttentionRows& r, DType dtype, const DeviceFacts& facts, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(attention_rows(r.length)) * r.heads;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kThreads / kLanes)), static_cast<unsigned>(r.batch));
  switch (dtype) {
    case DType::kFloat32:
      return launch(attention_rows_kernel<float>, grid, dim3(kThreads), 0, 1, facts, stream, r);
    case DType::kFloat16:
      return launch(attention_rows_kernel<__half>, grid, dim3(kThreads), 0, 1, facts, stream, r);
    case DType::kBFloat16:
      return launch(attention_rows_kernel<__nv_bfloat16>, grid, dim3(kThreads), 0, 1, facts, stream, r);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
