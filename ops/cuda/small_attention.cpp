#include "small_attention.h"

#include "../../csrc/cuda/attention_small/launch.h"
#include "../../csrc/cuda/common/launch.h"
#include "launch.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_attention";

// Of a copy that lies densely where the tensor does not, kept by `holder`; null where there is none.
const void* dense_data(const TensorFacts& tensor, OptionalTensor& holder) {
  if (tensor.handle == nullptr) return nullptr;
  if (is_contiguous(tensor)) return const_data(tensor);
  holder = to_contiguous(tensor_of(tensor.handle), false);
  return holder->const_data_ptr();
}

bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max() / 4; }

}  // namespace

std::optional<FusedAttentionResult> run_small_attention(const AttentionArgs& args, const AttentionPlan& plan,
                                                        bool keep) {
  const DType dtype = kernel_dtype(kOp, "input", args.input);
  if (plan.version != AttentionVersion::kV1 || dtype == DType::kFloat64 || !narrow(plan.rows()) ||
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
  params.dtype = dtype;
  params.tf32 = dtype == DType::kFloat32 && plan.tf32;

  const CudaScope scope(args.input);
  cuda::SmallAttentionSchedule schedule;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_small_attention(params, schedule, supported));
  if (keep) schedule.whole_rows = 0;
  if (!supported && schedule.whole_rows == 0) return {};

  OptionalTensor input, qkv_weight, qkv_bias, out_weight, out_bias;
  const TensorFacts& tokens = args.input;
  if (tokens.strides[2] == 1 && tokens.strides[0] >= 0 && tokens.strides[1] >= 0) {  // rows of neighbouring columns
    params.input = const_data(tokens);
    params.input_stride[0] = tokens.strides[0];
    params.input_stride[1] = tokens.strides[1];
  } else {
    input = to_contiguous(tensor_of(tokens.handle), false);
    params.input = input->const_data_ptr();
    params.input_stride[0] = input->stride(0);
    params.input_stride[1] = input->stride(1);
  }
  params.qkv_weight = dense_data(args.qkv_weight, qkv_weight);
  params.qkv_bias = dense_data(args.qkv_bias, qkv_bias);
  params.out_weight = dense_data(args.out_weight, out_weight);
  params.out_bias = dense_data(args.out_bias, out_bias);
  if (args.key_padding_mask.handle != nullptr) {
    params.hidden = static_cast<const bool*>(const_data(args.key_padding_mask));
    params.hidden_stride[0] = args.key_padding_mask.strides[0];
    params.hidden_stride[1] = args.key_padding_mask.strides[1];
  }
  if (schedule.whole_rows > 0 && !cuda::small_whole_takes_memory(params)) schedule.whole_rows = 0;
  const bool whole = schedule.whole_rows > 0;
  if (!whole && !(supported && cuda::small_attention_takes_memory(params))) return {};

  FusedAttentionResult result;
  result.output = empty_contiguous(tokens, {n, s, embed}, tokens.dtype);
  params.output = mutable_data(result.output);
  Workspace workspace;
  if (keep) {
    const auto fresh = [&](OptionalTensor& tensor, std::initializer_list<int64_t> sizes, int32_t of) {
      tensor = Tensor(empty_contiguous(tokens, sizes, of).release());
      return tensor->mutable_data_ptr();
    };
    params.qkv = fresh(result.qkv, {n, s, 3 * embed}, tokens.dtype);
    params.attended = fresh(result.attention, {n, s, embed}, tokens.dtype);
    params.logsumexp = static_cast<float*>(fresh(result.logsumexp, {n, plan.heads, s}, aoti_torch_dtype_float32()));
  }
  if (!whole) {
    // Beside one another: embed is a multiple of 16 bytes.
    const size_t bytes = keep ? 0 : static_cast<size_t>(plan.rows() * embed) * cuda::size_of(dtype);
    auto* memory = static_cast<unsigned char*>(
        workspace.allocate(tokens, 4 * bytes + cuda::small_together_flag_bytes(params, schedule)));
    if (!keep) {
      params.attended = memory;
      params.qkv = memory + bytes;
    }
    if (schedule.together) params.flags = memory + 4 * bytes;
  }
  check_cuda(kOp, cuda::launch_small_attention(params, schedule, scope.stream()));
  record_path(whole               ? "attention:v1:cuda:whole"
              : schedule.together ? "attention:v1:cuda:together"
                                  : "attention:v1:cuda:dependent");
  return result;
}

}  // namespace styleforge
