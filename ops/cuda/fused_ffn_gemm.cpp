#include "fused_ffn_gemm.h"

#include "../../csrc/cuda/ffn/launch.h"
#include "../../csrc/cuda/gemm/launch.h"
#include "../matrix.h"
#include "launch.h"
#include "matmul.h"

#include <limits>

namespace styleforge {
namespace {

constexpr const char* kOp = "fused_ffn";

// Fits, rounded up to whole tiles as well.
bool narrow(int64_t value) { return value > 0 && value <= std::numeric_limits<int>::max() - 1024; }

// a [rows, k] * b^T, b [n, k] as it lies: what is known before anything is allocated.
cuda::GemmParams product_params(int64_t rows, const Tensor& b, bool tf32) {
  cuda::GemmParams params;
  params.dtype = kernel_dtype(kOp, "input", b.scalar_type());
  params.b = b.const_data_ptr();
  params.b_stride[0] = b.stride(0);
  params.b_stride[1] = b.stride(1);
  params.m = static_cast<int>(rows);
  params.n = static_cast<int>(b.size(0));
  params.k = static_cast<int>(b.size(1));
  params.a_stride = params.k;
  params.precision = tf32 ? cuda::GemmPrecision::kTF32 : cuda::GemmPrecision::kIeee;
  return params;
}

std::optional<cuda::GemmSchedule> schedule(const cuda::GemmParams& params) {
  cuda::GemmSchedule found;
  bool supported = false;
  check_cuda(kOp, cuda::schedule_gemm(params, found, supported));
  return supported ? std::optional<cuda::GemmSchedule>(found) : std::nullopt;
}

// `most_bytes`: of the weights as the product's kernel reads them, where that is to be had without losing time.
void run(const cuda::GemmParams& params, const cuda::GemmSchedule& schedule, const Tensor& like, const CudaScope& scope,
         size_t most_bytes) {
  if (!schedule.prepare_b()) {
    check_cuda(kOp, cuda::launch_gemm(params, schedule, scope.stream()));
    return;
  }
  cuda::GemmSlabs slabs;
  check_cuda(kOp, cuda::cut_gemm(params, most_bytes, slabs));
  std::optional<Tensor> holder;
  void* memory = workspace(like, slabs.bytes, holder);
  check_cuda(kOp, cuda::launch_gemm_slabs(params, schedule, slabs, memory, scope.stream()));
}

// Of a float32 matrix.
size_t matrix_bytes(int64_t rows, int64_t columns) { return static_cast<size_t>(rows * columns) * sizeof(float); }

// Rows of that width, `pitch` apart; of a copy, kept by `holder`, where the tensor has none.
const void* row_data(const TensorFacts& tensor, int64_t width, int64_t& pitch, OptionalTensor& holder) {
  const auto found = row_pitch(tensor);
  pitch = found.value_or(width);
  if (found) return const_data(tensor);
  holder = to_contiguous(tensor_of(tensor.handle), false);
  return holder->const_data_ptr();
}

// A small network in one launch.
std::optional<FfnResult> run_whole_ffn(const FfnFacts& args, const FfnPlan& plan, bool keep_hidden,
                                       const CudaScope& scope) {
  if (args.fc1_weight.strides[1] != 1 || args.fc2_weight.strides[1] != 1) return {};
  const ScalarType dtype = args.input.scalar_type();
  OptionalTensor input, held_fc1_bias, held_fc2_bias, residual;
  cuda::WholeFfnParams params;
  params.input = row_data(args.input, plan.embed, params.input_stride, input);
  params.fc1_weight = const_data(args.fc1_weight);
  params.fc1_stride = args.fc1_weight.strides[0];
  params.fc1_bias = bias_data(args.fc1_bias, held_fc1_bias);
  params.fc2_weight = const_data(args.fc2_weight);
  params.fc2_stride = args.fc2_weight.strides[0];
  params.fc2_bias = bias_data(args.fc2_bias, held_fc2_bias);
  if (args.residual.handle != nullptr) {
    params.residual = row_data(args.residual, plan.out, params.residual_stride, residual);
  }
  params.rows = static_cast<int>(plan.rows);
  params.embed = static_cast<int>(plan.embed);
  params.hidden = static_cast<int>(plan.hidden);
  params.out = static_cast<int>(plan.out);
  params.dtype = kernel_dtype(kOp, "input", dtype);
  params.activation = plan.activation;
  const auto run_whole = [&]() -> cudaError_t (*)(const cuda::WholeFfnParams&, cudaStream_t) {
    bool supported = false;
    if (dtype == ScalarType::Float) {
      check_cuda(kOp, cuda::whole_tf32_supported(params, supported));
      return supported ? cuda::launch_whole_tf32 : nullptr;
    }
    check_cuda(kOp, cuda::whole_registers_supported(params, supported));
    if (supported) return cuda::launch_whole_registers;
    check_cuda(kOp, cuda::whole_ffn_supported(params, supported));
    return supported ? cuda::launch_whole_ffn : nullptr;
  }();
  if (run_whole == nullptr) return {};
  FfnResult result{empty_dense(args.input, plan.output_sizes, false, dtype), {}};
  params.output = result.output.mutable_data_ptr();
  if (keep_hidden) {
    result.hidden = empty_dense(args.input, plan.hidden_sizes, false, dtype);
    params.product = result.hidden->mutable_data_ptr();
  }
  check_cuda(kOp, run_whole(params, scope.stream()));
  record_path(dtype == ScalarType::Float ? "ffn:cuda:sm90:3xtf32:one_launch" : "ffn:cuda:sm90:16bit:one_launch");
  return result;
}

}  // namespace

std::optional<FfnResult> run_small_ffn(const FfnFacts& args, const FfnPlan& plan, bool keep_hidden) {
  const DType dtype = kernel_dtype(kOp, "input", args.input);
  if (dtype == DType::kFloat64) return {};
  // With more rows than these TF32's products one by one are faster; with fewer ones it is given more than it asks for.
  constexpr int64_t kMostTF32Rows = 1024;
  if (dtype == DType::kFloat32 && plan.tf32 && plan.rows > kMostTF32Rows) return {};
  if (!narrow(plan.rows) || !narrow(plan.embed) || !narrow(plan.hidden) || !narrow(plan.out)) return {};
  const CudaScope scope(args.input);
  return run_whole_ffn(args, plan, keep_hidden, scope);
}

std::optional<FfnResult> run_ffn_gemm(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden) {
  const ScalarType dtype = args.input.scalar_type();
  if (dtype == ScalarType::Double || !narrow(plan.rows) || !narrow(plan.embed) || !narrow(plan.hidden) ||
      !narrow(plan.out)) {
    return {};
  }
  // What the copy engine takes: rows that begin at multiples of 16 bytes.
  const int64_t vector = 16 / static_cast<int64_t>(args.input.element_size());
  if (plan.embed % vector != 0 || plan.hidden % vector != 0) return {};
  const CudaScope scope(args.input);
  OptionalTensor held_fc1_bias, held_fc2_bias, residual;
  const Tensor input = as_rows(args.input, plan.rows);

  auto first = product_params(plan.rows, args.fc1_weight, plan.tf32);
  first.bias = bias_data(args.fc1_bias, held_fc1_bias);
  first.a = input.const_data_ptr();
  first.a_stride = input.stride(0);
  first.activate = true;
  first.activation = plan.activation;
  const auto first_schedule = schedule(first);
  if (!first_schedule) return {};
  auto second = product_params(plan.rows, args.fc2_weight, plan.tf32);
  second.bias = bias_data(args.fc2_bias, held_fc2_bias);
  if (args.residual) {
    residual = as_rows(*args.residual, plan.rows);
    second.residual = residual->const_data_ptr();
    second.residual_stride = residual->stride(0);
  }
  const auto second_schedule = schedule(second);
  // A TF32 product that is cuBLAS's is the second one at most, and what it adds one tensor.
  const bool mixed = !second_schedule && plan.tf32 && first_schedule->wide && !(args.fc2_bias && args.residual);
  if (!second_schedule && !mixed) return {};

  // Plain layers have the hidden activations twice at a time, we once: what is left is room for prepared weights. The
  // output's memory is taken after those of the first product are free again.
  const size_t hidden_bytes = matrix_bytes(plan.rows, plan.hidden), output_bytes = matrix_bytes(plan.rows, plan.out);
  OptionalTensor hidden;
  if (keep_hidden) {
    hidden = empty_dense(args.input, plan.hidden_sizes, false, dtype);
    first.product = hidden->mutable_data_ptr();
  }
  const Tensor activated = empty_dense(args.input, {plan.rows, plan.hidden}, false, dtype);
  first.output = activated.mutable_data_ptr();
  second.a = activated.const_data_ptr();
  run(first, *first_schedule, args.input, scope, hidden_bytes);
  FfnResult result{empty_dense(args.input, plan.output_sizes, false, dtype), hidden};
  second.output = result.output.mutable_data_ptr();
  if (mixed) {
    const Tensor product = strided_view(result.output, {plan.rows, plan.out}, {plan.out, 1});
    const Tensor weight = transposed(args.fc2_weight);
    if (args.fc2_bias || residual) {
      cublas_addmm(product, args.fc2_bias ? *args.fc2_bias : *residual, activated, weight);
    } else {
      cublas_mm(product, activated, weight);
    }
    record_path("ffn:cuda:sm90:tf32", "aten_matmul");
    return result;
  }
  second.b_is_ready = !second_schedule->prepare_b();
  run(second, *second_schedule, args.input, scope, hidden_bytes > output_bytes ? hidden_bytes - output_bytes : 0);
  record_path(dtype != ScalarType::Float ? "ffn:cuda:sm90:16bit"
              : plan.tf32                ? "ffn:cuda:sm90:tf32"
                                         : "ffn:cuda:sm90:3xtf32");
  return result;
}

bool run_gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool tf32) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  if (a.scalar_type() != ScalarType::Float || !narrow(m) || !narrow(n) || !narrow(k)) return false;
  if (a.stride(1) != 1 || a.stride(0) < k) return false;
  const CudaScope scope(a);
  auto params = product_params(m, strided_view(b, {n, k}, {b.stride(1), b.stride(0)}), tf32);
  params.a = a.const_data_ptr();
  params.a_stride = a.stride(0);
  params.output = out.mutable_data_ptr();
  const auto found = schedule(params);
  if (!found) return false;
  run(params, *found, a, scope, matrix_bytes(m, n));
  record_path(tf32 ? "ffn_backward:cuda:sm90:tf32" : "ffn_backward:cuda:sm90:3xtf32", "aten_matmul");
  return true;
}

bool run_linear(const Tensor& out, const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, bool tf32) {
  const int64_t m = rows.size(0), k = rows.size(1), n = weight.size(0);
  if (rows.scalar_type() != ScalarType::Float || !narrow(m) || !narrow(n) || !narrow(k)) return false;
  if (rows.stride(1) != 1 || rows.stride(0) < k) return false;
  const CudaScope scope(rows);
  OptionalTensor held;
  auto params = product_params(m, weight, tf32);
  params.a = rows.const_data_ptr();
  params.a_stride = rows.stride(0);
  params.bias = bias_data(bias, held);
  params.output = out.mutable_data_ptr();
  const auto found = schedule(params);
  if (!found || found->wide) return false;  // cuBLAS's are as fast without an activation
  run(params, *found, rows, scope, matrix_bytes(m, n));
  return true;
}

bool run_activation_gradient(const FfnActivationGradient& args) {
  const int64_t rows = args.hidden.size(0), hidden = args.hidden.size(1), out = args.weight.size(0);
  if (!narrow(rows) || !narrow(hidden) || !narrow(out) || args.grad_output.stride(1) != 1) return false;
  const CudaScope scope(args.hidden);
  cuda::GemmParams params;
  params.dtype = kernel_dtype(kOp, "input", args.hidden.scalar_type());
  params.gradient = true;
  params.activation = args.activation;
  params.m = static_cast<int>(rows);
  params.n = static_cast<int>(hidden);
  params.k = static_cast<int>(out);
  params.a = args.grad_output.const_data_ptr();
  params.a_stride = args.grad_output.stride(0);
  params.b = args.weight.const_data_ptr();
  params.b_stride[0] = args.weight.stride(1);
  params.b_stride[1] = args.weight.stride(0);
  params.residual = args.hidden.const_data_ptr();
  params.residual_stride = hidden;
  params.output = args.gradient.mutable_data_ptr();
  if (args.activated) params.product = args.activated->mutable_data_ptr();
  const auto found = schedule(params);
  if (!found) return false;
  std::optional<Tensor> holder;
  cuda::ColumnSumsParams sums;
  if (args.sum) {
    sums.part_count = (params.m + 63) / 64;
    const size_t count = static_cast<size_t>(sums.part_count) * static_cast<size_t>(hidden);
    params.column_sums = sums.parts = static_cast<float*>(workspace(args.hidden, count * sizeof(float), holder));
    sums.output = args.sum->mutable_data_ptr();
    sums.columns = params.n;
    sums.dtype = params.dtype;
  }
  check_cuda(kOp, cuda::launch_gemm(params, *found, scope.stream()));
  if (args.sum) check_cuda(kOp, cuda::launch_column_sums(sums, scope.stream()));
  record_path("ffn_backward:cuda:sm90:16bit", "aten_matmul");
  return true;
}

bool run_column_sums(const Tensor& out, const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  if (matrix.element_size() != 2 || !narrow(rows) || !narrow(columns) || columns % 8 != 0) return false;
  // Parts of rows are the second dimension of a grid.
  if (matrix.stride(1) != 1 || matrix.stride(0) % 8 != 0 || cuda::column_sum_parts(static_cast<int>(rows)) > 65535) {
    return false;
  }
  cuda::ColumnSumsParams sums;
  sums.matrix = matrix.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(sums.matrix) % 16 != 0) return false;
  const CudaScope scope(matrix);
  sums.dtype = kernel_dtype(kOp, "grad_output", matrix.scalar_type());
  sums.stride = matrix.stride(0);
  sums.rows = static_cast<int>(rows);
  sums.columns = static_cast<int>(columns);
  sums.part_count = cuda::column_sum_parts(sums.rows);
  std::optional<Tensor> holder;
  const size_t count = static_cast<size_t>(sums.part_count) * static_cast<size_t>(columns);
  sums.parts = static_cast<float*>(workspace(matrix, count * sizeof(float), holder));
  sums.output = out.mutable_data_ptr();
  check_cuda(kOp, cuda::launch_column_sums(sums, scope.stream()));
  return true;
}

}  // namespace styleforge
