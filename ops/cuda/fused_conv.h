// The convolution with the norm's statistics in its epilogue: csrc/cuda/conv_instance_norm. And what the ways to
// convolve share.
#pragma once

#include "../fused_conv_instance_norm_relu.h"

namespace styleforge {

// The operator's result, or nothing where no fused kernel takes this device, shape and dtype.
std::optional<OwnedHandle> run_fused_conv(const ConvInstanceNormOptions& options, const ConvInstanceNormFacts& tensors,
                                          const ConvInstanceNormPlan& plan);

// The same for inputs of a few channels (pictures): one to four by a kernel of their own; else padded in space and to
// 16 bytes of channels, after which the taps of a kernel's row are neighbours in memory and serve as the channels of
// one tap.
std::optional<Tensor> run_picture_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan);
std::optional<Tensor> run_fused_picture_conv(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan);

// A reflection-padded convolution of stride 1 with few output channels, by the columns of its kernel
// (csrc/cuda/conv_instance_norm/columns.cu).
std::optional<Tensor> run_fused_reflect_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                             bool tf32);

// The gather before a convolution.
void launch_pad_cuda(const PadParams& params, const Tensor& like);

// The result in channels_last, written over the tensor that is given (the convolution's, or a fresh one).
InstanceNormRequest channels_last_in_place(const ConvInstanceNormOptions& options, const ConvInstanceNormPlan& plan);

// Weights of the four phases of a 3x3 convolution after an upsampling, [4 * Co, Ci, 2, 2] in channels_last: see
// csrc/cuda/upsample/launch.h. `round_tf32` rounds float32 to TF32.
Tensor upsample_phase_weights(const Tensor& weight, bool round_tf32);

// Whether that is how an upsampling convolution can run.
bool takes_upsample_phases(const ConvInstanceNormOptions& options, const TensorFacts& weight,
                           const ConvInstanceNormPlan& plan);

}  // namespace styleforge
