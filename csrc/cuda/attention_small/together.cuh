// The three launches of launch.h as one whose blocks wait for one another, for float32.
//
// On the GPU two such waits take longer than the starts of two dependent launches do, by 0.6 to 1.9 us of 7 to 14 (one
// H200). On the host a call takes 10.9 us instead of 16, of which the launches are most, and sequences that are this
// short wait for the host. So this is what runs, unless the call is being captured in a graph. Bits are the same.
#pragma once

#include <cooperative_groups.h>

#include "../common/cluster.cuh"
#include "heads.cuh"
#include "output.cuh"

namespace styleforge::cuda {

constexpr int kTogetherOutRows = 16;

// Blocks of one of the three parts: rows fastest, then heads or columns, then samples.
struct TogetherPlan {
  int row_blocks = 1;                       // of a sample
  int project = 1, attend = 1, output = 1;  // blocks
  int out_columns = 1;                      // blocks of columns of the output
  int padded = 0;                           // bytes for hidden tokens
};

// kProjected: of a head in the first part: all of it, or, of a head of 64, half.
template <typename Math, int kHeadDim, int kProjected, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_together_kernel(const __grid_constant__ SmallAttentionParams p, const __grid_constant__ TogetherPlan plan) {
#ifdef STYLEFORGE_HAS_MMA
  extern __shared__ __align__(128) unsigned char memory[];
  const int block = static_cast<int>(blockIdx.x);
  const int row_block = block % plan.row_blocks, other = block / plan.row_blocks;
  wait_for_predecessor();
  release_successor();
  if (block < plan.project) {
    SmallAttentionParams parts = p;
    parts.heads *= kHeadDim / kProjected;
    parts.head_dim /= kHeadDim / kProjected;
    project_rows(HeadBlock<Math, kProjected, kRows>{parts, other % parts.heads, other / parts.heads, row_block * kRows},
                 memory);
  }
  cooperative_groups::this_grid().sync();
  if (block < plan.attend) {
    attend_rows(HeadBlock<Math, kHeadDim, kRows>{p, other % p.heads, other / p.heads, row_block * kRows}, memory,
                plan.padded);
    __syncthreads();  // what follows writes where this was read
  }
  const auto wait = [] { cooperative_groups::this_grid().sync(); };
  if (block >= plan.output) {
    wait();
    return;
  }
  project_output<Math, kTogetherOutRows>(p, memory, block % plan.out_columns * kOutColumns,
                                         block / plan.out_columns * kTogetherOutRows, wait);
#endif
}

template <typename Math, int kHeadDim, int kRows>
cudaError_t launch_together(const SmallAttentionParams& p, const DeviceFacts& facts, cudaStream_t stream) {
  constexpr int kProjected = kHeadDim == 64 ? 32 : kHeadDim;
  TogetherPlan plan;
  plan.padded = padded_length(p.length);
  plan.row_blocks = static_cast<int>(ceil_div(p.length, kRows));
  plan.attend = plan.row_blocks * p.heads * p.batch;
  plan.project = plan.attend * (kHeadDim / kProjected);
  plan.out_columns = static_cast<int>(ceil_div(p.embed, kOutColumns));
  plan.output = plan.out_columns * static_cast<int>(ceil_div(int64_t{p.batch} * p.length, kTogetherOutRows));
  const int bytes = std::max({ProductTile<Math, kRows, 3 * kProjected>::kRingBytes,
                              plan.padded + HeadTile<Math, kHeadDim, kRows>::bytes(p.length),
                              ProductTile<Math, kTogetherOutRows, kOutColumns>::kRingBytes});
  const int blocks = std::max({plan.project, plan.attend, plan.output});
  return launch(small_together_kernel<Math, kHeadDim, kProjected, kRows>, dim3(static_cast<unsigned>(blocks)),
                dim3(kSmallThreads), static_cast<size_t>(bytes), Together{1, true}, facts, stream, p, plan);
}

template <typename Math>
cudaError_t launch_together(const SmallAttentionParams& p, const SmallAttentionSchedule& s, const DeviceFacts& facts,
                            cudaStream_t stream) {
  if (s.head_dim == 32) {
    return s.rows == 16 ? launch_together<Math, 32, 16>(p, facts, stream)
                        : launch_together<Math, 32, 32>(p, facts, stream);
  }
  if (s.head_dim == 64) {
    return s.rows == 16 ? launch_together<Math, 64, 16>(p, facts, stream)
                        : launch_together<Math, 64, 32>(p, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace styleforge::cuda
