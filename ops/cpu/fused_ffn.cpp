// fused_ffn on the CPU: the matrix products are ATen's (oneDNN), what lies around them is ours.
#include "../fused_ffn_operators.h"

#include "../../csrc/cpu/ffn.h"
#include "../../csrc/cpu/huge_pages.h"
#include "matmul.h"
#include "parallel.h"

namespace styleforge {
namespace {

const FfnBackend kBackend{
    "ffn:cpu:aten_matmul",
    "ffn_backward:cpu:aten_matmul",
    cpu_mm,
    cpu_addmm,
    [](const BiasActivationParams& params, const Tensor&) { cpu::bias_activation(params, parallel_for); },
    [](const BiasActivationBackwardParams& params, const Tensor&) {
      cpu::bias_activation_backward(params, parallel_for);
    },
    [](const BiasResidualParams& params, const Tensor&) { cpu::bias_residual(params, parallel_for); },
    [](const Tensor& tensor) {
      cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    },
    false,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

using Operators = FfnOperators<kBackend>;

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) {
  m.impl("fused_ffn", TORCH_BOX(&styleforge::Operators::forward));
  m.impl("_fused_ffn_forward", TORCH_BOX(&styleforge::Operators::forward_for_backward));
  m.impl("_fused_ffn_backward", TORCH_BOX(&styleforge::Operators::backward));
}
