// Boxes of matrices by the copy engine, and pieces of them between registers and shared memory. A box is rows of 128
// bytes (64 numbers of 16 bits, 32 float32 numbers, which the copy engine rounds to TF32) with the 128-byte swizzle.
#pragma once

#include "../common/cluster.cuh"
#include "../common/tensor_map.h"
#include "../common/types.cuh"
#include "../common/wgmma.cuh"

namespace styleforge::cuda {

constexpr int kBoxColumns = 64;  // of 16 bits
constexpr int kBoxRowBytes = 128;
template <typename T>
constexpr int kBoxNumbers = kBoxRowBytes / static_cast<int>(sizeof(T));
constexpr int kBoxBytes = 64 * kBoxRowBytes;  // of 64 rows

// [rows, columns], rows `stride` numbers apart, in boxes of `box_rows` rows.
inline cudaError_t box_map(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                           CUtensorMap& map) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const bool single = dtype == DType::kFloat32;
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * (single ? 4 : 2)};
  const cuuint32_t box[2] = {kBoxRowBytes / (single ? 4u : 2u), static_cast<cuuint32_t>(box_rows)};
  return tensor_map(dtype, data, sizes, strides, box, map, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, single);
}

#ifdef STYLEFORGE_HAS_WGMMA

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// A warp's 16 x 16 piece: the lane gives the address of row lane % 16, 16-byte half lane / 16. As load_matrix, the
// other way.
__device__ __forceinline__ void store_matrix(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
