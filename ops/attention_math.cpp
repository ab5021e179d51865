#include "attention_math.h"

#include <algorithm>
#include <limits>

namespace styleforge {

namespace {

// Softmax and sums are in float32 or better, so 16-bit tensors are widened here.
ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [N, heads, S, D] of any strides as dense [N heads, S, D] in `dtype`.
Tensor batched(const Tensor& tensor, ScalarType dtype) {
  const int64_t n = tensor.size(0), h = tensor.size(1), s = tensor.size(2), d = tensor.size(3);
  Tensor copy = empty_dense(tensor, {n, h, s, d}, false, dtype);
  torch::stable::copy_(copy, tensor);
  return strided_view(copy, {n * h, s, d}, {s * d, d, 1});
}

// Rows [begin, begin + count) of dense [B, S, D].
Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t count) {
  const int64_t s = tensor.size(1), d = tensor.size(2);
  return strided_view(tensor, {tensor.size(0), count, d}, {s * d, d, 1}, begin * d);
}

Tensor transposed_batch(const Tensor& tensor) {
  return strided_view(tensor, {tensor.size(0), tensor.size(2), tensor.size(1)},
                      {tensor.stride(0), tensor.stride(2), tensor.stride(1)});
}

Tensor number(const Tensor& like, ScalarType dtype, double value) {
  return torch::stable::fill_(empty_dense(like, {}, false, dtype), value);
}

// One block of queries against the keys that they may see.
class Blocks {
 public:
  Blocks(Baddbmm baddbmm, const Attention& attention)
      : baddbmm_(baddbmm),
        attention_(attention),
        dtype_(wide_dtype(attention.qkv)),
        q_(batched(heads_of(attention, 0), dtype_)),
        k_(batched(heads_of(attention, 1), dtype_)),
        v_(batched(heads_of(attention, 2), dtype_)),
        zero_(number(attention.qkv, dtype_, 0)),
        minus_infinity_(number(attention.qkv, dtype_, -std::numeric_limits<double>::infinity())) {
    constexpr int64_t kScores = int64_t{1} << 24;  // of one block: 64 MiB in float32
    const int64_t per_row = std::max<int64_t>(1, attention.batch * attention.heads * attention.length);
    rows_ = std::clamp<int64_t>(kScores / per_row, 16, std::max<int64_t>(16, attention.length));
  }

  // body(begin, rows, keys) for every block; keys: how many of them the block's queries see.
  template <typename Body>
  void each(const Body& body) const {
    for (int64_t begin = 0; begin < attention_.length; begin += rows_) {
      const int64_t rows = std::min(rows_, attention_.length - begin);
      body(begin, rows, attention_.is_causal ? begin + rows : attention_.length);
    }
  }

  // scale q k^T, -infinity where `hidden`.
  Tensor scores(int64_t begin, int64_t rows, int64_t keys, const OptionalTensor& hidden) const {
    const Tensor result = empty_dense(q_, {q_.size(0), rows, keys}, false, dtype_);
    if (hidden) choose(*hidden, minus_infinity_, zero_, result, rows, keys);
    product(result, rows_of(q_, begin, rows), transposed_batch(rows_of(k_, 0, keys)), hidden ? 1 : 0, attention_.scale);
    return result;
  }

  // e^(scores - logsumexp), 0 where `hidden`: also in rows that are hidden as a whole, where the power is NaN.
  Tensor probabilities(const Tensor& scores, const Tensor& logsumexp, const OptionalTensor& hidden) const {
    const Tensor shifted = torch::stable::subtract(scores, logsumexp);
    const Tensor result = call_aten("aten::exp_", "", shifted);
    if (hidden) choose(*hidden, zero_, result, result, scores.size(1), scores.size(2));
    return result;
  }

  // Which keys a block's queries do not see, [N, heads, rows, keys] broadcast from less; none: they see all.
  OptionalTensor hidden(int64_t begin, int64_t rows, int64_t keys) const {
    const int64_t n = attention_.batch, h = attention_.heads;
    if (!attention_.key_padding_mask && !attention_.is_causal) return {};
    OptionalTensor padding;
    if (attention_.key_padding_mask) {
      const Tensor& mask = *attention_.key_padding_mask;
      if (!attention_.is_causal) return strided_view(mask, {n, h, rows, keys}, {mask.stride(0), 0, 0, mask.stride(1)});
      padding = strided_view(mask, {n, 1, keys}, {mask.stride(0), 0, mask.stride(1)});
    }
    Tensor later = torch::stable::fill_(empty_dense(q_, {rows, keys}, false, ScalarType::Bool), 1.0);
    later = call_aten("aten::triu_", "", later, begin + 1);
    if (!padding) return strided_view(later, {n, h, rows, keys}, {0, 0, keys, 1});
    return strided_view(call_aten("aten::logical_or", "", *padding, later), {n, h, rows, keys},
                        {rows * keys, 0, keys, 1});
  }

  void product(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha = 1) const {
    baddbmm_(out, out, a, b, beta, alpha);
  }

  const Tensor& q() const { return q_; }
  const Tensor& k() const { return k_; }
  const Tensor& v() const { return v_; }
  ScalarType dtype() const { return dtype_; }

 private:
  // out = hidden ? yes : no, where out is dense [N heads, rows, keys]
  void choose(const Tensor& hidden, const Tensor& yes, const Tensor& no, const Tensor& out, int64_t rows,
              int64_t keys) const {
    const auto four = [&](const Tensor& tensor) {
      if (tensor.dim() == 0) return tensor;
      return strided_view(tensor, {attention_.batch, attention_.heads, rows, keys},
                          {attention_.heads * rows * keys, rows * keys, keys, 1});
    };
    call_aten("aten::where", "self_out", hidden, four(yes), four(no), four(out));
  }

  Baddbmm baddbmm_;
  const Attention& attention_;
  ScalarType dtype_;
  Tensor q_, k_, v_, zero_, minus_infinity_;
  int64_t rows_ = 1;
};

Tensor logsumexp_rows(const Tensor& logsumexp, int64_t begin, int64_t rows) {  // [B, rows, 1]
  const int64_t length = logsumexp.size(2);
  return strided_view(logsumexp, {logsumexp.size(0) * logsumexp.size(1), rows, 1}, {length, 1, 1}, begin);
}

}  // namespace

AttentionResult math_attention(Baddbmm baddbmm, const Attention& attention) {
  const Blocks blocks(baddbmm, attention);
  const int64_t n = attention.batch, h = attention.heads, s = attention.length, d = attention.head_dim;
  const Tensor output = empty_dense(blocks.q(), {n * h, s, d}, false, blocks.dtype());
  const Tensor logsumexp = empty_dense(blocks.q(), {n, h, s}, false, blocks.dtype());
  blocks.each([&](int64_t begin, int64_t rows, int64_t keys) {
    const OptionalTensor hidden = blocks.hidden(begin, rows, keys);
    const Tensor scores = blocks.scores(begin, rows, keys, hidden);
    Tensor kept = logsumexp_rows(logsumexp, begin, rows);
    torch::stable::copy_(kept, call_aten("aten::logsumexp", "", scores, std::vector<int64_t>{2}, true));
    blocks.product(rows_of(output, begin, rows), blocks.probabilities(scores, kept, hidden),
                   rows_of(blocks.v(), 0, keys), 0);
  });
  Tensor result = empty_dense(attention.qkv, {n, s, h, d}, false, attention.qkv.scalar_type());
  torch::stable::copy_(result, strided_view(output, {n, s, h, d}, {h * s * d, d, s * d, 1}));
  return {result, logsumexp, AttentionKernel::kMath};
}

AttentionGradient math_attention_backward(Baddbmm baddbmm, const Attention& attention,
                                          const AttentionBackward& backward) {
  const Blocks blocks(baddbmm, attention);
  const int64_t n = attention.batch, h = attention.heads, s = attention.length, d = attention.head_dim;
  const Tensor grad_output = batched(swap_heads(backward.grad_output), blocks.dtype());
  const Tensor weighted =
      call_aten("aten::mul", "Tensor", grad_output, batched(swap_heads(backward.output), blocks.dtype()));
  const int64_t last = 2;
  const Tensor delta = torch::stable::sum(weighted, torch::headeronly::IntHeaderOnlyArrayRef(&last, 1), true);
  std::array<Tensor, 3> gradients{empty_dense(blocks.q(), {n * h, s, d}, false, blocks.dtype()),
                                  torch::stable::fill_(torch::stable::empty_like(blocks.k()), 0.0),
                                  torch::stable::fill_(torch::stable::empty_like(blocks.v()), 0.0)};
  blocks.each([&](int64_t begin, int64_t rows, int64_t keys) {
    const OptionalTensor hidden = blocks.hidden(begin, rows, keys);
    const Tensor given = rows_of(grad_output, begin, rows);
    Tensor p = blocks.scores(begin, rows, keys, hidden);
    p = blocks.probabilities(p, logsumexp_rows(backward.logsumexp, begin, rows), hidden);
    blocks.product(rows_of(gradients[2], 0, keys), transposed_batch(p), given, 1);
    const Tensor grad_p = torch::stable::empty_like(p);
    blocks.product(grad_p, given, transposed_batch(rows_of(blocks.v(), 0, keys)), 0);
    const Tensor grad_scores =
        call_aten("aten::mul_", "Tensor", p, torch::stable::subtract(grad_p, rows_of(delta, begin, rows)));
    blocks.product(rows_of(gradients[0], begin, rows), grad_scores, rows_of(blocks.k(), 0, keys), 0, attention.scale);
    blocks.product(rows_of(gradients[1], 0, keys), transposed_batch(grad_scores), rows_of(blocks.q(), begin, rows), 1,
                   attention.scale);
  });
  const auto four = [&](const Tensor& tensor) { return strided_view(tensor, {n, h, s, d}, {h * s * d, s * d, d, 1}); };
  return {pack_gradients(attention, {four(gradients[0]), four(gradients[1]), four(gradients[2])}),
          AttentionKernel::kMath};
}

}  // namespace styleforge
