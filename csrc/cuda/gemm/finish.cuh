// What follows a product on its way out: bias, activation, residual, on four neighbouring columns of one row.
#pragma once

#include "../common/types.cuh"
#include "../ffn/gelu.cuh"
#include "launch.h"

namespace styleforge::cuda {

using Four = Vec<float, 4>;

// The first `valid` of four numbers; `vectors`: all or none of them, in 16 bytes.
__device__ __forceinline__ Four load_four(const void* base, int64_t index, int valid, bool vectors) {
  Four v{};
  const float* from = static_cast<const float*>(base) + index;
  if (vectors) {
    if (valid > 0) v = *reinterpret_cast<const Four*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < valid) v.data[j] = from[j];
    }
  }
  return v;
}
__device__ __forceinline__ void store_four(void* base, int64_t index, const Four& v, int valid, bool vectors) {
  float* to = static_cast<float*>(base) + index;
  if (vectors) {
    if (valid > 0) *reinterpret_cast<Four*>(to) = v;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < valid) to[j] = v.data[j];
    }
  }
}

// The parts of a number that is not finite (or that rounding makes so) give NaN where the number itself may not: what
// came out NaN is multiplied again in the plain way, until it is sure to be NaN.
__device__ __forceinline__ void multiply_again(const GemmParams& p, Four& v, int64_t row, int column, int valid) {
  const float* a = static_cast<const float*>(p.a) + row * p.a_stride;
  const float* b = static_cast<const float*>(p.b) + column * p.b_stride[0];
  if (valid <= 0) return;
  Four sum{};
#pragma unroll 1
  for (int k = 0; k < p.k; ++k) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < valid) sum.data[j] = fmaf(a[k], b[j * p.b_stride[0] + k * p.b_stride[1]], sum.data[j]);
      all = all && (j >= valid || isnan(sum.data[j]));
    }
    if (all) break;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) v.data[j] = isnan(v.data[j]) ? sum.data[j] : v.data[j];
}

// Vectors i of the same columns in rows row + i * row_step. Only the first `valid` of the four columns exist, and rows
// below p.m. One switch of activations for all of them: the code of an activation, inlined, is long.
template <int kCount>
__device__ __forceinline__ void finish(const GemmParams& p, Four (&v)[kCount], int row, int row_step, int column,
                                       int valid, bool vectors) {
  Four bias{}, residual[kCount] = {};
  if (p.bias != nullptr) bias = load_four(p.bias, column, valid, vectors);
  if (p.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = row + i * row_step;
      if (at < p.m) residual[i] = load_four(p.residual, at * p.residual_stride + column, valid, vectors);
    }
  }
  const int pitch = p.pitch == 0 ? p.n : p.pitch;
  float x[4 * kCount];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) sum += v[i / 4].data[i % 4];
  if (isnan(sum)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row + i * row_step < p.m) multiply_again(p, v[i], row + i * row_step, column, valid);
    }
  }
  if (p.product != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = row + i * row_step;
      if (at < p.m) store_four(p.product, at * pitch + column, v[i], valid, vectors);
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) x[i] = v[i / 4].data[i % 4] + bias.data[i % 4];
  if (p.activate) ffn_activate<false>(x, p.activation);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = row + i * row_step;
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i].data[j] = x[4 * i + j] + residual[i].data[j];
    if (at < p.m) store_four(p.output, at * pitch + column, v[i], valid, vectors);
  }
}

}  // namespace styleforge::cuda
