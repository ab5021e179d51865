#include "tiled_attention.h"

#include "../../csrc/cuda/attention/launch.h"
#include "launch.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_attention";

// Fits, rounded up to whole tiles as well.
bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max() - 1024; }

}  // namespace

std::optional<AttentionResult> tiled_attention(const Attention& attention, bool keep_logsumexp) {
  const Tensor& qkv = attention.qkv;
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  if (qkv.scalar_type() != ScalarType::Float || !narrow(n) || !narrow(s) || !narrow(h)) return {};
  const CudaScope scope(qkv);
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

}  // namespace styleforge
