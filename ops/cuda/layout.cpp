#include "layout.h"

#include "../../csrc/cuda/common/launch.h"
#include "../checks.h"
#include "launch.h"

namespace styleforge {

std::optional<cuda::TransposeParams> transposition(const TensorFacts& tensor, bool to_channels_last) {
  if (tensor.dim != 4) return {};
  const size_t element = element_size(tensor);
  if (element != 2 && element != 4) return {};
  if (is_dense(tensor, to_channels_last) || !is_dense(tensor, !to_channels_last)) return {};
  const int64_t* sizes = tensor.sizes;
  constexpr int64_t kMost = INT32_MAX / 2;  // what the kernel counts in 32 bits
  if (sizes[0] > kMost || sizes[1] > kMost || sizes[2] * sizes[3] > kMost) return {};
  cuda::TransposeParams params;
  params.input = const_data(tensor);
  params.batch = static_cast<int>(sizes[0]);
  params.channels = static_cast<int>(sizes[1]);
  params.pixels = static_cast<int>(sizes[2] * sizes[3]);
  params.element_size = static_cast<int>(element);
  params.to_channels_last = to_channels_last;
  return cuda::takes_transpose(params) ? std::optional<cuda::TransposeParams>(params) : std::nullopt;
}

namespace {

std::optional<Tensor> transposed(const Tensor& tensor, bool to_channels_last) {
  if (!tensor.is_cuda()) return {};
  auto params = transposition(tensor, to_channels_last);
  if (!params) return {};
  const auto sizes = tensor.sizes();
  const Tensor output =
      empty_dense(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()), to_channels_last, tensor.scalar_type());
  params->output = output.mutable_data_ptr();
  const CudaScope scope(tensor);
  check_cuda("styleforge", cuda::launch_transpose(*params, scope.stream()));
  return output;
}

const bool installed = (install_reformat(transposed), true);

}  // namespace

Tensor channels_last_aligned(const Tensor& tensor) {
  const Tensor dense = is_dense(tensor, true) ? tensor : to_contiguous(tensor, true);
  return cuda::aligned16(dense.const_data_ptr()) ? dense : torch::stable::clone(dense);
}

}  // namespace styleforge
