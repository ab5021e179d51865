// The three launches of launch.h as one, for float32: every block has its part of one of the three, in this order, and
// waits for the blocks before it whose results it reads.
//
//   blocks:  [ projections ][ heads' attention ][ output ]       a flag for each block of the first two
//
// This is for the host: there a launch costs 3 us, and a sequence this short waits for the host. (On the GPU it takes
// 0.7 us less to 1.4 us more than the three, of 8 to 16.) A cooperative launch whose grid waits for itself was here
// before; that kind costs the host 0.7 us more than any other (one H200).
//
// Blocks start in the order of their indices and wait for lower ones alone, so those that are waited for have started:
// nothing stands still, however few blocks find room and whatever else runs. A flag is raised by a number that no other
// launch of this process has, nor by any chance memory, so that flags need no launch before this one that lowers
// them. In a graph every replay would have the same number: there the three launches stay. Bits are the same.
#pragma once

#include "../common/cluster.cuh"
#include "heads.cuh"
#include "output.cuh"

namespace styleforge::cuda {

constexpr int kTogetherOutRows = 16;

// Blocks of each of the three parts: rows fastest, then heads or columns, then samples.
struct TogetherPlan {
  int row_blocks = 1;                       // of a sample
  int project = 1, attend = 1, output = 1;  // blocks
  int out_columns = 1;                      // blocks of columns of the output
  int padded = 0;                           // bytes for hidden tokens
  uint64_t* flags = nullptr;                // [project + attend]
  uint64_t raised = 0;
};

#ifdef STYLEFORGE_HAS_MMA
// What this block wrote is there for those that see its flag.
__device__ __forceinline__ void raise_flag(const TogetherPlan& plan, int block) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(plan.flags + block), "l"(plan.raised) : "memory");
}
__device__ __forceinline__ void wait_for_flag(const TogetherPlan& plan, int block) {
  while (true) {
    uint64_t now;
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(now) : "l"(plan.flags + block) : "memory");
    if (now == plan.raised) return;
    __nanosleep(20);
  }
}

// By all threads: blocks [first, first + count).
__device__ __forceinline__ void wait_for_flags(const TogetherPlan& plan, int first, int count) {
  for (int i = threadIdx.x; i < count; i += kSmallThreads) wait_for_flag(plan, first + i);
  __syncthreads();
}

// By all threads: the attention of all heads for these tokens, which count through the samples.
template <int kRows>
__device__ __forceinline__ void wait_for_heads(const SmallAttentionParams& p, const TogetherPlan& plan, int first_token,
                                               int end) {
  for (int token = first_token; token < end;) {
    const int sample = token / p.length, row = token % p.length, row_block = row / kRows;
    for (int head = threadIdx.x; head < p.heads; head += kSmallThreads) {
      wait_for_flag(plan, plan.project + row_block + plan.row_blocks * (head + p.heads * sample));
    }
    token += min((row_block + 1) * kRows, p.length) - row;
  }
  __syncthreads();
}
#endif  // STYLEFORGE_HAS_MMA

// kProjected: of a head in the first part: all of it, or, of a head of 64, half.
template <typename Math, int kHeadDim, int kProjected, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_together_kernel(const __grid_constant__ SmallAttentionParams p, const __grid_constant__ TogetherPlan plan) {
#ifdef STYLEFORGE_HAS_MMA
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kParts = kHeadDim / kProjected;
  int block = static_cast<int>(blockIdx.x);
  wait_for_predecessor();
  release_successor();
  if (block < plan.project) {
    const int row_block = block % plan.row_blocks, other = block / plan.row_blocks;
    SmallAttentionParams parts = p;
    parts.heads *= kParts;
    parts.head_dim /= kParts;
    project_rows(HeadBlock<Math, kProjected, kRows>{parts, other % parts.heads, other / parts.heads, row_block * kRows},
                 memory);
    raise_flag(plan, block);
    return;
  }
  block -= plan.project;
  if (block < plan.attend) {
    const int row_block = block % plan.row_blocks, other = block / plan.row_blocks;
    wait_for_flags(plan, plan.row_blocks * kParts * other, plan.row_blocks * kParts);
    attend_rows(HeadBlock<Math, kHeadDim, kRows>{p, other % p.heads, other / p.heads, row_block * kRows}, memory,
                plan.padded);
    raise_flag(plan, plan.project + block);
    return;
  }
  block -= plan.attend;
  const int first_row = block / plan.out_columns * kTogetherOutRows;
  project_output<Math, kTogetherOutRows>(p, memory, block % plan.out_columns * kOutColumns, first_row, [&] {
    wait_for_heads<kRows>(p, plan, first_row, min(first_row + kTogetherOutRows, p.batch * p.length));
  });
#endif
}

template <typename Math, int kHeadDim, int kRows>
cudaError_t launch_together(const SmallAttentionParams& p, TogetherPlan plan, const DeviceFacts& facts,
                            cudaStream_t stream) {
  constexpr int kProjected = kHeadDim == 64 ? 32 : kHeadDim;
  const int bytes = std::max({ProductTile<Math, kRows, 3 * kProjected>::kRingBytes,
                              plan.padded + HeadTile<Math, kHeadDim, kRows>::bytes(p.length),
                              ProductTile<Math, kTogetherOutRows, kOutColumns>::kRingBytes});
  const int blocks = plan.project + plan.attend + plan.output;
  return launch(small_together_kernel<Math, kHeadDim, kProjected, kRows>, dim3(static_cast<unsigned>(blocks)),
                dim3(kSmallThreads), static_cast<size_t>(bytes), 1, facts, stream, p, plan);
}

template <typename Math>
cudaError_t launch_together(const SmallAttentionParams& p, const SmallAttentionSchedule& s, const TogetherPlan& plan,
                            const DeviceFacts& facts, cudaStream_t stream) {
  if (s.head_dim == 32) {
    return s.rows == 16 ? launch_together<Math, 32, 16>(p, plan, facts, stream)
                        : launch_together<Math, 32, 32>(p, plan, facts, stream);
  }
  if (s.head_dim == 64) {
    return s.rows == 16 ? launch_together<Math, 64, 16>(p, plan, facts, stream)
                        : launch_together<Math, 64, 32>(p, plan, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace styleforge::cuda
