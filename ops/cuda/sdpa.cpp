#include "sdpa.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <limits>

namespace styleforge {

namespace {

constexpr int64_t kHeadAlignment = 8;
constexpr int64_t kBiasAlignment = 16;       // elements; the efficient kernels read the bias in vectors
constexpr int64_t kLogsumexpAlignment = 32;  // of the efficient kernels' rows of logsumexp

// [..., head_dim] with zeros up to `head_dim` elements in its last dimension.
Tensor padded(const Tensor& tensor, int64_t head_dim) {
  const auto given = tensor.sizes();
  std::vector<int64_t> sizes(given.begin(), given.end());
  const int64_t before = sizes.back();
  sizes.back() = head_dim;
  const Tensor result = torch::stable::fill_(empty_dense(tensor, sizes, false, tensor.scalar_type()), 0.0);
  const std::vector<int64_t> strides = dense_strides(sizes, false);
  sizes.back() = before;
  Tensor view = strided_view(result, sizes, strides);
  torch::stable::copy_(view, tensor);
  return result;
}

// The first `head_dim` elements of the last dimension, dense.
Tensor cropped(const Tensor& tensor, int64_t head_dim) {
  const auto given = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes.back() = head_dim;
  return to_contiguous(strided_view(tensor, sizes, std::vector<int64_t>(strides.begin(), strides.end())), false);
}

int64_t padded_head_dim(const Attention& attention) {
  return (attention.head_dim + kHeadAlignment - 1) / kHeadAlignment * kHeadAlignment;
}

Attention padded(const Attention& attention, int64_t head_dim) {
  Attention result = attention;
  result.head_dim = head_dim;
  result.qkv = padded(attention.qkv, head_dim);
  return result;
}

// Holds a bias and gives what the shim takes for `Tensor?`.
struct Bias {
  OptionalTensor tensor;
  AtenTensorHandle handle = nullptr;

  explicit Bias(const Attention& attention) {
    if (!attention.key_padding_mask) return;
    tensor = padding_bias(attention, kBiasAlignment);
    handle = tensor->get();
  }
  AtenTensorHandle* get() { return handle == nullptr ? nullptr : &handle; }
};

AttentionResult run_sdpa(AttentionKernel kernel, const Attention& attention, bool keep_logsumexp) {
  const Tensor q = heads_of(attention, 0), k = heads_of(attention, 1), v = heads_of(attention, 2);
  double scale = attention.scale;
  // The results that nobody needs are taken as well, to be released.
  std::array<AtenTensorHandle, 7> results{};
  int64_t lengths[2] = {};
  if (kernel == AttentionKernel::kCudnn) {
    check_shim(aoti_torch_cuda__scaled_dot_product_cudnn_attention(q.get(), k.get(), v.get(), nullptr, keep_logsumexp,
                                                                   0.0, attention.is_causal, false, &scale, &results[0],
                                                                   &results[1], &results[2], &results[3], &lengths[0],
                                                                   &lengths[1], &results[4], &results[5], &results[6]),
               "aten::_scaled_dot_product_cudnn_attention");
  } else if (kernel == AttentionKernel::kFlash) {
    check_shim(aoti_torch_cuda__scaled_dot_product_flash_attention(
                   q.get(), k.get(), v.get(), 0.0, attention.is_causal, false, &scale, &results[0], &results[1],
                   &results[2], &results[3], &lengths[0], &lengths[1], &results[4], &results[5], &results[6]),
               "aten::_scaled_dot_product_flash_attention");
  } else {
    Bias bias(attention);
    check_shim(aoti_torch_cuda__scaled_dot_product_efficient_attention(
                   q.get(), k.get(), v.get(), bias.get(), keep_logsumexp, 0.0, attention.is_causal, &scale, &results[0],
                   &results[1], &results[2], &results[3]),
               "aten::_scaled_dot_product_efficient_attention");
  }
  std::vector<Tensor> held;
  for (AtenTensorHandle handle : results) {
    if (handle != nullptr) held.emplace_back(handle);
  }
  AttentionResult result{dense_heads(swap_heads(held[0])), {}, kernel};
  if (keep_logsumexp) {
    // [N, heads, S] in rows of their own alignment, or [N, heads, S, 1]
    const int64_t n = attention.batch, h = attention.heads, s = attention.length;
    result.logsumexp = to_contiguous(
        strided_view(held[1], {n, h, s}, {held[1].stride(0), held[1].stride(1), held[1].stride(2)}), false);
  }
  return result;
}

// Rows of logsumexp as the efficient kernels want them; e^(score - infinity) = 0 for what lies behind the last query.
Tensor aligned_logsumexp(const Tensor& logsumexp) {
  const int64_t n = logsumexp.size(0), h = logsumexp.size(1), s = logsumexp.size(2);
  const int64_t row = (s + kLogsumexpAlignment - 1) / kLogsumexpAlignment * kLogsumexpAlignment;
  if (row == s) return logsumexp;
  const Tensor result = torch::stable::fill_(empty_dense(logsumexp, {n, h, row}, false, logsumexp.scalar_type()),
                                             std::numeric_limits<double>::infinity());
  Tensor view = strided_view(result, {n, h, s}, {h * row, row, 1});
  torch::stable::copy_(view, logsumexp);
  return result;
}

Tensor run_efficient_backward(const Attention& attention, const AttentionBackward& backward) {
  constexpr int64_t kNoMask = 0, kCausalFromTopLeft = 1;
  Bias bias(attention);
  const Tensor logsumexp = aligned_logsumexp(backward.logsumexp);
  double scale = attention.scale;
  int64_t splits = 1;  // more would add to the gradient of q by atomics
  std::array<AtenTensorHandle, 4> gradients{};
  // Without dropout, nobody looks at the seed and the offset.
  check_shim(aoti_torch_cuda__efficient_attention_backward(
                 backward.grad_output.get(), swap_heads(heads_of(attention, 0)).get(),
                 swap_heads(heads_of(attention, 1)).get(), swap_heads(heads_of(attention, 2)).get(), bias.get(),
                 backward.output.get(), nullptr, nullptr, attention.length, attention.length, logsumexp.get(), 0.0,
                 logsumexp.get(), logsumexp.get(), attention.is_causal ? kCausalFromTopLeft : kNoMask, false, &scale,
                 &splits, nullptr, true, &gradients[0], &gradients[1], &gradients[2], &gradients[3]),
             "aten::_efficient_attention_backward");
  std::vector<Tensor> held;
  for (AtenTensorHandle handle : gradients) {
    if (handle != nullptr) held.emplace_back(handle);
  }
  // With storage shared between them, the three are slices of one dense [N, S, 3, heads, D], the first at its start.
  const int64_t n = attention.batch, s = attention.length, h = attention.heads, d = attention.head_dim;
  return strided_view(held[0], {n, s, 3, h, d}, {s * 3 * h * d, 3 * h * d, h * d, d, 1});
}

Tensor run_flash_backward(const Attention& attention, const AttentionBackward& backward) {
  const auto undefined = [] {
    AtenTensorHandle handle = nullptr;
    check_shim(aoti_torch_new_uninitialized_tensor(&handle), "new_uninitialized_tensor");
    return Tensor(handle);
  };
  const Tensor no_lengths = undefined();
  const Tensor seed = torch::stable::fill_(empty_dense(attention.qkv, {2}, false, ScalarType::Long), 0.0);
  double scale = attention.scale;
  std::array<AtenTensorHandle, 3> gradients{};
  check_shim(aoti_torch_cuda__scaled_dot_product_flash_attention_backward(
                 swap_heads(backward.grad_output).get(), heads_of(attention, 0).get(), heads_of(attention, 1).get(),
                 heads_of(attention, 2).get(), swap_heads(backward.output).get(), backward.logsumexp.get(),
                 no_lengths.get(), no_lengths.get(), attention.length, attention.length, 0.0, attention.is_causal,
                 seed.get(), seed.get(), &scale, &gradients[0], &gradients[1], &gradients[2]),
             "aten::_scaled_dot_product_flash_attention_backward");
  return pack_gradients(attention, {Tensor(gradients[0]), Tensor(gradients[1]), Tensor(gradients[2])});
}

}  // namespace

bool sdpa_takes(AttentionKernel kernel, const Attention& attention, int major) {
  const bool masked = attention.key_padding_mask.has_value();
  const bool rising = attention.scale > 0;  // else these two scale the -infinity of what is hidden, to NaN or infinity
  switch (kernel) {
    case AttentionKernel::kCudnn:
      return is_16_bit(attention.qkv.scalar_type()) && !masked && rising && (major == 9 || major == 10) &&
             attention.head_dim <= 128 && attention.head_dim % kHeadAlignment == 0 && attention.length > 1;
    case AttentionKernel::kFlash:
      return is_16_bit(attention.qkv.scalar_type()) && !masked && rising && major >= 8;
    case AttentionKernel::kEfficient:
      return attention.qkv.scalar_type() == ScalarType::BFloat16 ? major >= 8
                                                                 : attention.qkv.scalar_type() != ScalarType::Double;
    default:
      return kernel == AttentionKernel::kMath;
  }
}

bool sdpa_backward_takes(AttentionKernel kernel, const Attention& attention, int major) {
  return kernel != AttentionKernel::kCudnn && sdpa_takes(kernel, attention, major);
}

AttentionResult sdpa(AttentionKernel kernel, const Attention& attention, bool keep_logsumexp) {
  const int64_t head_dim = padded_head_dim(attention);
  if (head_dim == attention.head_dim) return run_sdpa(kernel, attention, keep_logsumexp);
  AttentionResult result = run_sdpa(kernel, padded(attention, head_dim), keep_logsumexp);
  result.output = cropped(result.output, attention.head_dim);
  return result;
}

AttentionGradient sdpa_backward(AttentionKernel kernel, const Attention& attention, const AttentionBackward& backward) {
  const auto run = kernel == AttentionKernel::kFlash ? run_flash_backward : run_efficient_backward;
  const int64_t head_dim = padded_head_dim(attention);
  if (head_dim == attention.head_dim) return {run(attention, backward), kernel};
  const Tensor gradient = run(padded(attention, head_dim), {padded(backward.grad_output, head_dim),
                                                            padded(backward.output, head_dim), backward.logsumexp});
  return {cropped(gradient, attention.head_dim), kernel};
}

}  // namespace styleforge
