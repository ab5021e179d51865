// What the kernels of this folder share: boxes of matrices by the copy engine, and the fragments of a.
#pragma once

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "../common/tf32.cuh"
#include "../common/wgmma.cuh"

namespace styleforge::cuda {

constexpr int kChunk = 32;  // numbers of k in a stage, a row of 128 bytes
constexpr int kChunkBytes = 128;

// [rows, k] in boxes of `box_rows` x kChunk.
inline cudaError_t matrix_map(const void* data, int64_t rows, int64_t k, int64_t stride, int box_rows,
                              CUtensorMap& map) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(float)};
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(box_rows)};
  return tensor_map(DType::kFloat32, data, sizes, strides, box, map);
}

#ifdef STYLEFORGE_HAS_WGMMA

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int k, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(k), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// A chunk of a warp's 16 rows of a, rounded to TF32 numbers; `rest` takes what that leaves out.
struct Fragments {
  uint32_t hi[4][4];
  uint32_t rest[4][4];
};
// `row` is the shared address of this lane's row (lane % 16 of the warp's); swizzled by its index in the tile.
template <bool kSplit>
__device__ __forceinline__ void load_fragments(Fragments& f, uint32_t row, int index) {
  const uint32_t at = row + (((index & 7) ^ (threadIdx.x % 32 / 16)) << 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrix(f.hi[k], at ^ (k << 5));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float v = __uint_as_float(f.hi[k][i]);
      f.hi[k][i] = round_tf32(v);
      if constexpr (kSplit) f.rest[k][i] = round_tf32(v - __uint_as_float(f.hi[k][i]));
    }
  }
}

// lo * hi and hi * lo of a chunk, without what is in d. The descriptors are of b's stages.
template <int kColumns>
__device__ __forceinline__ void multiply_small_terms(float (&d)[kColumns / 2], const Fragments& f, uint64_t b,
                                                     uint64_t b_lo) {
  using Mma = Wgmma<MmaKind::kTF32, kColumns>;
#pragma unroll
  for (int k = 0; k < 4; ++k) Mma::run(d, f.rest[k], b + 2 * k, k > 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) Mma::run(d, f.hi[k], b_lo + 2 * k, true);
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
