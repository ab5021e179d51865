// _widen on CUDA: csrc/cuda/layout/widen.cu where the elements lie densely, else ATen's conversion.
#include "../../csrc/cuda/layout/widen.h"

#include "../checks.h"
#include "launch.h"

namespace styleforge {
namespace {

constexpr const char* kOp = "_widen";

Tensor widen(const Tensor& input) {
  cuda::WidenParams params;
  params.dtype = kernel_dtype(kOp, "input", input.scalar_type());
  if (params.dtype == DType::kFloat32) return torch::stable::clone(input);  // a result is never its operator's input
  const bool narrow = params.dtype == DType::kFloat16 || params.dtype == DType::kBFloat16;
  const TensorFacts facts(input);
  const bool dense = is_contiguous(facts) || (facts.dim == 4 && is_dense(facts, true));
  const bool aligned = reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0;
  if (!narrow || !dense || !aligned) return to_dtype(input, ScalarType::Float);
  const Tensor output =
      empty_strided(input, std::vector<int64_t>(facts.sizes, facts.sizes + facts.dim),
                    std::vector<int64_t>(facts.strides, facts.strides + facts.dim), ScalarType::Float);
  params.count = facts.numel();
  if (params.count == 0) return output;
  params.input = input.const_data_ptr();
  params.output = output.mutable_data_ptr();
  const CudaScope scope(input);
  check_cuda(kOp, cuda::launch_widen(params, scope.stream()));
  return output;
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CUDA, m) { m.impl("_widen", TORCH_BOX(&styleforge::widen)); }
