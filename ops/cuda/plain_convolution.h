// Our convolution without a norm behind it: csrc/cuda/conv_instance_norm.
#pragma once

#include "../../csrc/cuda/conv_gradient/launch.h"
#include "../../csrc/cuda/conv_instance_norm/launch.h"
#include "../../csrc/pad_params.h"
#include "../checks.h"

#include <optional>

namespace styleforge {

// A convolution in 16 bits, channels_last, in two steps: `take` says whether the kernels run it and are the faster ones
// (sm_90a alone); what `run` reads may be made between them. `turned`: with the weights' taps the other way round and
// their input and output channels exchanged, as a gradient goes back.
class OwnConvolution {
 public:
  static std::optional<OwnConvolution> take(const char* op, const Tensor& input, const Tensor& weight, bool turned,
                                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                            PaddingMode mode, const std::vector<int64_t>& output_size);

  // Turned: what another launch writes to memory of this object's.
  cuda::TurnedWeightsParams turned_elsewhere();
  // `pixels`: what channels_last_aligned makes of the input.
  Tensor run(const Tensor& pixels);

 private:
  OwnConvolution(const char* op, const Tensor& weight, bool turned) : op_(op), weight_(weight), turned_(turned) {}

  const char* op_;
  Tensor weight_;
  bool turned_;
  cuda::ConvParams params_;
  cuda::ConvSchedule schedule_;
  std::optional<Tensor> rewritten_;
};

// What the two operators have in common: everything but grad_output.
struct ConvolutionArguments {
  const Tensor& input;
  const Tensor& weight;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  PaddingMode mode;

  // Throws; gives the result's height and width.
  std::vector<int64_t> check(const char* op) const;
};

// The input with its padding around it; itself with none.
Tensor padded(const Tensor& input, const std::vector<int64_t>& padding, PaddingMode mode);
// The gradient of the input from that of the padded one: pad_upsample_backward.cpp.
Tensor pad_upsample_backward(const Tensor& grad_output, const std::vector<int64_t>& padding, const Text& padding_mode,
                             int64_t upsample);

}  // namespace styleforge
