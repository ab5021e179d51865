// fused_instance_norm, the part that CPU and CUDA share: check, allocate, fill the params. The device side launches.
#pragma once

#include "checks.h"

#include <tuple>

namespace styleforge {

// Tensors that a launch needs alive (contiguous copies included) and the params that point into them.
struct InstanceNormCall {
  InstanceNormParams params;
  Tensor output;
  std::optional<Tensor> mean, rstd;
  std::vector<Tensor> held;

  bool empty() const { return params.batch * params.channels * params.pixels == 0; }
};

// The norm + activation + residual over `input`. `output_channels_last` says which format the result takes.
// `stats` allocates mean and rstd. `in_place` writes the result over `input` (which must be dense in that format).
struct InstanceNormRequest {
  const char* op = "fused_instance_norm";
  const char* weight_name = "weight";
  const char* bias_name = "bias";
  double eps = 1e-5;
  Activation activation = Activation::kNone;
  double negative_slope = 0.01;
  bool stats = false;
  bool in_place = false;
  bool output_channels_last = false;
  // Whether the kernels read one format and write the other; else the input is brought to the result's format first.
  bool mixed_formats = false;
};

// The tensors of a call; weight, bias and residual null where absent.
struct InstanceNormTensors {
  const TensorFacts& input;
  const TensorFacts* weight;
  const TensorFacts* bias;
  const TensorFacts* residual;
};

// Fills everything but the result where all tensors lie as the kernels read them, which is nearly always and costs no
// allocation; false where one has to be copied first (prepare_instance_norm). After the checks.
bool fill_dense(const InstanceNormRequest& request, const InstanceNormTensors& tensors, InstanceNormParams& params);

InstanceNormCall prepare_instance_norm(const InstanceNormRequest& request, const Tensor& input,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual);

// As the operator's schema has it: checks everything, follows the input's memory format.
InstanceNormCall prepare_fused_instance_norm(const Tensor& input, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps, const Text& activation,
                                             double negative_slope, const OptionalTensor& residual, bool stats);

// The public operator, its tensors as handles (see OwnedHandle), which are consumed. `launch` gets the params and the
// result; not called for an empty one.
struct InstanceNormHandles {
  AtenTensorHandle input;
  const OptionalHandle &weight, &bias, &residual;
};
using InstanceNormLaunch = void (*)(const InstanceNormParams& params, const TensorFacts& output);
ReturnedHandle run_fused_instance_norm(const InstanceNormHandles& handles, double eps, const Text& activation,
                                       double negative_slope, InstanceNormLaunch launch);

struct InstanceNormBackwardCall {
  InstanceNormBackwardParams params;
  Tensor grad_input, grad_residual;
  Tensor grad_weight, grad_bias;  // [N, C] sums, float32 (float64 for float64)
  bool sum_over_batch = false;    // weight is [C]
  bool has_weight = false, has_bias = false;
  ScalarType param_dtype = ScalarType::Float;
  std::vector<Tensor> held;

  bool empty() const { return params.batch * params.channels * params.pixels == 0; }
};

InstanceNormBackwardCall prepare_instance_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const Text& activation, double negative_slope,
                                                        const OptionalTensor& residual, const OptionalTensor& output);

// Turns the per-sample sums into gradients of the parameters' shape and dtype, after the launch.
std::tuple<Tensor, Tensor, Tensor, Tensor> finish_instance_norm_backward(InstanceNormBackwardCall& call);

}  // namespace styleforge
