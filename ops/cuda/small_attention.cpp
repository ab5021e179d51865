#include "small_attention.h"

#include "../../csrc/cuda/attention_small/launch.h"
#include "launch.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_attention";

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : to_contiguous(tensor, false); }

const void* dense_data(const OptionalTensor& tensor, OptionalTensor& holder) {
  if (!tensor) return nullptr;
  holder = dense(*tensor);
  return holder->const_data_ptr();
}

// Rows as the kernels take them: neighbouring columns.
Tensor with_rows(const Tensor& input) {
  return input.stride(2) == 1 && input.stride(0) >= 0 && input.stride(1) >= 0 ? input : to_contiguous(input, false);
}

bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max() / 4; }

}  // namespace

std::optional<FusedAttentionResult> run_small_attention(const AttentionArgs& args, const AttentionPlan& plan,
                                                        bool keep) {
  const ScalarType dtype = args.input.scalar_type();
  if (plan.version != AttentionVersion::kV1 || dtype == ScalarType::Double || !narrow(plan.rows()) ||
      !narrow(3 * plan.embed)) {
    return {};
  }
  const int64_t n = plan.batch, s = plan.length, embed = plan.embed;
  cuda::SmallAttentionParams params;
  params.batch = static_cast<int>(n);
  params.length = static_cast<int>(s);
  params.embed = static_cast<int>(embed);
  params.heads = static_cast<int>(plan.heads);
  params.head_dim = static_cast<int>(plan.head_dim);
  params.scale = static_cast<float>(plan.scale);
  params.is_causal = args.is_causal;
  params.dtype = kernel_dtype(kOp, "input", dtype);
  params.tf32 = params.dtype == DType::kFloat32 && parse_tf32(kOp, args.precision.value);

  const CudaScope scope(args.input);
  cuda::SmallAttentionSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_small_attention(params, schedule, supported));
  if (keep) schedule.whole_rows = 0;
  if (!supported && schedule.whole_rows == 0) return {};

  const Tensor input = with_rows(args.input);
  const Tensor qkv_weight = dense(args.qkv_weight), out_weight = dense(args.out_weight);
  OptionalTensor qkv_bias, out_bias;
  params.input = input.const_data_ptr();
  params.input_stride[0] = input.stride(0);
  params.input_stride[1] = input.stride(1);
  params.qkv_weight = qkv_weight.const_data_ptr();
  params.qkv_bias = dense_data(args.qkv_bias, qkv_bias);
  params.out_weight = out_weight.const_data_ptr();
  params.out_bias = dense_data(args.out_bias, out_bias);
  if (args.key_padding_mask) {
    params.hidden = static_cast<const bool*>(args.key_padding_mask->const_data_ptr());
    params.hidden_stride[0] = args.key_padding_mask->stride(0);
    params.hidden_stride[1] = args.key_padding_mask->stride(1);
  }
  if (schedule.whole_rows > 0 && !cuda::small_whole_takes_memory(params)) schedule.whole_rows = 0;
  const bool whole = schedule.whole_rows > 0;
  if (!whole && !(supported && cuda::small_attention_takes_memory(params))) return {};

  FusedAttentionResult result;
  result.output = empty_dense(args.input, {n, s, embed}, false, dtype);
  params.output = result.output.mutable_data_ptr();
  OptionalTensor both;
  if (keep) {
    result.qkv = empty_dense(args.input, {n, s, 3 * embed}, false, dtype);
    result.attention = empty_dense(args.input, {n, s, embed}, false, dtype);
    result.logsumexp = empty_dense(args.input, {n, plan.heads, s}, false, ScalarType::Float);
    params.qkv = result.qkv->mutable_data_ptr();
    params.attended = result.attention->mutable_data_ptr();
    params.logsumexp = static_cast<float*>(result.logsumexp->mutable_data_ptr());
  } else if (!whole) {
    // Beside one another: embed is a multiple of 16 bytes.
    const size_t tokens = static_cast<size_t>(plan.rows() * embed) * args.input.element_size();
    params.attended = workspace(args.input, 4 * tokens, both);
    params.qkv = static_cast<unsigned char*>(params.attended) + tokens;
  }
  check_cuda(kOp, cuda::launch_small_attention(params, schedule, scope.stream()));
  record_path(whole               ? "attention:v1:cuda:whole"
              : schedule.together ? "attention:v1:cuda:together"
                                  : "attention:v1:cuda:dependent");
  return result;
}

}  // namespace styleforge
