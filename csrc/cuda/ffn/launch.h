// The passes around the matrix products of a feed-forward network on CUDA (see csrc/ffn_params.h). They belong to
// products that are not ours; a product of our own has them in its epilogue.
#pragma once

#include <cuda_runtime.h>

#include "../../ffn_params.h"

namespace styleforge::cuda {

cudaError_t launch_bias_activation(const BiasActivationParams& params, cudaStream_t stream);
cudaError_t launch_bias_activation_backward(const BiasActivationBackwardParams& params, cudaStream_t stream);
cudaError_t launch_bias_residual(const BiasResidualParams& params, cudaStream_t stream);

// The whole network in one launch: small ones, on sm_90.
struct WholeFfnParams {
  const void* input = nullptr;       // [rows, embed], rows input_stride apart
  const void* fc1_weight = nullptr;  // [hidden, embed], rows fc1_stride apart
  const void* fc1_bias = nullptr;    // [hidden] or null
  const void* fc2_weight = nullptr;  // [out, hidden], rows fc2_stride apart
  const void* fc2_bias = nullptr;    // [out] or null
  const void* residual = nullptr;    // [rows, out], rows residual_stride apart, or null
  void* output = nullptr;            // [rows, out], dense
  void* product = nullptr;           // [rows, hidden], dense: the first product with its bias, or null

  int64_t input_stride = 0, fc1_stride = 0, fc2_stride = 0, residual_stride = 0;  // in elements
  int rows = 0, embed = 0, hidden = 0, out = 0;
  DType dtype = DType::kFloat16;
  FfnActivation activation = FfnActivation::kGelu;
};
// Whether the kernel takes it on the current device, and is the fastest there is.
cudaError_t whole_ffn_supported(const WholeFfnParams& params, bool& supported);
cudaError_t launch_whole_ffn(const WholeFfnParams& params, cudaStream_t stream);
cudaError_t whole_registers_supported(const WholeFfnParams& params, bool& supported);
cudaError_t launch_whole_registers(const WholeFfnParams& params, cudaStream_t stream);
cudaError_t whole_tf32_supported(const WholeFfnParams& params, bool& supported);
cudaError_t launch_whole_tf32(const WholeFfnParams& params, cudaStream_t stream);

// output[column] = sum over the rows, of 16-bit numbers; columns a multiple of 8.
struct ColumnSumsParams {
  const void* matrix =
      nullptr;             // [rows, columns], rows `stride` apart, aligned to 16 bytes; null where parts are there
  float* parts = nullptr;  // [part_count, columns]: sums of some of the rows each
  void* output = nullptr;  // [columns]
  int64_t stride = 0;
  int rows = 0, columns = 0;
  int part_count = 0;  // with a matrix, column_sum_parts(rows)
  DType dtype = DType::kFloat16;
};
constexpr int kPartRows = 128;
inline int column_sum_parts(int rows) { return (rows + kPartRows - 1) / kPartRows; }
cudaError_t launch_column_sums(const ColumnSumsParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
