// Our convolution without a norm behind it: csrc/cuda/conv_instance_norm.
#pragma once

#include "../checks.h"

namespace styleforge {

// Weights where they lie; strides in elements, of [out_channels, in_channels, kernel_h, kernel_w], negative where an
// index runs backwards.
struct WeightView {
  const unsigned char* data = nullptr;  // of the first tap
  int64_t sizes[4] = {};
  int64_t strides[4] = {};
  bool channels_last = false;  // dense and aligned: the kernels read it as it is

  explicit WeightView(const Tensor& weight);
  // That of the convolution that takes a gradient back: taps the other way round, channels exchanged.
  WeightView turned(size_t element) const;
};

// Dense, channels_last and aligned for 16-byte accesses: the tensor itself or a copy.
Tensor channels_last_aligned(const Tensor& tensor);

// A convolution in 16 bits with zeros around it, cut off or filled up to `output_size`, channels_last; nothing where
// the kernels do not take it, or where they are not the faster ones (sm_90a alone). `input` is asked for what
// channels_last_aligned makes of it.
OptionalTensor run_convolution(const char* op, const Tensor& input, OptionalTensor& pixels, const WeightView& weight,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& output_size);

}  // namespace styleforge
