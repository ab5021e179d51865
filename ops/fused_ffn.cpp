#include "fused_ffn.h"

#include "matrix.h"

namespace styleforge {

namespace {

constexpr const char* kOp = "fused_ffn";
constexpr const char* kBackwardOp = "_fused_ffn_backward";

FfnActivation parse_ffn_activation(const char* op, const std::string& name) {
  if (name == "gelu") return FfnActivation::kGelu;
  if (name == "gelu_tanh") return FfnActivation::kGeluTanh;
  if (name == "relu") return FfnActivation::kRelu;
  if (name == "silu") return FfnActivation::kSilu;
  fail(op, "activation must be one of gelu, gelu_tanh, relu, silu, got \"", name, "\"");
}

void check_bias(const char* name, const TensorFacts& bias, const TensorFacts& input, int64_t width) {
  if (bias.handle != nullptr) check_like(kOp, name, bias, input, {width});
}

bool bias_in_product(const FfnBackend& backend, const Tensor& input) {
  return backend.bias_in_16_bit_products && input.element_size() == 2;
}

Tensor fresh_matrix(const FfnBackend& backend, const Tensor& like, int64_t rows, int64_t columns) {
  Tensor matrix = empty_dense(like, {rows, columns}, false, like.scalar_type());
  backend.fresh(matrix);
  return matrix;
}

// The second product: into `output` [rows, out], on top of what stands behind it in the formula.
void second_product(const FfnBackend& backend, const FfnArgs& args, const FfnPlan& plan, const Tensor& activated,
                    const Tensor& output) {
  const Tensor weight = transposed(args.fc2_weight);
  if (!args.residual) {
    if (args.fc2_bias) return backend.addmm(output, *args.fc2_bias, activated, weight);
    return backend.mm(output, activated, weight);
  }
  if (!args.fc2_bias) return backend.addmm(output, as_rows(*args.residual, plan.rows), activated, weight);
  // The product is added to what is already in its place: a pass over the output alone, which a pass after it, reading
  // the product again, would not be.
  const Tensor residual = args.residual->is_contiguous() ? *args.residual : to_contiguous(*args.residual, false);
  OptionalTensor held;
  BiasResidualParams params;
  params.residual = residual.const_data_ptr();
  params.bias = bias_data(args.fc2_bias, held);
  params.output = output.mutable_data_ptr();
  params.rows = plan.rows;
  params.columns = plan.out;
  params.dtype = kernel_dtype(kOp, "input", output.scalar_type());
  backend.bias_residual(params, output);
  backend.addmm(output, output, activated, weight);
}

}  // namespace

const void* bias_data(const OptionalTensor& bias, OptionalTensor& holder) {
  if (!bias) return nullptr;
  holder = bias->is_contiguous() ? *bias : to_contiguous(*bias, false);
  return holder->const_data_ptr();
}

const void* bias_data(const TensorFacts& bias, OptionalTensor& holder) {
  if (bias.handle == nullptr) return nullptr;
  if (is_contiguous(bias)) return const_data(bias);
  return bias_data(optional_tensor_of(bias), holder);
}

FfnPlan plan_ffn(const FfnFacts& args) {
  FfnPlan plan;
  const TensorFacts& input = args.input;
  if (input.dim == 0) fail(kOp, "input must have shape [..., embed_dim], got ", shape_text(input));
  kernel_dtype(kOp, "input", input);
  plan.activation = parse_ffn_activation(kOp, args.activation.value);
  plan.tf32 = parse_tf32(kOp, args.precision.value);
  plan.embed = input.sizes[input.dim - 1];
  if (args.fc1_weight.dim != 2 || args.fc1_weight.sizes[1] != plan.embed) {
    fail(kOp, "fc1_weight must have shape [hidden, ", plan.embed, "], got ", shape_text(args.fc1_weight));
  }
  check_like(kOp, "fc1_weight", args.fc1_weight, input, nullptr);
  plan.hidden = args.fc1_weight.sizes[0];
  check_bias("fc1_bias", args.fc1_bias, input, plan.hidden);
  if (args.fc2_weight.dim != 2 || args.fc2_weight.sizes[1] != plan.hidden) {
    fail(kOp, "fc2_weight must have shape [out, ", plan.hidden, "], got ", shape_text(args.fc2_weight));
  }
  check_like(kOp, "fc2_weight", args.fc2_weight, input, nullptr);
  plan.out = args.fc2_weight.sizes[0];
  check_bias("fc2_bias", args.fc2_bias, input, plan.out);

  plan.output_sizes.assign(input.sizes, input.sizes + input.dim);
  for (size_t d = 0; d + 1 < plan.output_sizes.size(); ++d) plan.rows *= plan.output_sizes[d];
  plan.hidden_sizes = plan.output_sizes;
  plan.output_sizes.back() = plan.out;
  plan.hidden_sizes.back() = plan.hidden;
  if (args.residual.handle != nullptr) check_like(kOp, "residual", args.residual, input, &plan.output_sizes);
  return plan;
}

FfnResult run_ffn(const FfnBackend& backend, const FfnArgs& args, const FfnPlan& plan, bool keep_hidden) {
  const Tensor output = empty_dense(args.input, plan.output_sizes, false, args.input.scalar_type());
  backend.fresh(output);
  Tensor hidden = empty_dense(args.input, plan.hidden_sizes, false, args.input.scalar_type());
  const FfnResult result{output, keep_hidden ? OptionalTensor(hidden) : OptionalTensor()};
  if (plan.rows == 0) return result;

  backend.fresh(hidden);
  const Tensor product = strided_view(hidden, {plan.rows, plan.hidden}, {plan.hidden, 1});
  const bool biased = args.fc1_bias && bias_in_product(backend, args.input);
  if (biased) {
    backend.addmm(product, *args.fc1_bias, as_rows(args.input, plan.rows), transposed(args.fc1_weight));
  } else {
    backend.mm(product, as_rows(args.input, plan.rows), transposed(args.fc1_weight));
  }
  const Tensor activated = keep_hidden ? fresh_matrix(backend, args.input, plan.rows, plan.hidden) : product;

  OptionalTensor held;
  BiasActivationParams params;
  params.hidden = product.const_data_ptr();
  if (!biased) params.bias = bias_data(args.fc1_bias, held);
  params.output = activated.mutable_data_ptr();
  params.rows = plan.rows;
  params.columns = plan.hidden;
  params.dtype = kernel_dtype(kOp, "input", args.input.scalar_type());
  params.activation = plan.activation;
  if (plan.hidden > 0) backend.bias_activation(params, args.input);
  if (plan.out > 0) {
    second_product(backend, args, plan, activated, strided_view(output, {plan.rows, plan.out}, {plan.out, 1}));
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_ffn_backward(const FfnBackend& backend,
                                                                    const FfnBackwardArgs& args) {
  const Tensor& input = args.input;
  const auto sizes = input.sizes();
  if (sizes.size() == 0 || args.fc1_weight.dim() != 2 || args.fc2_weight.dim() != 2) {
    fail(kBackwardOp, "input, fc1_weight and fc2_weight must be [..., embed_dim] and matrices, got ", shape_text(input),
         ", ", shape_text(args.fc1_weight), " and ", shape_text(args.fc2_weight));
  }
  const int64_t embed = sizes.back(), hidden = args.fc1_weight.size(0), out = args.fc2_weight.size(0);
  check_like(kBackwardOp, "fc1_weight", args.fc1_weight, input, {hidden, embed});
  check_like(kBackwardOp, "fc2_weight", args.fc2_weight, input, {out, hidden});
  if (args.fc1_bias) check_like(kBackwardOp, "fc1_bias", *args.fc1_bias, input, {hidden});
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  std::vector<int64_t> expected(sizes.begin(), sizes.end());
  expected.back() = out;
  check_like(kBackwardOp, "grad_output", args.grad_output, input, &expected);
  expected.back() = hidden;
  check_like(kBackwardOp, "hidden", args.hidden, input, &expected);

  const bool tf32 = parse_tf32(kBackwardOp, args.precision.value);
  const auto mm = [&](const Tensor& result, const Tensor& a, const Tensor& b) {
    if (backend.own_mm == nullptr || !backend.own_mm(result, a, b, tf32)) backend.mm(result, a, b);
  };
  const Tensor grad_output = as_rows(args.grad_output, rows);
  const Tensor kept = args.hidden.is_contiguous() ? args.hidden : to_contiguous(args.hidden, false);
  const bool needs_grad_hidden = args.needs_input || args.needs_fc1_weight || args.needs_fc1_bias;
  const auto none = [&] { return empty_dense(input, {0}, false, input.scalar_type()); };
  const auto vector = [&](int64_t width) { return empty_dense(input, {width}, false, input.scalar_type()); };
  const FfnActivation activation = parse_ffn_activation(kBackwardOp, args.activation.value);
  OptionalTensor grad_hidden, activated, grad_fc1_bias, held;
  if (needs_grad_hidden) grad_hidden = fresh_matrix(backend, input, rows, hidden);
  if (args.needs_fc2_weight) activated = fresh_matrix(backend, input, rows, hidden);
  bool fused = false;
  if (needs_grad_hidden) {
    if (backend.activation_gradient != nullptr && bias_in_product(backend, input)) {
      if (args.needs_fc1_bias) grad_fc1_bias = vector(hidden);
      fused =
          backend.activation_gradient({grad_output, args.fc2_weight, strided_view(kept, {rows, hidden}, {hidden, 1}),
                                       activation, *grad_hidden, activated, grad_fc1_bias});
      if (!fused) grad_fc1_bias.reset();
    }
    // First the gradient of the activation's result, then, in its place, that of its argument.
    if (!fused) mm(*grad_hidden, grad_output, args.fc2_weight);
  }
  if (!fused && (grad_hidden || activated) && rows * hidden > 0) {
    BiasActivationBackwardParams params;
    params.hidden = kept.const_data_ptr();
    if (!bias_in_product(backend, input)) params.bias = bias_data(args.fc1_bias, held);
    params.rows = rows;
    params.columns = hidden;
    params.dtype = kernel_dtype(kBackwardOp, "input", input.scalar_type());
    params.activation = activation;
    if (grad_hidden) params.grad_output = params.grad_hidden = grad_hidden->mutable_data_ptr();
    if (activated) params.output = activated->mutable_data_ptr();
    backend.bias_activation_backward(params, input);
  }

  const auto sum = [&](const Tensor& matrix) {
    if (backend.sum_of_rows == nullptr || input.element_size() != 2) return sum_of_rows(matrix);
    const Tensor result = vector(matrix.size(1));
    return backend.sum_of_rows(result, matrix) ? result : sum_of_rows(matrix);
  };
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor result = fresh_matrix(backend, input, a.size(0), b.size(1));
    mm(result, a, b);
    return result;
  };
  // Products of the parameters first, each letting go of what it was the last to need: cuBLAS cuts up those long sums
  // in memory of its own.
  const Tensor grad_fc2_weight = args.needs_fc2_weight ? product(transposed(grad_output), *activated) : none();
  activated.reset();
  const Tensor grad_fc1_weight =
      args.needs_fc1_weight ? product(transposed(*grad_hidden), as_rows(input, rows)) : none();
  Tensor grad_input = none();
  if (args.needs_input) {
    grad_input = empty_dense(input, std::vector<int64_t>(sizes.begin(), sizes.end()), false, input.scalar_type());
    backend.fresh(grad_input);
    mm(strided_view(grad_input, {rows, embed}, {embed, 1}), *grad_hidden, args.fc1_weight);
  }
  if (!grad_fc1_bias) grad_fc1_bias = args.needs_fc1_bias ? sum(*grad_hidden) : none();
  return {grad_input, grad_fc1_weight, *grad_fc1_bias, grad_fc2_weight,
          args.needs_fc2_bias ? sum(grad_output) : none()};
}

}  // namespace styleforge
