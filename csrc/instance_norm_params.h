// Instance norm over the pixels of each (sample, channel) plane, shared by the CPU and the CUDA kernels:
//
//   y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps), var biased
//
// (Ulyanov, Vedaldi, Lempitsky 2016). `Dense` tensors only: either NCHW (a plane is `pixels` consecutive elements) or
// channels_last (a pixel is `channels` consecutive elements); input, residual, output and the gradients share the
// format, except that the forward may read one format and write the other (output_channels_last).
#pragma once

#include <cstdint>

#include "activation.h"

namespace styleforge {

struct InstanceNormParams {
  // tensors; null where absent. weight/bias: param_dtype; everything else: dtype
  const void* input = nullptr;
  const void* residual = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* output = nullptr;
  // statistics to store, [batch, channels] float (double for kFloat64); null where nobody asks for them
  void* mean = nullptr;
  void* rstd = nullptr;

  // sizes
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t pixels = 0;  // height * width
  // elements between two samples' weight/bias: 0 for [C], C for [N, C]
  int64_t param_batch_stride = 0;
  // Not 0: the CUDA forward reads the four phases of an upsampling convolution instead of a plain tensor (see
  // csrc/cuda/upsample/launch.h), and this is the width of the result. channels_last, never in place.
  int32_t phase_width = 0;

  bool channels_last = false;         // format of input
  bool output_channels_last = false;  // format of residual and output
  DType dtype = DType::kFloat32;
  DType param_dtype = DType::kFloat32;

  double eps = 1e-5;
  Activation activation = Activation::kNone;
  double negative_slope = 0.01;  // double: float64 must not see a rounded slope
};

// Backward. With g = grad_output * activation'(...), w = weight, N pixels, xhat = (x - mean) * rstd:
//   grad_input    = rstd * w * (g - sum(g)/N - xhat * sum(g * xhat)/N)
//   grad_weight_n = sum(g * xhat),  grad_bias_n = sum(g)   for every sample (the operator sums them over N for [C])
//   grad_residual = g
// input has format channels_last; grad_output, residual, saved_output and all gradients have the same one.
struct InstanceNormBackwardParams : InstanceNormParams {
  const void* grad_output = nullptr;
  const void* saved_output =
      nullptr;  // given when the derivative is taken from the result (relu family, sigmoid, tanh)
  void* grad_input = nullptr;
  void* grad_residual = nullptr;  // null where not needed
  void* grad_weight = nullptr;    // [batch, channels] float (double for kFloat64); never null
  void* grad_bias = nullptr;      // [batch, channels] float (double for kFloat64); never null
};

}  // namespace styleforge
