// fused_ffn on the CPU: the matrix products are ATen's (oneDNN), what lies around them is ours.
#include "../fused_ffn_operators.h"

#include "../../csrc/cpu/ffn.h"
#include "../../csrc/cpu/huge_pages.h"
#include "../matrix.h"
#include "matmul.h"
#include "parallel.h"

namespace styleforge {
namespace {

std::optional<FfnResult> run_transposed(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden);

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
    run_transposed,
    nullptr,
    nullptr,
    nullptr,
};

// MKL's first product is a tenth faster where it writes the hidden units in rows, [hidden, rows] (256x512 -> 2048 on
// two cores of a Xeon with AVX-512: 1.8 against 2.0 ms; 256x768 -> 3072: 4.8 against 5.3), and its second product,
// which then has no operand to transpose, by 50 us, of which the pass that transposes the result takes part back. With
// rows that are no multiple of 64, or very many, or small weights it is not faster.
bool suits_transposed(const FfnArgs& args, const FfnPlan& plan) {
  return args.input.scalar_type() == ScalarType::Float && plan.rows % 64 == 0 && plan.rows > 0 && plan.rows <= 512 &&
         plan.embed >= 512 && plan.hidden >= 1024 && plan.out > 0;
}

std::optional<FfnResult> run_transposed(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden) {
  if (keep_hidden || !suits_transposed(args, plan)) return std::nullopt;
  record_path("ffn:cpu:aten_matmul:transposed");
  const Tensor output = empty_dense(args.input, plan.output_sizes, false, ScalarType::Float);
  kBackend.fresh(output);
  const Tensor hidden = empty_dense(args.input, {plan.hidden, plan.rows}, false, ScalarType::Float);
  kBackend.fresh(hidden);
  cpu_mm(hidden, args.fc1_weight, transposed(as_rows(args.input, plan.rows)));

  OptionalTensor held;
  BiasActivationParams params;
  params.hidden = hidden.const_data_ptr();
  params.output = hidden.mutable_data_ptr();
  params.bias = bias_data(args.fc1_bias, held);
  params.rows = plan.hidden;
  params.columns = plan.rows;
  params.activation = plan.activation;
  cpu::transposed_bias_activation(params, parallel_for);

  const Tensor product = empty_dense(args.input, {plan.out, plan.rows}, false, ScalarType::Float);
  cpu_mm(product, args.fc2_weight, hidden);
  OptionalTensor residual, held_bias;
  if (args.residual) residual = args.residual->is_contiguous() ? *args.residual : to_contiguous(*args.residual, false);
  TransposedSumParams sum;
  sum.product = product.const_data_ptr();
  sum.bias = bias_data(args.fc2_bias, held_bias);
  sum.residual = residual ? residual->const_data_ptr() : nullptr;
  sum.output = output.mutable_data_ptr();
  sum.rows = plan.rows;
  sum.columns = plan.out;
  cpu::transposed_sum(sum, parallel_for);
  return FfnResult{output, {}};
}

using Operators = FfnOperators<kBackend>;

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) {
  m.impl("fused_ffn", TORCH_BOX(&styleforge::Operators::forward));
  m.impl("_fused_ffn_forward", TORCH_BOX(&styleforge::Operators::forward_for_backward));
  m.impl("_fused_ffn_backward", TORCH_BOX(&styleforge::Operators::backward));
}
