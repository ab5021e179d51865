// fused_attention on CUDA. The whole of a short sequence is our own (small_attention.h). Else products are our own
// (csrc/cuda/gemm) or cuBLAS's through ATen, and what runs between them is our own in float32 (tiled_attention.h), or
// one of ATen's attention kernels.
#include "../fused_attention_operators.h"

#include "../../csrc/cuda/common/launch.h"
#include "../attention_math.h"
#include "fused_ffn_gemm.h"
#include "launch.h"
#include "matmul.h"
#include "sdpa.h"
#include "small_attention.h"
#include "tiled_attention.h"

#include <algorithm>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_attention";
constexpr int64_t kMaxBatch = 65535;    // of one launch: the kernels have the batch in a grid's second dimension
constexpr int64_t kCudnnLength = 1024;  // from here on cuDNN's kernel is worth the plan it makes for every shape
constexpr int64_t kFewHeadsLength = 512;
constexpr AttentionKernel kKernels[] = {AttentionKernel::kCudnn, AttentionKernel::kFlash, AttentionKernel::kEfficient,
                                        AttentionKernel::kMath};

cuda::DeviceFacts facts_of(const Tensor& tensor) {
  const CudaScope scope(tensor);
  cuda::DeviceFacts facts;
  check_cuda(kOp, cuda::device_facts(facts));
  return facts;
}

AttentionKernel choose(const Attention& attention) {
  const int major = facts_of(attention.qkv).major;
  for (AttentionKernel kernel : kKernels) {
    if (attention_forced(kernel) && sdpa_takes(kernel, attention, major)) return kernel;
  }
  for (AttentionKernel kernel : kKernels) {
    if (kernel == AttentionKernel::kCudnn && attention.length < kCudnnLength) continue;
    if (sdpa_takes(kernel, attention, major)) return kernel;
  }
  return AttentionKernel::kMath;
}

// Gradients have the same bits on every run: flash has not, and is taken only by force.
AttentionKernel choose_backward(const Attention& attention) {
  const cuda::DeviceFacts facts = facts_of(attention.qkv);
  for (AttentionKernel kernel : kKernels) {
    if (attention_forced(kernel) && sdpa_backward_takes(kernel, attention, facts.major)) return kernel;
  }
  // In a fixed order, the efficient kernel has one block of threads for each head: with few of them, products of the
  // whole GPU are faster, all the more the longer the sequence.
  const bool few = attention.length >= kFewHeadsLength && attention.batch * attention.heads * 3 < facts.multiprocessors;
  return !few && sdpa_backward_takes(AttentionKernel::kEfficient, attention, facts.major) ? AttentionKernel::kEfficient
                                                                                          : AttentionKernel::kMath;
}

// Elements [begin, begin + count) of the first dimension.
Tensor slice(const Tensor& tensor, int64_t begin, int64_t count) {
  const auto given = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes[0] = count;
  return strided_view(tensor, sizes, std::vector<int64_t>(strides.begin(), strides.end()), begin * strides[0]);
}

Attention slice(const Attention& attention, int64_t begin, int64_t count) {
  Attention part = attention;
  part.qkv = slice(attention.qkv, begin, count);
  if (part.key_padding_mask) part.key_padding_mask = slice(*attention.key_padding_mask, begin, count);
  part.batch = count;
  return part;
}

Tensor like_with_batch(const Tensor& part, int64_t batch) {
  const auto given = part.sizes();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes[0] = batch;
  return empty_dense(part, sizes, false, part.scalar_type());
}

// body(begin, count) for parts of the batch that one launch takes
template <typename Body>
void each_part(int64_t batch, const Body& body) {
  for (int64_t begin = 0; begin < batch; begin += kMaxBatch) body(begin, std::min(kMaxBatch, batch - begin));
}

void put(OptionalTensor& whole, const Tensor& part, int64_t batch, int64_t begin) {
  if (!whole) whole = like_with_batch(part, batch);
  Tensor place = slice(*whole, begin, part.size(0));
  torch::stable::copy_(place, part);
}

AttentionResult attend_part(const Attention& attention, bool keep_logsumexp) {
  if (auto result = tiled_attention(attention, keep_logsumexp)) return *result;
  const AttentionKernel kernel = choose(attention);
  if (kernel == AttentionKernel::kMath) return math_attention(cublas_baddbmm, attention);
  return sdpa(kernel, attention, keep_logsumexp);
}

AttentionResult attend(const Attention& attention, bool keep_logsumexp) {
  if (attention.batch <= kMaxBatch) return attend_part(attention, keep_logsumexp);
  OptionalTensor output, logsumexp;
  auto kernel = AttentionKernel::kNone;
  each_part(attention.batch, [&](int64_t begin, int64_t count) {
    const AttentionResult part = attend_part(slice(attention, begin, count), keep_logsumexp);
    kernel = part.kernel;
    put(output, part.output, attention.batch, begin);
    if (keep_logsumexp) put(logsumexp, *part.logsumexp, attention.batch, begin);
  });
  return {*output, logsumexp, kernel};
}

AttentionGradient attend_backward_part(const Attention& attention, const AttentionBackward& backward) {
  if (auto result = tiled_attention_backward(attention, backward)) return *result;
  const AttentionKernel kernel = choose_backward(attention);
  if (kernel == AttentionKernel::kMath) return math_attention_backward(cublas_baddbmm, attention, backward);
  return sdpa_backward(kernel, attention, backward);
}

AttentionGradient attend_backward(const Attention& attention, const AttentionBackward& backward) {
  if (attention.batch <= kMaxBatch) return attend_backward_part(attention, backward);
  OptionalTensor gradient;
  auto kernel = AttentionKernel::kNone;
  each_part(attention.batch, [&](int64_t begin, int64_t count) {
    const AttentionGradient part =
        attend_backward_part(slice(attention, begin, count),
                             {slice(backward.grad_output, begin, count), slice(backward.output, begin, count),
                              slice(backward.logsumexp, begin, count)});
    kernel = part.kernel;
    put(gradient, part.qkv, attention.batch, begin);
  });
  return {*gradient, kernel};
}

const AttentionBackend kBackend{
    true,
    cublas_mm,
    cublas_addmm,
    attend,
    attend_backward,
    [](const Tensor&) {},
    run_gemm,
    run_linear,
    {"products:sm90:3xtf32", "products:sm90:tf32"},
    run_small_attention,
};

using Operators = AttentionOperators<kBackend>;

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { STYLEFORGE_IMPL_ATTENTION(m, styleforge::Operators); }
