// A whole attention block for short sequences, where launches and latencies are what takes the time:
//
//   qkv = x qkv_weight^T + qkv_bias;  heads = softmax(scale q k^T) v of each head;  output = heads out_weight^T +
//   out_bias
//
// in one launch (whole.cuh: 16-bit numbers of some widths, without what a backward needs), or in three, each of which
// starts while the one before it drains: float32 (3xTF32 to float32 accuracy, or TF32), float16, bfloat16. Sums are in
// float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

struct SmallAttentionParams {
  const void* input = nullptr;       // [batch, length, embed], neighbouring columns; rows that begin at 16 bytes
  const void* qkv_weight = nullptr;  // [3 embed, embed], dense
  const void* qkv_bias = nullptr;    // [3 embed] or null
  const void* out_weight = nullptr;  // [embed, embed], dense
  const void* out_bias = nullptr;    // [embed] or null
  const bool* hidden = nullptr;      // [batch, length], true where a key takes no part, or null
  void* qkv = nullptr;               // [batch, length, 3, heads, head_dim], dense
  void* attended = nullptr;          // [batch, length, heads, head_dim], dense
  float* logsumexp = nullptr;        // [batch, heads, length], dense, or null
  void* output = nullptr;            // [batch, length, embed], dense
  void* flags = nullptr;             // small_together_flag_bytes()

  int64_t input_stride[2] = {0, 0};   // of samples and rows, in elements
  int64_t hidden_stride[2] = {0, 0};  // of samples and keys
  int batch = 0, length = 0, embed = 0, heads = 1, head_dim = 0;
  float scale = 1;
  bool is_causal = false;
  bool tf32 = false;  // float32 by operands rounded to TF32
  DType dtype = DType::kFloat32;
};

struct SmallAttentionSchedule {
  int head_dim = 32;    // as the kernel has it, at least the one given
  int rows = 32;        // of queries in a block, 16 or 32
  bool halves = false;  // a block of the first projection has half of a head of 64
  int out_rows = 32;    // of a block of the second projection, 16 or 32

  bool together = false;  // the three launches as one; never in a graph
  int whole_rows = 0;     // of queries in a block of the one launch, 16 or 32; 0: three
};

// Whether the three launches take this shape on the current device, and faster than ATen's do; fills the schedule if
// so, and its whole_rows where the one launch does.
cudaError_t schedule_small_attention(const SmallAttentionParams& params, SmallAttentionSchedule& schedule,
                                     bool& supported);

// Whether the operands lie in memory as the kernels read them, in vectors of 16 bytes.
bool small_attention_takes_memory(const SmallAttentionParams& params);
// The same for the one launch, which neither reads nor writes `qkv`, `attended` and `logsumexp`.
bool small_whole_takes_memory(const SmallAttentionParams& params);

// Of memory that the three launches as one need besides, of any contents; 0 where they are three.
size_t small_together_flag_bytes(const SmallAttentionParams& params, const SmallAttentionSchedule& schedule);

// The schedule is afterwards what ran.
cudaError_t launch_small_attention(const SmallAttentionParams& params, SmallAttentionSchedule& schedule,
                                   cudaStream_t stream);

}  // namespace styleforge::cuda
