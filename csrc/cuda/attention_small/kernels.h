// The launches behind launch.h.
#pragma once

#include "../common/launch.h"
#include "../common/overrides.h"
#include "launch.h"

namespace styleforge::cuda {

constexpr int kSmallMaxLength = 4096;  // a byte a key lies in shared memory

// Up to the second projection. Of 16-bit numbers and of float32, for they are two files.
cudaError_t launch_small_heads_16_bit(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                                      cudaStream_t stream);
cudaError_t launch_small_heads_float32(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                                       cudaStream_t stream);
cudaError_t launch_small_output(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                                cudaStream_t stream);

// All of it in one launch (whole.cuh): queries of a block, 0 where that takes or pays not.
int small_whole_rows(const SmallAttentionParams& params, const DeviceFacts& facts, const Overrides& overrides);
cudaError_t launch_small_whole(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                               cudaStream_t stream);

// The three launches as one (together.cuh).
bool small_together_takes(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                          const DeviceFacts& facts);
cudaError_t launch_small_together(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule,
                                  cudaStream_t stream);

}  // namespace styleforge::cuda
