// Attention of every head, float32 to float32 accuracy on tensor cores, for any length:
//
//   output = softmax(scale * q k^T) v          q, k, v [batch, length, heads, head_dim], rows of any stride
//
// No tensor of [length, length] exists: keys come in tiles, with a running softmax (Milakov, Gimelshein: Online
// normalizer calculation for softmax, 2018, arXiv:1805.02867; Dao: FlashAttention-2, 2023, arXiv:2307.08691).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

struct TiledAttentionParams {
  const float* q = nullptr;  // [batch, length, heads, head_dim]; heads dense, tokens row_stride apart
  const float* k = nullptr;
  const float* v = nullptr;
  const bool* key_padding_mask = nullptr;  // [batch, length], true where a key takes no part; or null
  float* output = nullptr;                 // [batch, length, heads, head_dim], dense
  float* logsumexp = nullptr;              // [batch, heads, length], dense, or null; infinity where no key is seen

  int64_t row_stride = 0, batch_stride = 0;  // in elements
  int64_t mask_stride[2] = {0, 1};
  int batch = 0, heads = 0, length = 0, head_dim = 0;
  float scale = 1;
  bool is_causal = false;
};

struct TiledAttentionSchedule {
  int head = 0;          // head_dim, rounded up to what there is a kernel for
  int tiles = 0;         // of queries, a head
  int blocks = 0;        // of the grid: tiles x heads x batch
  bool vectors = false;  // rows are read in 16 bytes
  bool turns = true;     // the warpgroups of a block take turns at the tensor cores
};

// Whether the kernels take this case on the current device, and are faster than ATen's; fills the schedule if they take
// it and either that is so or STYLEFORGE_PATH asks for them.
cudaError_t schedule_tiled_attention(const TiledAttentionParams& params, TiledAttentionSchedule& schedule,
                                     bool& supported);

cudaError_t launch_tiled_attention(const TiledAttentionParams& params, const TiledAttentionSchedule& schedule,
                                   cudaStream_t stream);

// What the gradient of every query needs, made of what the forward kept by the first launch of a backward.
constexpr int attention_rows(int length) { return (length + 127) / 128 * 128; }
struct AttentionRows {
  const void* output = nullptr;       // [batch, length, heads, head_dim], dense
  const void* grad_output = nullptr;  // the same
  const float* logsumexp = nullptr;   // [batch, heads, length], dense
  float* rows_logsumexp = nullptr;    // [batch, heads, attention_rows(length)]: in powers of two; aligned to 16 bytes
  float* rows_delta = nullptr;        // the same: grad_output * output
  int batch = 0, heads = 0, length = 0, head_dim = 0;
};

// The gradients, from the logsumexp that the forward kept: weights are computed again, and sums have a fixed order.
struct TiledAttentionBackwardParams {
  TiledAttentionParams forward;
  AttentionRows rows;
  const float* grad_output = nullptr;  // [batch, length, heads, head_dim], dense
  float* grad_q = nullptr;             // as q, k and v: heads dense, tokens grad_row_stride apart
  float* grad_k = nullptr;
  float* grad_v = nullptr;
  int64_t grad_row_stride = 0, grad_batch_stride = 0;
};

cudaError_t schedule_tiled_attention_backward(const TiledAttentionBackwardParams& params,
                                              TiledAttentionSchedule& schedule, bool& supported);

// Three launches: rows, the gradient of q, those of k and v.
cudaError_t launch_tiled_attention_backward(const TiledAttentionBackwardParams& params,
                                            const TiledAttentionSchedule& schedule, cudaStream_t stream);

// The same of 16 bits.
struct HalfAttentionBackwardParams {
  AttentionRows rows;
  DType dtype = DType::kBFloat16;
  const void* qkv = nullptr;  // [batch, length, 3, heads, head_dim], dense
  void* grad_qkv = nullptr;   // the same
  const bool* key_padding_mask = nullptr;
  int64_t mask_stride[2] = {0, 1};
  int batch = 0, heads = 0, length = 0, head_dim = 0;
  float scale = 1;
  bool is_causal = false;
};

cudaError_t schedule_half_attention_backward(const HalfAttentionBackwardParams& params,
                                             TiledAttentionSchedule& schedule, bool& supported);

cudaError_t launch_half_attention_backward(const HalfAttentionBackwardParams& params,
                                           const TiledAttentionSchedule& schedule, cudaStream_t stream);

}  // namespace styleforge::cuda
