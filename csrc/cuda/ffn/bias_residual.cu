// residual + bias, which the second product is then added to.
#include "launch.h"
#include "rows.cuh"

namespace styleforge::cuda {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    bias_residual_kernel(const __grid_constant__ BiasResidualParams p, int lanes) {
  using V = Vec<T, kWidth>;
  wait_for_predecessor();
  release_successor();
  const RowPlace at(lanes);
  const int64_t vectors = p.columns / kWidth;
  if (at.vector >= vectors) return;
  const V bias = load_const<V>(p.bias, at.vector);
  V residual[kRowsInFlight];
  for_each_row(
      at, p.rows, [&](int64_t row, int i) { residual[i] = load_const<V>(p.residual, row * vectors + at.vector); },
      [&](int64_t row, int i) {
        acc_t<T> sum[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[k] = to_acc(residual[i].data[k]) + to_acc(bias.data[k]);
        store(p.output, row * vectors + at.vector, rounded<T>(sum));
      });
}

}  // namespace

cudaError_t launch_bias_residual(const BiasResidualParams& params, cudaStream_t stream) {
  const bool aligned = aligned16(params.residual) && aligned16(params.bias) && aligned16(params.output);
  return switch_dtype(params.dtype, [&]<typename T>() {
    return launch_rows<T>(bias_residual_kernel<T, kFullWidth<T>>, bias_residual_kernel<T, 1>, params, aligned, stream);
  });
}

}  // namespace styleforge::cuda
