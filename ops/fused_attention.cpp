#include "fused_attention.h"

#include "matrix.h"

#include <cmath>
#include <cstdlib>
#include <limits>

namespace styleforge {

namespace {

constexpr int64_t kMaxHeadDim = 256;
// Up to here fused_attention takes the design for short sequences.
constexpr int64_t kShortLength = 512;
constexpr const char* kKernelNames[] = {"none", "flash", "cudnn", "efficient", "math", "sm90"};

const char* operator_name(AttentionVersion version) {
  switch (version) {
    case AttentionVersion::kV1:
      return "fused_attention_v1";
    case AttentionVersion::kV2:
      return "fused_attention_v2";
    default:
      return "fused_attention";
  }
}

#define STYLEFORGE_ATTENTION_PATHS(prefix)                                      \
  {prefix "none", prefix "flash",       prefix "cudnn",     prefix "efficient", \
   prefix "math", prefix "sm90:3xtf32", prefix "sm90:16bit"}

void record(bool cuda, AttentionVersion version, AttentionKernel kernel, const char* products = "") {
  static constexpr const char* kPaths[2][2][7] = {
      {STYLEFORGE_ATTENTION_PATHS("attention:v1:cpu:"), STYLEFORGE_ATTENTION_PATHS("attention:v2:cpu:")},
      {STYLEFORGE_ATTENTION_PATHS("attention:v1:cuda:"), STYLEFORGE_ATTENTION_PATHS("attention:v2:cuda:")}};
  record_path(kPaths[cuda][version == AttentionVersion::kV2][static_cast<int>(kernel)], products);
}

void record_backward(bool cuda, AttentionKernel kernel) {
  static constexpr const char* kPaths[2][7] = {STYLEFORGE_ATTENTION_PATHS("attention_backward:cpu:"),
                                               STYLEFORGE_ATTENTION_PATHS("attention_backward:cuda:")};
  record_path(kPaths[cuda][static_cast<int>(kernel)]);
}

void check_argument(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                    std::initializer_list<int64_t> sizes) {
  if (tensor.handle != nullptr) check_like(op, name, tensor, input, sizes);
}

void check_mask(const char* op, const TensorFacts& mask, const TensorFacts& input) {
  if (mask.handle == nullptr) return;
  check_device(op, "key_padding_mask", mask, input);
  if (mask.scalar_type() != ScalarType::Bool) {
    fail(op, "key_padding_mask must be bool (true: the key takes no part), got ", dtype_text(mask.scalar_type()));
  }
  const int64_t n = input.sizes[0], s = input.sizes[1];
  if (mask.dim != 2 || mask.sizes[0] != n || mask.sizes[1] != s) {
    fail(op, "key_padding_mask must have shape [", n, ", ", s, "], got ", shape_text(mask));
  }
}

double scale_of(const std::optional<double>& scale, int64_t head_dim) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(head_dim));
}

ScalarType logsumexp_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Dense [N, S, width] and its rows.
Tensor tokens(const AttentionBackend& backend, const Tensor& like, int64_t width) {
  const Tensor tensor = empty_dense(like, {like.size(0), like.size(1), width}, false, like.scalar_type());
  backend.fresh(tensor);
  return tensor;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : to_contiguous(tensor, false); }

Tensor with_heads(const Tensor& tensor, int64_t heads) {
  const int64_t n = tensor.size(0), s = tensor.size(1), width = tensor.size(2), d = width / heads;
  return strided_view(tensor, {n, s, heads, d}, {s * width, width, d, 1});
}

Attention stage_of(const Tensor& qkv, const OptionalTensor& key_padding_mask, int64_t heads, double scale,
                   bool is_causal) {
  const int64_t n = qkv.size(0), s = qkv.size(1), embed = qkv.size(2) / 3, d = embed / heads;
  const Tensor packed = strided_view(qkv, {n, s, 3, heads, d}, {s * 3 * embed, 3 * embed, embed, d, 1});
  return {packed, key_padding_mask, n, s, heads, d, scale, is_causal};
}

void multiply(const AttentionBackend& backend, const Tensor& out, const Tensor& a, const Tensor& b, bool tf32) {
  if (backend.own_mm == nullptr || !backend.own_mm(out, a, b, tf32)) backend.mm(out, a, b);
}

// Whether the product was the device's own.
bool project(const AttentionBackend& backend, const Tensor& out, const Tensor& rows, const Tensor& weight,
             const OptionalTensor& bias, bool tf32) {
  const Tensor out_rows = as_rows(out, rows.size(0));
  if (backend.own_linear != nullptr && backend.own_linear(out_rows, rows, weight, bias, tf32)) return true;
  if (bias) {
    backend.addmm(out_rows, *bias, rows, transposed(weight));
  } else {
    backend.mm(out_rows, rows, transposed(weight));
  }
  return false;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args) {
  const char* op = operator_name(args.version);
  const TensorFacts& input = args.input;
  if (input.dim != 3 || input.sizes[2] == 0) {
    fail(op, "input must have shape [N, S, embed_dim], embed_dim > 0, got ", shape_text(input));
  }
  kernel_dtype(op, "input", input);
  AttentionPlan plan;
  plan.tf32 = parse_tf32(op, args.precision.value);
  plan.batch = input.sizes[0];
  plan.length = input.sizes[1];
  plan.embed = input.sizes[2];
  plan.heads = args.heads;
  if (args.heads < 1 || plan.embed % args.heads != 0) {
    fail(op, "num_heads must divide embed_dim, ", plan.embed, ", got ", args.heads);
  }
  plan.head_dim = plan.embed / args.heads;
  if (plan.head_dim > kMaxHeadDim) {
    fail(op, "embed_dim / num_heads must be at most ", kMaxHeadDim, ", got ", plan.embed, " / ", args.heads, " = ",
         plan.head_dim, "; take more heads");
  }
  check_argument(op, "qkv_weight", args.qkv_weight, input, {3 * plan.embed, plan.embed});
  check_argument(op, "qkv_bias", args.qkv_bias, input, {3 * plan.embed});
  check_argument(op, "out_weight", args.out_weight, input, {plan.embed, plan.embed});
  check_argument(op, "out_bias", args.out_bias, input, {plan.embed});
  check_mask(op, args.key_padding_mask, input);
  plan.scale = scale_of(args.scale, plan.head_dim);
  plan.version = args.version;
  if (args.version == AttentionVersion::kAuto) {
    plan.version = plan.length <= kShortLength ? AttentionVersion::kV1 : AttentionVersion::kV2;
  }
  return plan;
}

FusedAttentionResult run_attention(const AttentionBackend& backend, const AttentionArgs& args,
                                   const AttentionPlan& plan, bool keep) {
  FusedAttentionResult result;
  const Tensor input = tensor_of(args.input.handle);
  OptionalTensor qkv = tokens(backend, input, 3 * plan.embed);
  if (plan.rows() == 0) {
    result.output = owned(tokens(backend, input, plan.embed));
    record(backend.cuda, plan.version, AttentionKernel::kNone);
    if (!keep) return result;
    result.qkv = qkv;
    result.attention = tokens(backend, input, plan.embed);
    result.logsumexp = empty_dense(input, {plan.batch, plan.heads, plan.length}, false, logsumexp_dtype(input));
    return result;
  }
  const bool first_own = project(backend, *qkv, as_rows(input, plan.rows()), tensor_of(args.qkv_weight.handle),
                                 optional_tensor_of(args.qkv_bias), plan.tf32);
  AttentionResult attention = backend.attend(
      stage_of(*qkv, optional_tensor_of(args.key_padding_mask), plan.heads, plan.scale, args.is_causal), keep);
  if (keep) result.qkv = qkv;
  qkv.reset();  // before the next allocation, which can have its place
  const Tensor heads =
      strided_view(attention.output, {plan.batch, plan.length, plan.embed}, {plan.length * plan.embed, plan.embed, 1});
  const Tensor output = tokens(backend, input, plan.embed);
  const bool own = project(backend, output, as_rows(heads, plan.rows()), tensor_of(args.out_weight.handle),
                           optional_tensor_of(args.out_bias), plan.tf32);
  result.output = owned(output);
  if (keep) {
    result.attention = heads;
    // Whatever strides of one-element dimensions the kernel left.
    result.logsumexp = strided_view(*attention.logsumexp, {plan.batch, plan.heads, plan.length},
                                    {plan.heads * plan.length, plan.length, 1});
  }
  record(backend.cuda, plan.version, attention.kernel, first_own || own ? backend.own_paths[plan.tf32] : "");
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_attention_backward(const AttentionBackend& backend,
                                                                          const FusedAttentionBackwardArgs& args) {
  constexpr const char* kOp = "_fused_attention_backward";
  const Tensor& input = args.input;
  if (input.dim() != 3) fail(kOp, "input must have shape [N, S, embed_dim], got ", shape_text(input));
  const int64_t n = input.size(0), s = input.size(1), embed = input.size(2), rows = n * s;
  if (args.heads < 1 || embed % args.heads != 0) {
    fail(kOp, "num_heads must divide embed_dim, ", embed, ", got ", args.heads);
  }
  const bool tf32 = parse_tf32(kOp, args.precision.value);
  check_argument(kOp, "grad_output", args.grad_output, input, {n, s, embed});
  check_argument(kOp, "qkv", args.qkv, input, {n, s, 3 * embed});
  check_argument(kOp, "attention", args.attention, input, {n, s, embed});
  check_with_dtype(kOp, "logsumexp", args.logsumexp, input, logsumexp_dtype(input), {n, args.heads, s});
  check_argument(kOp, "qkv_weight", args.qkv_weight, input, {3 * embed, embed});
  check_argument(kOp, "out_weight", args.out_weight, input, {embed, embed});
  check_mask(kOp, facts_of(args.key_padding_mask), input);

  const Tensor grad_output = as_rows(args.grad_output, rows);
  const Tensor attention = dense(args.attention);
  OptionalTensor grad_qkv;  // [rows, 3 embed]
  auto kernel = AttentionKernel::kNone;
  if (args.needs_input || args.needs_qkv_weight || args.needs_qkv_bias) {
    if (rows == 0) {
      grad_qkv = empty_dense(input, {0, 3 * embed}, false, input.scalar_type());
    } else {
      const Tensor grad_attention = tokens(backend, input, embed);
      multiply(backend, as_rows(grad_attention, rows), grad_output, args.out_weight, tf32);
      const AttentionGradient gradient = backend.attend_backward(
          stage_of(dense(args.qkv), args.key_padding_mask, args.heads, scale_of(args.scale, embed / args.heads),
                   args.is_causal),
          {with_heads(grad_attention, args.heads), with_heads(attention, args.heads), dense(args.logsumexp)});
      grad_qkv = strided_view(gradient.qkv, {rows, 3 * embed}, {3 * embed, 1});
      kernel = gradient.kernel;
    }
  }

  const auto none = [&] { return empty_dense(input, {0}, false, input.scalar_type()); };
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor result = empty_dense(input, {a.size(0), b.size(1)}, false, input.scalar_type());
    backend.fresh(result);
    multiply(backend, result, a, b, tf32);
    return result;
  };
  Tensor grad_input = none();
  if (args.needs_input) {
    grad_input = tokens(backend, input, embed);
    if (rows > 0) multiply(backend, as_rows(grad_input, rows), *grad_qkv, args.qkv_weight, tf32);
  }
  record_backward(backend.cuda, kernel);
  return {grad_input, args.needs_qkv_weight ? product(transposed(*grad_qkv), as_rows(input, rows)) : none(),
          args.needs_qkv_bias ? sum_of_rows(*grad_qkv) : none(),
          args.needs_out_weight ? product(transposed(grad_output), as_rows(attention, rows)) : none(),
          args.needs_out_bias ? sum_of_rows(grad_output) : none()};
}

bool attention_forced(AttentionKernel kernel) {
  const char* path = std::getenv("STYLEFORGE_PATH");
  return path != nullptr && std::string(path) == kKernelNames[static_cast<int>(kernel)];
}

Tensor heads_of(const Attention& attention, int which) {
  const int64_t row = 3 * attention.heads * attention.head_dim;
  return strided_view(attention.qkv, {attention.batch, attention.heads, attention.length, attention.head_dim},
                      {attention.length * row, attention.head_dim, row, 1},
                      which * attention.heads * attention.head_dim);
}

Tensor swap_heads(const Tensor& tensor) {
  return strided_view(tensor, {tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)},
                      {tensor.stride(0), tensor.stride(2), tensor.stride(1), tensor.stride(3)});
}

Tensor dense_heads(const Tensor& tensor) { return dense(tensor); }

Tensor pack_gradients(const Attention& attention, const std::array<Tensor, 3>& gradients) {
  Attention result = attention;
  result.qkv = empty_dense(attention.qkv, {attention.batch, attention.length, 3, attention.heads, attention.head_dim},
                           false, attention.qkv.scalar_type());
  for (int which = 0; which < 3; ++which) {
    Tensor part = heads_of(result, which);
    torch::stable::copy_(part, gradients[which]);
  }
  return result.qkv;
}

Tensor padding_bias(const Attention& attention, int64_t alignment) {
  const Tensor& mask = *attention.key_padding_mask;
  const ScalarType dtype = attention.qkv.scalar_type();
  const int64_t n = attention.batch, s = attention.length, row = (s + alignment - 1) / alignment * alignment;
  const Tensor rows = torch::stable::fill_(empty_dense(mask, {n, row}, false, dtype), 0.0);
  const Tensor minus_infinity =
      torch::stable::fill_(empty_dense(mask, {}, false, dtype), -std::numeric_limits<double>::infinity());
  const Tensor zero = torch::stable::fill_(empty_dense(mask, {}, false, dtype), 0.0);
  // (masked_fill would wait for the GPU to read the value that it fills in.)
  call_aten("aten::where", "self_out", mask, minus_infinity, zero, strided_view(rows, {n, s}, {row, 1}));
  return strided_view(rows, {n, attention.heads, s, s}, {row, 0, 0, 1});
}

}  // namespace styleforge
