// _column_gradient on CUDA: csrc/cuda/pad/column_gradient.cu.
#include "../../csrc/cuda/pad/column_gradient.h"

#include "../checks.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_column_gradient";

Tensor column_gradient(const Tensor& grad, const Tensor& input) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad", grad}, {"input", input}}) {
    if (tensor.dim() != 4 || tensor.size(1) != cuda::kColumnChannels) {
      fail(kOp, name, " must have shape [N, ", cuda::kColumnChannels, ", H, W], got ", shape_text(tensor));
    }
  }
  check_device(kOp, "input", input, grad);
  cuda::ColumnGradientParams params;
  params.dtype = kernel_dtype(kOp, "grad", grad.scalar_type());
  if ((params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) ||
      input.scalar_type() != grad.scalar_type()) {
    fail(kOp, "grad and input must both be float16 or bfloat16, got ", dtype_text(grad.scalar_type()), " and ",
         dtype_text(input.scalar_type()));
  }
  const int64_t rows = input.size(2) - grad.size(2) + 1;
  if (input.size(0) != grad.size(0) || input.size(3) != grad.size(3) || rows < 1 || rows > cuda::kMostColumnRows ||
      grad.size(2) < 1 || grad.size(3) < 1 || grad.size(0) < 1 || grad.size(0) > 65535) {
    fail(kOp, "input must be grad's but for up to ", cuda::kMostColumnRows - 1, " more rows, got ", shape_text(input),
         " for grad ", shape_text(grad));
  }
  const auto dense = [](const Tensor& tensor) {
    const Tensor found = is_dense(tensor, true) ? tensor : to_contiguous(tensor, true);
    const bool aligned = reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 == 0;
    return aligned ? found : torch::stable::clone(found);
  };
  const Tensor own_grad = dense(grad), own_input = dense(input);
  const Tensor output =
      empty_dense(grad, {rows, cuda::kColumnChannels, cuda::kColumnChannels}, false, ScalarType::Float);
  params.grad = own_grad.const_data_ptr();
  params.input = own_input.const_data_ptr();
  params.output = static_cast<float*>(output.mutable_data_ptr());
  params.batch = static_cast<int>(grad.size(0));
  params.height = static_cast<int>(grad.size(2));
  params.width = static_cast<int>(grad.size(3));
  params.kernel_height = static_cast<int>(rows);
  const CudaScope scope(grad);
  int parts = 1;
  size_t bytes = 0;
  check_cuda(kOp, cuda::schedule_column_gradient(params, parts, bytes));
  std::optional<Tensor> holder;
  params.partials = static_cast<float*>(workspace(grad, bytes, holder));
  check_cuda(kOp, cuda::launch_column_gradient(params, parts, scope.stream()));
  return output;
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_column_gradient", TORCH_BOX(&styleforge::column_gradient)); }
