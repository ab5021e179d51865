// fused_attention, the part that CPU and CUDA share: checks, shapes, the order of the stages
//
//   matrix product (Q, K and V in one) -> attention of each head -> matrix product
//
// The products are ATen's or the device's own, and what runs between them is a device's choice; a device's own kernels
// for the whole take the call before this one (see the device's fused_attention). Where a gradient is needed, the first
// product, the attention's result and the logarithms of the softmax's denominators are kept: 4 embed + heads numbers a
// token. No [length, length] tensor exists on any path.
#pragma once

#include "checks.h"

#include <tuple>

namespace styleforge {

// Which of the three operators was called. kAuto leaves the choice between the two designs to the device.
enum class AttentionVersion : int { kAuto = 0, kV1 = 1, kV2 = 2 };

// Tensors are borrowed; those that were left out have no handle.
struct AttentionArgs {
  AttentionVersion version;
  TensorFacts input;  // [batch, length, embed]
  TensorFacts qkv_weight, qkv_bias, out_weight, out_bias;
  int64_t heads;
  std::optional<double> scale;
  bool is_causal;
  TensorFacts key_padding_mask;
  const Text& precision;
};

struct AttentionPlan {
  AttentionVersion version = AttentionVersion::kV2;  // kV1 or kV2
  int64_t batch = 0, length = 0, embed = 0, heads = 1, head_dim = 0;
  double scale = 1;
  bool tf32 = false;
  int64_t rows() const { return batch * length; }
};

// Throws on anything the operator does not accept.
AttentionPlan plan_attention(const AttentionArgs& args);

// The stage between the products: softmax(scale * q k^T) v of every head.
struct Attention {
  Tensor qkv;                       // [batch, length, 3, heads, head_dim], dense
  OptionalTensor key_padding_mask;  // [batch, length] of bool, true where a key takes no part
  int64_t batch, length, heads, head_dim;
  double scale;
  bool is_causal;
};

// What computed it; for last_path().
enum class AttentionKernel : int {
  kNone = 0,
  kFlash = 1,
  kCudnn = 2,
  kEfficient = 3,
  kMath = 4,
  kTiled = 5,  // our own, float32
  kHalf = 6    // our own, 16 bits
};

struct AttentionResult {
  Tensor output;             // [batch, length, heads, head_dim], dense
  OptionalTensor logsumexp;  // [batch, heads, length], dense, float32 (float64 for float64)
  AttentionKernel kernel;
};

struct AttentionGradient {
  Tensor qkv;  // as Attention::qkv
  AttentionKernel kernel;
};

// The gradient of `output`, and what the forward kept. Rows whose keys are all masked have a zero output, and any
// logsumexp.
struct AttentionBackward {
  Tensor grad_output, output;  // [batch, length, heads, head_dim], dense
  Tensor logsumexp;            // [batch, heads, length], dense
};

struct FusedAttentionResult;

// What a device has to offer.
struct AttentionBackend {
  bool cuda;
  void (*mm)(const Tensor& out, const Tensor& a, const Tensor& b);
  void (*addmm)(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b);
  AttentionResult (*attend)(const Attention& attention, bool keep_logsumexp);
  AttentionGradient (*attend_backward)(const Attention& attention, const AttentionBackward& backward);
  void (*fresh)(const Tensor& tensor);  // told of each large tensor just allocated
  // Products of the device's own, tried first where there are any: out = a b, and out = rows weight^T + bias; false
  // where they do not take the case.
  bool (*own_mm)(const Tensor& out, const Tensor& a, const Tensor& b, bool tf32) = nullptr;
  bool (*own_linear)(const Tensor& out, const Tensor& rows, const Tensor& weight, const OptionalTensor& bias,
                     bool tf32) = nullptr;
  const char* own_paths[2] = {"", ""};  // what is recorded beside the attention's path where one was taken: ieee, tf32
  // Kernels for the whole, where there are such for the case. Null: there never are.
  std::optional<FusedAttentionResult> (*whole)(const AttentionArgs& args, const AttentionPlan& plan,
                                               bool keep) = nullptr;
};

// The result, and where `keep` is set what the backward needs.
struct FusedAttentionResult {
  OwnedHandle output;
  OptionalTensor qkv, attention, logsumexp;  // [N, S, 3 E], [N, S, E], [N, heads, S]
};
FusedAttentionResult run_attention(const AttentionBackend& backend, const AttentionArgs& args,
                                   const AttentionPlan& plan, bool keep);

struct FusedAttentionBackwardArgs {
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& qkv;
  const Tensor& attention;
  const Tensor& logsumexp;
  const Tensor& qkv_weight;
  const Tensor& out_weight;
  int64_t heads;
  std::optional<double> scale;
  bool is_causal;
  const OptionalTensor& key_padding_mask;
  const Text& precision;
  bool needs_input, needs_qkv_weight, needs_qkv_bias, needs_out_weight, needs_out_bias;
};

// Gradients of input, qkv_weight, qkv_bias, out_weight, out_bias; [0] for those that are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_attention_backward(const AttentionBackend& backend,
                                                                          const FusedAttentionBackwardArgs& args);

// --- what the devices' stages are made of ---

// Whether the environment's STYLEFORGE_PATH asks for this kernel (flash, cudnn, efficient, math, sm90): for tests.
bool attention_forced(AttentionKernel kernel);

// q, k and v (which = 0, 1, 2) as [batch, heads, length, head_dim], no copy.
Tensor heads_of(const Attention& attention, int which);
// [N, heads, S, D] and [N, S, heads, D] seen as one another, no copy.
Tensor swap_heads(const Tensor& tensor);
// [N, S, heads, D] with dense strides; a copy only where it has others.
Tensor dense_heads(const Tensor& tensor);
// Gradients of q, k and v, [batch, heads, length, head_dim] of any strides and floating dtype, as that of
// Attention::qkv.
Tensor pack_gradients(const Attention& attention, const std::array<Tensor, 3>& gradients);
// 0 and -infinity for [N, heads, S, S] by the key's mask: [N, S] in memory, of the dtype of qkv. Rows lie a multiple of
// `alignment` elements apart.
Tensor padding_bias(const Attention& attention, int64_t alignment);

}  // namespace styleforge
