// _pad_upsample_backward on CUDA: csrc/cuda/pad/fold.cu.
#include "../../csrc/cuda/pad/launch.h"

#include "../fused_conv_instance_norm_relu.h"
#include "launch.h"
#include "plain_convolution.h"

namespace styleforge {

namespace {
constexpr const char* kOp = "_pad_upsample_backward";
}

Tensor pad_upsample_backward(const Tensor& grad_output, const std::vector<int64_t>& padding, const Text& padding_mode,
                             int64_t upsample) {
  if (grad_output.dim() != 4) fail(kOp, "grad_output must have shape [N, C, H, W], got ", shape_text(grad_output));
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0) fail(kOp, "padding must be two integers >= 0");
  if (upsample != 1 && upsample != 2) fail(kOp, "upsample must be 1 or 2, got ", upsample);
  PadBackwardParams params;
  params.dtype = kernel_dtype(kOp, "grad_output", grad_output.scalar_type());
  params.mode = parse_padding_mode(kOp, padding_mode.value);
  int64_t size[2];  // of the upsampled input
  for (int d = 0; d < 2; ++d) {
    size[d] = grad_output.size(2 + d) - 2 * padding[d];
    const bool reaches = params.mode != PaddingMode::kReflect || padding[d] == 0 || padding[d] < size[d];
    if (size[d] < 0 || size[d] % upsample != 0 || !reaches) {
      fail(kOp, "grad_output must have the sizes of a padded input, got ", shape_text(grad_output), " for padding [",
           padding[0], ", ", padding[1], "] and upsample ", upsample);
    }
  }
  params.batch = grad_output.size(0);
  params.channels = grad_output.size(1);
  params.height = size[0] / upsample;
  params.width = size[1] / upsample;
  params.pad_top = padding[0];
  params.pad_left = padding[1];
  params.upsample = static_cast<int>(upsample);
  params.channels_last = prefers_channels_last(grad_output);
  const bool channels_last = params.channels_last;
  const Tensor dense = is_dense(grad_output, channels_last) ? grad_output : to_contiguous(grad_output, channels_last);
  const Tensor grad_input = empty_dense(grad_output, {params.batch, params.channels, params.height, params.width},
                                        channels_last, grad_output.scalar_type());
  if (params.batch * params.channels * params.height * params.width == 0) return grad_input;
  params.grad_output = dense.const_data_ptr();
  params.grad_input = grad_input.mutable_data_ptr();
  const CudaScope scope(grad_output);
  check_cuda(kOp, cuda::launch_pad_backward(params, scope.stream()));
  return grad_input;
}

}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) {
  m.impl("_pad_upsample_backward", TORCH_BOX(&styleforge::pad_upsample_backward));
}
