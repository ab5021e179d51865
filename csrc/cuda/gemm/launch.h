// Matrix product of linear layers on tensor cores, with what follows it in the same pass:
//
//   output = activation(a b^T + bias) + residual          a [m, k], b [n, k], both with neighbouring k in memory
//
// float32 in and out: to float32 accuracy (kIeee, 3xTF32), or with operands rounded to TF32 (kTF32). Or float16 or
// bfloat16 in and out, with sums in float32.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../activation.h"
#include "../../ffn_params.h"

namespace styleforge::cuda {

enum class GemmPrecision : int { kIeee = 0, kTF32 = 1 };

struct GemmParams {
  const void* a = nullptr;         // [m, k], rows a_stride apart
  const void* b = nullptr;         // [n, k], any strides
  const void* bias = nullptr;      // [n] or null
  const void* residual = nullptr;  // [m, n], rows residual_stride apart, or null
  void* output = nullptr;          // [m, n], dense
  void* product = nullptr;         // [m, n], dense: also a b^T alone (16-bit: with the bias), or null
  // Of b, as launch_gemm_weights writes it: [n, padded k], to nearest; the second where kIeee. Null where the
  // schedule's kernel rounds b itself.
  const float* b_hi = nullptr;
  const float* b_lo = nullptr;

  int64_t a_stride = 0, residual_stride = 0;  // in elements
  int64_t b_stride[2] = {0, 1};
  int m = 0, n = 0, k = 0;
  int pitch = 0;  // float32: elements between rows of output and product where those are columns of more; 0: n
  // The kernel just before this one on the stream does not write b, and waited for what came before it: b may be loaded
  // while that kernel still runs.
  bool b_is_ready = false;
  bool activate = false;
  // 16-bit, in the backward: residual is what the activation was given, b is [n, k] with neighbouring n in memory, a
  // b^T the gradient of the activation's result. output = a b^T activation'(residual), product = activation(residual).
  bool gradient = false;
  float* column_sums = nullptr;  // [ceil(m / 64), n]: of the output, over 64 rows each, or null
  FfnActivation activation = FfnActivation::kGelu;
  GemmPrecision precision = GemmPrecision::kIeee;
  DType dtype = DType::kFloat32;
};

// How the product is cut.
struct GemmSchedule {
  bool small = false;    // a tile a block, its k cut up in a cluster; else blocks that go from tile to tile
  int columns = 128;     // of a tile; rows are 64 where small, else 128
  int cluster = 1;       // blocks that share a tile, each with a part of k
  int stages = 4;        // of the ring, each 32 numbers of k, 64 of 16 bits
  int band = 16;         // tiles of rows that are done before the next ones: what the L2 cache is to hold of a
  int blocks = 0;        // of the grid
  bool vectors = false;  // rows of the results are whole vectors of 16 bytes
  bool wide = false;     // 16-bit, and TF32 that fills the device: tiles of 192 or 256 columns
  int narrow = 0;        // wide: how many of the last tiles are cut into tiles of 64 columns, of which a block gets one
  bool prepare_b() const { return !small && !wide; }
};

// Numbers of k in a row of the prepared b: a multiple of 16 bytes.
inline int64_t gemm_padded_k(int64_t k) { return (k + 3) / 4 * 4; }

// Whether the kernels take this product on the current device, and faster than cuBLAS does; fills the schedule if so.
// Pointers may still be null where they will be aligned to 16 bytes.
cudaError_t schedule_gemm(const GemmParams& params, GemmSchedule& schedule, bool& supported);

cudaError_t launch_gemm(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream);

// Weights to nearest TF32 numbers; `lo` takes what that leaves out, where it is not null.
struct GemmWeightsParams {
  const float* weight = nullptr;  // [rows, k], any strides
  float* hi = nullptr;            // [rows, gemm_padded_k(k)], as is lo
  float* lo = nullptr;
  int64_t stride[2] = {0, 1};
  int rows = 0, k = 0;
};
cudaError_t launch_gemm_weights(const GemmWeightsParams& params, cudaStream_t stream);

// A product with b prepared in pieces, one after the other in the same memory: see slabs.cu.
struct GemmSlabs {
  int columns = 0;  // of the output; the last piece may have fewer
  int k = 0;
  size_t bytes = 0;  // of the prepared piece
};
// Whole where b prepared fits `most_bytes`, else pieces that do, or nearly, and fill the device.
cudaError_t cut_gemm(const GemmParams& params, size_t most_bytes, GemmSlabs& slabs);

// For schedules that prepare b; `memory` has slabs.bytes and is free again once this is launched.
cudaError_t launch_gemm_slabs(const GemmParams& params, const GemmSchedule& schedule, const GemmSlabs& slabs,
                              void* memory, cudaStream_t stream);

}  // namespace styleforge::cuda
