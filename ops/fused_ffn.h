// fused_ffn, the part that CPU and CUDA share: checks, the output's shape, the order of the stages
//
//   matrix product -> bias + activation, in place -> matrix product added to bias + residual
//
// The products are ATen's, unless the device has kernels for the whole. Where a gradient is needed, the first product
// is kept as it is (`hidden`): the backward adds the bias and activates it again, in the pass that it needs for the
// derivative anyway, so that one tensor of the hidden width is held from forward to backward where PyTorch's layers
// hold two.
#pragma once

#include "../csrc/ffn_params.h"
#include "checks.h"

#include <tuple>

namespace styleforge {

struct FfnArgs {
  const Tensor& input;
  const Tensor& fc1_weight;
  const OptionalTensor& fc1_bias;
  const Tensor& fc2_weight;
  const OptionalTensor& fc2_bias;
  const Text& activation;
  const OptionalTensor& residual;
  const Text& precision;
};

// The same, asked for once; borrowed, and without a handle where left out.
struct FfnFacts {
  TensorFacts input, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  const Text& activation;
  TensorFacts residual;
  const Text& precision;
};

struct FfnPlan {
  int64_t rows = 1;  // all leading dimensions
  int64_t embed = 0, hidden = 0, out = 0;
  FfnActivation activation = FfnActivation::kGelu;
  bool tf32 = false;
  std::vector<int64_t> output_sizes, hidden_sizes;  // the input's with another last dimension
};

// Throws on anything the operator does not accept.
FfnPlan plan_ffn(const FfnFacts& args);

// The result, and the first product where it was to be kept (with the bias where the backend adds it there).
struct FfnResult {
  Tensor output;
  OptionalTensor hidden;
};

// For the backward: the gradient of the activation's argument, `gradient` = (grad_output weight) activation'(hidden),
// with what is needed beside it. Matrices; `hidden` is dense and has its bias.
struct FfnActivationGradient {
  const Tensor& grad_output;  // [rows, out]
  const Tensor& weight;       // [out, hidden]
  const Tensor& hidden;       // [rows, hidden]
  FfnActivation activation;
  const Tensor& gradient;           // [rows, hidden]
  const OptionalTensor& activated;  // [rows, hidden], or nothing: activation(hidden)
  const OptionalTensor& sum;        // [hidden], or nothing: `gradient` summed over the rows
};

// What a device has to offer. `out` and `self` may be the same tensor in addmm (out = self + a b).
struct FfnBackend {
  const char* path;  // for last_path()
  const char* backward_path;
  void (*mm)(const Tensor& out, const Tensor& a, const Tensor& b);
  void (*addmm)(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b);
  void (*bias_activation)(const BiasActivationParams& params, const Tensor& like);
  void (*bias_activation_backward)(const BiasActivationBackwardParams& params, const Tensor& like);
  void (*bias_residual)(const BiasResidualParams& params, const Tensor& like);
  void (*fresh)(const Tensor& tensor);  // told of each tensor just allocated
  // 16-bit products are rounded after the bias is added, as PyTorch's linear layers do it: where the two cancel, a
  // product rounded before would leave its rounding behind.
  bool bias_in_16_bit_products;
  // Kernels for all of a small network, or null: where the host's time counts. As `whole`, which it comes before.
  std::optional<FfnResult> (*small)(const FfnFacts& args, const FfnPlan& plan, bool keep_hidden);
  // Kernels for both ends of both products, or null. Records its path; nothing where it does not take the call.
  std::optional<FfnResult> (*whole)(const FfnArgs& args, const FfnPlan& plan, bool keep_hidden);
  // For the backward: a product of its own in the place of mm, or null. Records its path; false where it does not take
  // it.
  bool (*own_mm)(const Tensor& out, const Tensor& a, const Tensor& b, bool tf32);
  // For the backward, or null; false where they do not take it.
  bool (*activation_gradient)(const FfnActivationGradient& args);
  bool (*sum_of_rows)(const Tensor& out, const Tensor& matrix);
};

FfnResult run_ffn(const FfnBackend& backend, const FfnArgs& args, const FfnPlan& plan, bool keep_hidden);

// A dense bias, kept alive by `holder`, or null.
const void* bias_data(const OptionalTensor& bias, OptionalTensor& holder);
const void* bias_data(const TensorFacts& bias, OptionalTensor& holder);

struct FfnBackwardArgs {
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& hidden;
  const Tensor& fc1_weight;
  const OptionalTensor& fc1_bias;
  const Tensor& fc2_weight;
  const Text& activation;
  const Text& precision;
  bool needs_input, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias;
};

// Gradients of input, fc1_weight, fc1_bias, fc2_weight, fc2_bias; [0] for those that are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_ffn_backward(const FfnBackend& backend,
                                                                    const FfnBackwardArgs& args);

}  // namespace styleforge
