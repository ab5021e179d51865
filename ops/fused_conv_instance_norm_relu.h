// fused_conv_instance_norm_relu, the part that CPU and CUDA share: checks, the output's shape, the order of the stages
//
//   pad(upsample(input)) -> convolution (ATen) -> norm + activation + residual (fused_instance_norm's kernels)
//
// The convolution's bias is checked and then left out: the mean that the norm subtracts contains it.
#pragma once

#include "../csrc/pad_params.h"
#include "fused_instance_norm.h"

namespace styleforge {

struct ConvInstanceNormArgs {
  const Tensor& input;
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const Text& padding_mode;
  int64_t upsample;
  double eps;
  const Text& activation;
  double negative_slope;
  const OptionalTensor& residual;
  const Text& precision;
};

struct ConvInstanceNormPlan {
  std::vector<int64_t> stride, padding;
  PaddingMode mode = PaddingMode::kZeros;
  Activation activation = Activation::kRelu;
  bool tf32 = false;
  bool channels_last = false;         // of the result
  std::vector<int64_t> output_sizes;  // [N, Co, Ho, Wo]

  bool empty() const { return output_sizes[0] * output_sizes[1] * output_sizes[2] * output_sizes[3] == 0; }
};

// "zeros", "reflect" or "replicate"; throws otherwise.
PaddingMode parse_padding_mode(const char* op, const std::string& name);

// Throws on anything the operator does not accept.
ConvInstanceNormPlan plan_conv_instance_norm(const ConvInstanceNormArgs& args);

// What a device has to offer.
struct ConvInstanceNormBackend {
  void (*pad_upsample)(const PadParams& params, const Tensor& like);
  Tensor (*convolution)(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, bool tf32);
  void (*instance_norm)(const InstanceNormCall& call);
  bool mixed_formats;  // see InstanceNormRequest
};

// The norm behind the convolution as the arguments ask for it; format and place are the caller's to change.
InstanceNormRequest norm_request(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan);

// The operator styleforge::_pad_upsample: checks, then the function below.
Tensor checked_pad_upsample(const ConvInstanceNormBackend& backend, const Tensor& input,
                            const std::vector<int64_t>& padding, const Text& padding_mode, int64_t upsample);

// For `input` of that format, padded to `out_channels` channels; the pointers are the caller's to fill.
PadParams pad_params(const Tensor& input, PaddingMode mode, const std::vector<int64_t>& padding, int64_t upsample,
                     int64_t out_channels, bool channels_last);

// input padded and upsampled by the device's gather kernel, with zeros for channels up to `out_channels` where that is
// more than it has (channels_last only); input itself where nothing is to do.
Tensor pad_upsample(const ConvInstanceNormBackend& backend, const Tensor& input, int64_t upsample, PaddingMode mode,
                    const std::vector<int64_t>& padding, bool channels_last, int64_t out_channels = 0);

Tensor run_conv_instance_norm(const ConvInstanceNormBackend& backend, const ConvInstanceNormArgs& args,
                              const ConvInstanceNormPlan& plan);

}  // namespace styleforge
