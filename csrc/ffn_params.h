// What lies around the two matrix products of a feed-forward network, shared by the CPU and the CUDA kernels:
//
//   output = activation(input * fc1_weight^T + fc1_bias) * fc2_weight^T + fc2_bias + residual
//
// `hidden` is the first product before its bias, [rows, columns] with columns = the hidden width. All matrices are
// dense and row-major, of one dtype; biases are [columns] of that dtype, null where absent.
#pragma once

#include <cstdint>

#include "activation.h"

namespace styleforge {

// gelu: x * Phi(x), Phi the normal distribution function; gelu_tanh: its approximation by tanh (Hendrycks, Gimpel:
// Gaussian Error Linear Units, 2016, arXiv:1606.08415).
enum class FfnActivation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// output = activation(hidden + bias); output may be hidden.
struct BiasActivationParams {
  const void* hidden = nullptr;
  const void* bias = nullptr;
  void* output = nullptr;  // null in the backward where nobody asks for it

  int64_t rows = 0;
  int64_t columns = 0;
  DType dtype = DType::kFloat32;
  FfnActivation activation = FfnActivation::kGelu;
};

// Also grad_hidden = grad_output * activation'(hidden + bias), where grad_output is the gradient of the activation's
// result. grad_hidden may be grad_output.
struct BiasActivationBackwardParams : BiasActivationParams {
  const void* grad_output = nullptr;  // null: only `output` is wanted
  void* grad_hidden = nullptr;
};

// output = residual + bias: what the second product is then added to.
struct BiasResidualParams {
  const void* residual = nullptr;
  const void* bias = nullptr;
  void* output = nullptr;

  int64_t rows = 0;
  int64_t columns = 0;
  DType dtype = DType::kFloat32;
};

// output = product^T + bias + residual, for a second product that was written as [columns, rows]; bias and residual may
// be null, all is float32.
struct TransposedSumParams : BiasResidualParams {
  const void* product = nullptr;
};

}  // namespace styleforge
