// What the schedule and the kernels behind launch.h share.
#pragma once

#include "../common/launch.h"
#include "launch.h"

namespace styleforge::cuda {

constexpr int kTiledAttentionRows = 128;  // queries a block
constexpr int kTiledAttentionMaxHead = 128;
constexpr int kWideAttentionMaxHead = 256;  // of the kernel for heads beyond that
constexpr int kTiledAttentionBackwardHead = 64;
constexpr int kHalfAttentionBackwardHead = 128;

cudaError_t launch_wide_attention(const TiledAttentionParams& params, const TiledAttentionSchedule& schedule,
                                  cudaStream_t stream);

cudaError_t launch_attention_rows(const AttentionRows& rows, DType dtype, const DeviceFacts& facts,
                                  cudaStream_t stream);

}  // namespace styleforge::cuda
