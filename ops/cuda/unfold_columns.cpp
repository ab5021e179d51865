// _unfold_columns on CUDA: csrc/cuda/pad/unfold.cu.
#include "../../csrc/cuda/pad/unfold.h"

#include "../fused_conv_instance_norm_relu.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_unfold_columns";

Tensor unfold_columns(const Tensor& input, int64_t kernel_width, const std::vector<int64_t>& padding,
                      const Text& padding_mode) {
  if (input.dim() != 4 || input.size(1) < 1 || input.size(1) > cuda::kMostUnfoldChannels) {
    fail(kOp, "input must have shape [N, C, H, W] with C from 1 to ", cuda::kMostUnfoldChannels, ", got ",
         shape_text(input));
  }
  kernel_dtype(kOp, "input", input.scalar_type());
  cuda::UnfoldParams params;
  params.element_size = static_cast<int>(input.element_size());
  if (params.element_size == 8) fail(kOp, "input must be float32, float16 or bfloat16, got float64");
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0) fail(kOp, "padding must be two integers >= 0");
  params.mode = parse_padding_mode(kOp, padding_mode.value);
  const int64_t height = input.size(2), width = input.size(3);
  const bool reflects = params.mode == PaddingMode::kReflect;
  if (reflects && ((padding[0] > 0 && padding[0] >= height) || (padding[1] > 0 && padding[1] >= width))) {
    fail(kOp, "padding must be smaller than the input for padding_mode reflect, got padding [", padding[0], ", ",
         padding[1], "] for input ", shape_text(input));
  }
  if (params.mode == PaddingMode::kReplicate && height * width == 0) {
    fail(kOp, "padding_mode replicate needs a non-empty input, got ", shape_text(input));
  }
  const int64_t out_width = width + 2 * padding[1] - kernel_width + 1;
  if (kernel_width < 1 || out_width < 1 || kernel_width > cuda::kMostUnfoldWidth) {
    fail(kOp, "kernel_width must be from 1 to the padded input's and ", cuda::kMostUnfoldWidth, ", got ", kernel_width,
         " for input ", shape_text(input));
  }
  const int64_t full = 16 / params.element_size;
  const int64_t channels = (kernel_width * input.size(1) + full - 1) / full * full;
  const Tensor output =
      empty_dense(input, {input.size(0), channels, height + 2 * padding[0], out_width}, true, input.scalar_type());
  if (output.numel() == 0) return output;
  params.input = input.const_data_ptr();
  params.output = output.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) params.stride[d] = input.stride(d);
  params.batch = input.size(0);
  params.channels = static_cast<int>(input.size(1));
  params.height = static_cast<int>(height);
  params.width = static_cast<int>(width);
  params.out_height = static_cast<int>(height + 2 * padding[0]);
  params.out_width = static_cast<int>(out_width);
  params.out_channels = static_cast<int>(channels);
  params.kernel_width = static_cast<int>(kernel_width);
  params.pad_top = static_cast<int>(padding[0]);
  params.pad_left = static_cast<int>(padding[1]);
  const CudaScope scope(input);
  check_cuda(kOp, cuda::launch_unfold_columns(params, scope.stream()));
  return output;
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_unfold_columns", TORCH_BOX(&styleforge::unfold_columns)); }
