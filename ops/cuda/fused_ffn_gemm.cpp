#include "fused_ffn_gemm.h"

#include "../../csrc/cuda/gemm/launch.h"
#include "launch.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_ffn";

bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max(); }

// One of the two products: what is known before anything is allocated.
cuda::GemmParams product_params(const FfnPlan& plan, int64_t columns, int64_t k, const Tensor& weight,
                                const void* bias) {
  cuda::GemmParams params;
  params.b = weight.const_data_ptr();
  params.bias = bias;
  params.b_stride[0] = weight.stride(0);
  params.b_stride[1] = weight.stride(1);
  params.a_stride = k;
  params.m = static_cast<int>(plan.rows);
  params.n = static_cast<int>(columns);
  params.k = static_cast<int>(k);
  params.precision = plan.tf32 ? cuda::GemmPrecision::kTF32 : cuda::GemmPrecision::kIeee;
  return params;
}

std::optional<cuda::GemmSchedule> schedule(const cuda::GemmParams& params) {
  cuda::GemmSchedule found;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_gemm(params, found, supported));
  return supported ? std::optional<cuda::GemmSchedule>(found) : std::nullopt;
}

// The weights of one product as its kernel reads them, in memory that is free again once the product is launched.
void prepare_weights(cuda::GemmParams& params, const Tensor& like, const CudaScope& scope,
                     std::optional<Tensor>& holder) {
  cuda::GemmWeightsParams prepare;
  prepare.weight = static_cast<const float*>(params.b);
  prepare.stride[0] = params.b_stride[0];
  prepare.stride[1] = params.b_stride[1];
  prepare.rows = params.n;
  prepare.k = params.k;
  const bool split = params.precision == cuda::GemmPrecision::kIeee;
  const size_t count = static_cast<size_t>(params.n) * static_cast<size_t>(cuda::gemm_padded_k(params.k));
  auto* memory = static_cast<float*>(workspace(like, count * sizeof(float) * (split ? 2 : 1), holder));
  params.b_hi = prepare.hi = memory;
  params.b_lo = prepare.lo = split ? memory + count : nullptr;
  check_cuda(kOp, cuda::launch_gemm_weights(prepare, scope.stream()));
}

void run(cuda::GemmParams& params, const cuda::GemmSchedule& schedule, const Tensor& like, const CudaScope& scope) {
  std::optional<Tensor> holder;
  if (schedule.prepare_b()) prepare_weights(params, like, scope, holder);
  check_cuda(kOp, cuda::launch_gemm(params, schedule, scope.stream()));
}

}  // namespace

std::optional<FfnResult> run_ffn_gemm(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden) {
  if (args.input.scalar_type() != ScalarType::Float || !narrow(plan.rows) || !narrow(plan.embed) ||
      !narrow(plan.hidden) || !narrow(plan.out) || plan.embed % 4 != 0 || plan.hidden % 4 != 0) {
    return {};
  }
  const CudaScope scope(args.input);
  OptionalTensor held_fc1_bias, held_fc2_bias, residual;
  const Tensor input = as_rows(args.input, plan.rows);

  auto first = product_params(plan, plan.hidden, plan.embed, args.fc1_weight, bias_data(args.fc1_bias, held_fc1_bias));
  first.a = input.const_data_ptr();
  first.a_stride = input.stride(0);
  first.activate = true;
  first.activation = plan.activation;
  const auto first_schedule = schedule(first);
  if (!first_schedule) return {};
  auto second = product_params(plan, plan.out, plan.hidden, args.fc2_weight, bias_data(args.fc2_bias, held_fc2_bias));
  if (args.residual) {
    residual = as_rows(*args.residual, plan.rows);
    second.residual = residual->const_data_ptr();
    second.residual_stride = residual->stride(0);
  }
  const auto second_schedule = schedule(second);
  if (!second_schedule) return {};

  FfnResult result{empty_dense(args.input, plan.output_sizes, false, ScalarType::Float), {}};
  if (keep_hidden) {
    result.hidden = empty_dense(args.input, plan.hidden_sizes, false, ScalarType::Float);
    first.product = result.hidden->mutable_data_ptr();
  }
  const Tensor activated = empty_dense(args.input, {plan.rows, plan.hidden}, false, ScalarType::Float);
  first.output = activated.mutable_data_ptr();
  second.a = activated.const_data_ptr();
  second.output = result.output.mutable_data_ptr();
  run(first, *first_schedule, args.input, scope);
  second.b_is_ready = !second_schedule->prepare_b();
  run(second, *second_schedule, args.input, scope);
  record_path(plan.tf32 ? "ffn:cuda:sm90:tf32" : "ffn:cuda:sm90:3xtf32");
  return result;
}

}  // namespace styleforge
