#include "matrix.h"

namespace styleforge {

std::optional<int64_t> row_pitch(const TensorFacts& tensor) {
  const int64_t* sizes = tensor.sizes;
  const int64_t* strides = tensor.strides;
  const int64_t last = tensor.dim - 1, width = sizes[last];
  if (strides[last] != 1 && width > 1) return {};
  int64_t inner = width, pitch = width;  // of the leading dimensions looked at so far
  bool first = true;
  for (int64_t d = last; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (first ? strides[d] < width : strides[d] != inner) return {};
    if (first) pitch = strides[d];
    first = false;
    inner = strides[d] * sizes[d];
  }
  return pitch;
}

Tensor as_rows(const Tensor& tensor, int64_t rows) {
  const int64_t width = tensor.sizes().back();
  if (const auto pitch = row_pitch(tensor)) return strided_view(tensor, {rows, width}, {*pitch, 1});
  return strided_view(to_contiguous(tensor, false), {rows, width}, {width, 1});
}

Tensor transposed(const Tensor& matrix) {
  return strided_view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

Tensor sum_of_rows(const Tensor& matrix) {
  const int64_t dim = 0;
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
}

}  // namespace styleforge
