#include "tiled_attention.h"

#include "../../csrc/cuda/attention/launch.h"
#include "launch.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_attention";

// Fits, rounded up to whole tiles as well.
bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max() - 1024; }

// All but what is written; nothing where sizes or the dtype do not fit.
std::optional<cuda::TiledAttentionParams> params_of(const Attention& attention) {
  const Tensor& qkv = attention.qkv;
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  if (qkv.scalar_type() != ScalarType::Float || !narrow(n) || !narrow(s) || !narrow(h)) return {};
  cuda::TiledAttentionParams params;
  params.q = static_cast<const float*>(qkv.const_data_ptr());
  params.k = params.q + h * d;
  params.v = params.k + h * d;
  params.row_stride = 3 * h * d;
  params.batch_stride = s * params.row_stride;
  if (attention.key_padding_mask) {
    params.key_padding_mask = static_cast<const bool*>(attention.key_padding_mask->const_data_ptr());
    params.mask_stride[0] = attention.key_padding_mask->stride(0);
    params.mask_stride[1] = attention.key_padding_mask->stride(1);
  }
  params.batch = static_cast<int>(n);
  params.heads = static_cast<int>(h);
  params.length = static_cast<int>(s);
  params.head_dim = static_cast<int>(d);
  params.scale = static_cast<float>(attention.scale);
  params.is_causal = attention.is_causal;
  return params;
}

}  // namespace

std::optional<AttentionResult> tiled_attention(const Attention& attention, bool keep_logsumexp) {
  auto found = params_of(attention);
  if (!found) return {};
  cuda::TiledAttentionParams& params = *found;
  const Tensor& qkv = attention.qkv;
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  const CudaScope scope(qkv);
  cuda::TiledAttentionSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_tiled_attention(params, schedule, supported));
  if (!supported) return {};

  AttentionResult result{empty_dense(qkv, {n, s, h, d}, false, ScalarType::Float), {}, AttentionKernel::kTiled};
  params.output = static_cast<float*>(result.output.mutable_data_ptr());
  if (keep_logsumexp) {
    result.logsumexp = empty_dense(qkv, {n, h, s}, false, ScalarType::Float);
    params.logsumexp = static_cast<float*>(result.logsumexp->mutable_data_ptr());
  }
  check_cuda(kOp, cuda::launch_tiled_attention(params, schedule, scope.stream()));
  return result;
}

namespace {

// With room for what the first launch writes: nothing else of the workspace is used.
cuda::AttentionRows rows_of(const Attention& attention, const AttentionBackward& backward) {
  cuda::AttentionRows rows;
  rows.output = backward.output.const_data_ptr();
  rows.grad_output = backward.grad_output.const_data_ptr();
  rows.logsumexp = static_cast<const float*>(backward.logsumexp.const_data_ptr());
  rows.batch = static_cast<int>(attention.batch);
  rows.heads = static_cast<int>(attention.heads);
  rows.length = static_cast<int>(attention.length);
  rows.head_dim = static_cast<int>(attention.head_dim);
  return rows;
}

void give_room(cuda::AttentionRows& rows, const Tensor& like, std::optional<Tensor>& holder) {
  const size_t count = static_cast<size_t>(rows.batch) * rows.heads * cuda::attention_rows(rows.length);
  rows.rows_logsumexp = static_cast<float*>(workspace(like, 2 * count * sizeof(float), holder));
  rows.rows_delta = rows.rows_logsumexp + count;
}

std::optional<AttentionGradient> half_attention_backward(const Attention& attention,
                                                         const AttentionBackward& backward) {
  const Tensor& qkv = attention.qkv;
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  if (!narrow(n) || !narrow(s) || !narrow(h)) return {};
  const CudaScope scope(qkv);
  cuda::HalfAttentionBackwardParams params;
  params.rows = rows_of(attention, backward);
  params.dtype = kernel_dtype(kOp, "input", qkv.scalar_type());
  params.qkv = qkv.const_data_ptr();
  if (attention.key_padding_mask) {
    params.key_padding_mask = static_cast<const bool*>(attention.key_padding_mask->const_data_ptr());
    params.mask_stride[0] = attention.key_padding_mask->stride(0);
    params.mask_stride[1] = attention.key_padding_mask->stride(1);
  }
  params.batch = params.rows.batch;
  params.heads = params.rows.heads;
  params.length = params.rows.length;
  params.head_dim = params.rows.head_dim;
  params.scale = static_cast<float>(attention.scale);
  params.is_causal = attention.is_causal;
  cuda::TiledAttentionSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_half_attention_backward(params, schedule, supported));
  if (!supported) return {};

  AttentionGradient result{empty_dense(qkv, {n, s, 3, h, d}, false, qkv.scalar_type()), AttentionKernel::kHalf};
  std::optional<Tensor> holder;
  give_room(params.rows, qkv, holder);
  params.grad_qkv = result.qkv.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_half_attention_backward(params, schedule, scope.stream()));
  return result;
}

}  // namespace

std::optional<AttentionGradient> tiled_attention_backward(const Attention& attention,
                                                          const AttentionBackward& backward) {
  const Tensor& qkv = attention.qkv;
  if (is_16_bit(qkv.scalar_type())) {
    return half_attention_backward(attention, backward);
  }
  auto found = params_of(attention);
  if (!found) return {};
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  const CudaScope scope(qkv);
  cuda::TiledAttentionBackwardParams params;
  params.forward = *found;
  params.rows = rows_of(attention, backward);
  params.grad_output = static_cast<const float*>(backward.grad_output.const_data_ptr());
  params.grad_row_stride = params.forward.row_stride;
  params.grad_batch_stride = params.forward.batch_stride;
  cuda::TiledAttentionSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_tiled_attention_backward(params, schedule, supported));
  if (!supported) return {};

  AttentionGradient result{empty_dense(qkv, {n, s, 3, h, d}, false, ScalarType::Float), AttentionKernel::kTiled};
  std::optional<Tensor> holder;
  give_room(params.rows, qkv, holder);
  params.grad_q = static_cast<float*>(result.qkv.mutable_data_ptr());
  params.grad_k = params.grad_q + h * d;
  params.grad_v = params.grad_k + h * d;
  check_cuda(kOp, cuda::launch_tiled_attention_backward(params, schedule, scope.stream()));
  return result;
}

}  // namespace styleforge
