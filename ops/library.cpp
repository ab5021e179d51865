// Every operator's schema. The public ones are API (DESIGN: schemas are public); the ones that start with `_` are how
// the public ones are built and may change.
#include "stable.h"

STABLE_TORCH_LIBRARY(styleforge, m) {
  m.def(
      "fused_instance_norm(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
      "str activation=\"none\", float negative_slope=0.01, Tensor? residual=None) -> Tensor");
  m.def(
      "fused_conv_instance_norm_relu(Tensor input, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, int[2] stride=1, int[2] padding=0, str padding_mode=\"zeros\", int upsample=1, "
      "float eps=1e-05, str activation=\"relu\", float negative_slope=0.01, Tensor? residual=None, "
      "str precision=\"ieee\") -> Tensor");
  m.def(
      "fused_ffn(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "str activation=\"gelu\", Tensor? residual=None, str precision=\"ieee\") -> Tensor");

  const char* attention =
      "(Tensor input, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, int num_heads, "
      "float? scale=None, bool is_causal=False, Tensor? key_padding_mask=None, str precision=\"ieee\") -> Tensor";
  for (const char* name : {"fused_attention", "fused_attention_v1", "fused_attention_v2"}) {
    m.def((std::string(name) + attention).c_str());
  }

  // The differentiable pair under fused_instance_norm. mean and rstd are float32 (float64 for float64 input) [N, C].
  m.def(
      "_fused_instance_norm_forward(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation, "
      "float negative_slope, Tensor? residual) -> (Tensor output, Tensor mean, Tensor rstd)");
  // `output` is given where the activation's derivative is taken from the result, `residual` where it has to be
  // recomputed. Returns grad_input, grad_weight, grad_bias ([C] or [N, C], the shape of weight; [0] without weight),
  // grad_residual ([0] where there is no residual or the activation is none: it equals grad_output then).
  m.def(
      "_fused_instance_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? bias, str activation, float negative_slope, Tensor? residual, Tensor? output) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");

  // The differentiable pair under fused_ffn. `hidden` is input fc1_weight^T, before the bias, [..., hidden].
  m.def(
      "_fused_ffn_forward(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "str activation, Tensor? residual, str precision) -> (Tensor output, Tensor hidden)");
  // The gradient of the residual is grad_output. What is not needed comes as [0].
  m.def(
      "_fused_ffn_backward(Tensor grad_output, Tensor input, Tensor hidden, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, str activation, str precision, bool needs_input, bool needs_fc1_weight, "
      "bool needs_fc1_bias, bool needs_fc2_weight, bool needs_fc2_bias) -> (Tensor grad_input, "
      "Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias)");

  // The differentiable pair under fused_attention, fused_attention_v1 and fused_attention_v2 (version 0, 1, 2). `qkv`
  // [N, S, 3 E] is the first product, `attention` [N, S, E] what the second one takes, `logsumexp` [N, num_heads, S] in
  // float32 (float64 for float64) that of the scaled and masked scores.
  m.def(
      "_fused_attention_forward(Tensor input, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, "
      "Tensor? out_bias, int num_heads, float? scale, bool is_causal, Tensor? key_padding_mask, str precision, "
      "int version) -> (Tensor output, Tensor qkv, Tensor attention, Tensor logsumexp)");
  // What is not needed comes as [0].
  m.def(
      "_fused_attention_backward(Tensor grad_output, Tensor input, Tensor qkv, Tensor attention, Tensor logsumexp, "
      "Tensor qkv_weight, Tensor out_weight, int num_heads, float? scale, bool is_causal, Tensor? key_padding_mask, "
      "str precision, bool needs_input, bool needs_qkv_weight, bool needs_qkv_bias, bool needs_out_weight, "
      "bool needs_out_bias) -> (Tensor grad_input, Tensor grad_qkv_weight, Tensor grad_qkv_bias, "
      "Tensor grad_out_weight, Tensor grad_out_bias)");

  // pad(nearest upsampling) in the input's memory format, without a gradient: the input side of a convolution whose
  // other side is not one of ours.
  m.def("_pad_upsample(Tensor input, int[2] padding, str padding_mode=\"zeros\", int upsample=1) -> Tensor");
  // Its gradient, in the memory format of grad_output.
  m.def(
      "_pad_upsample_backward(Tensor grad_output, int[2] padding, str padding_mode=\"zeros\", int upsample=1) -> "
      "Tensor");

  // The kernel's columns as channels: result[n, j * C + c, y, x] = pad(input)[n, c, y, x + j] for j < kernel_width, in
  // channels_last, zeros in the channels up to a multiple of 16 bytes. A convolution of few input channels is one of a
  // single column over it. No gradient.
  m.def("_unfold_columns(Tensor input, int kernel_width, int[2] padding, str padding_mode=\"zeros\") -> Tensor");

  // The gradient of the weights of a kernel of one column, [kernel height, channels of grad, channels of input] in
  // float32: result[k, a, b] = sum over n, y, x of grad[n, a, y, x] * input[n, b, y + k, x]. On CUDA 32 channels each.
  m.def("_column_gradient(Tensor grad, Tensor input) -> Tensor");

  // conv2d(pad(input), weight) in the memory format of input. No gradient.
  m.def(
      "_convolution(Tensor input, Tensor weight, int[2] stride, int[2] padding, str padding_mode=\"zeros\") -> Tensor");
  // Its gradients: grad_input in the memory format of input, grad_weight in that of weight. What is not needed comes as
  // [0].
  m.def(
      "_convolution_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
      "str padding_mode, bool needs_input, bool needs_weight) -> (Tensor grad_input, Tensor grad_weight)");

  // float32 of the same values, as they lie. No gradient.
  m.def("_widen(Tensor input) -> Tensor");

  // conv2d(reflection_pad(input), weight, bias) with half of the (odd) kernel as padding, without a gradient: the last
  // layer of style-transfer networks.
  m.def("_reflect_conv2d(Tensor input, Tensor weight, Tensor? bias=None, str precision=\"ieee\") -> Tensor");
}
