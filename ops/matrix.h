// Tensors as the matrices that products take.
#pragma once

#include "stable.h"

namespace styleforge {

// [rows, width] with dense rows, without a copy where the strides allow it. `rows` is the product of all dimensions but
// the last.
Tensor as_rows(const Tensor& tensor, int64_t rows);

// How far apart those rows lie, where that takes no copy.
std::optional<int64_t> row_pitch(const TensorFacts& tensor);

// The same memory as [columns, rows].
Tensor transposed(const Tensor& matrix);

// [columns], in a fixed order.
Tensor sum_of_rows(const Tensor& matrix);

}  // namespace styleforge
