#include "matrix.h"

namespace styleforge {

Tensor as_rows(const Tensor& tensor, int64_t rows) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t width = sizes.back();
  bool collapses = strides.back() == 1 || width <= 1;
  int64_t inner = width, row_stride = width;  // of the leading dimensions looked at so far
  bool first = true;
  for (size_t d = sizes.size() - 1; collapses && d-- > 0;) {
    if (sizes[d] == 1) continue;
    collapses = first ? strides[d] >= width : strides[d] == inner;
    if (first) row_stride = strides[d];
    first = false;
    inner = strides[d] * sizes[d];
  }
  if (collapses) return strided_view(tensor, {rows, width}, {row_stride, 1});
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
