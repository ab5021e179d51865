// The gradient of the weights of a convolution of one column (kernel height x 1) with 32 channels on either side, what
// the 9x9 convolutions of pictures become (unfold.cu):
//
//   output[k, a, b] = sum over n, y, x of grad[n, y, x, a] * input[n, y + k, x, b]
//
// Nine products of 32 x 32 over half a million pixels: few results, much to read, and every row of the input serves
// nine rows of the kernel. cuDNN reads it nine times (213 us for 8x256x264 pixels in half, as long as the convolution
// itself takes twice); here rows flow through a ring in shared memory and are read once.
//
//   block:  64 pixels of a row, a run of rows of one sample, one after the other
//   ring:   input rows y .. y + kernel height - 1 and the next two; the gradient's row y and the next two
//   warp:   one row of the kernel: its 32 x 32 products in registers, for all the block's pixels
//
// A second kernel adds the blocks' results in their order. Shared memory: a pixel is 64 bytes, its four 16-byte pieces
// exchanged by (pixel / 2) % 4, so that eight pixels' pieces lie in different banks for ldmatrix.
#include "column_gradient.h"

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/reduce.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kPixels = 64;
constexpr int kRowBytes = kPixels * kColumnChannels * 2;
constexpr int kAhead = 2;
constexpr int kInputRows = kMostColumnRows + kAhead + 1;
constexpr int kGradRows = kAhead + 2;
constexpr size_t kSharedBytes = static_cast<size_t>(kInputRows + kGradRows) * kRowBytes;
constexpr int kResults = kColumnChannels * kColumnChannels;  // of one row of the kernel
constexpr int kSumThreads = 256;
constexpr int kSumResults = 32;  // of a block

#ifdef STYLEFORGE_HAS_MMA

// Of 16-byte piece `piece` of a pixel in a row.
__device__ __forceinline__ uint32_t place_of(int pixel, int piece) {
  return static_cast<uint32_t>(pixel * 64 + ((piece ^ ((pixel >> 1) & 3)) * 16));
}

// Asks for one row of a tensor; zeros beyond its width.
template <typename T>
__device__ __forceinline__ void copy_row(uint32_t to, const T* row, int pixels) {
  for (int i = threadIdx.x; i < kPixels * 4; i += blockDim.x) {
    const int pixel = i / 4;
    const int piece = i % 4;
    const bool valid = pixel < pixels;
    copy_async(to + place_of(pixel, piece), row + (valid ? pixel : 0) * kColumnChannels + piece * 8, valid, true);
  }
}

#endif  // STYLEFORGE_HAS_MMA

template <typename T>
__global__ void __launch_bounds__(kMostColumnRows* kWarp, 3)
    column_gradient_kernel(const __grid_constant__ ColumnGradientParams p, int parts) {
#ifdef STYLEFORGE_HAS_MMA
  extern __shared__ __align__(128) unsigned char shared[];
  const auto input_ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t grad_ring = input_ring + kInputRows * kRowBytes;
  const int k = static_cast<int>(threadIdx.x) / kWarp;  // row of the kernel
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int n = static_cast<int>(blockIdx.z);
  const int x = static_cast<int>(blockIdx.x) * kPixels;
  const int pixels = min(kPixels, p.width - x);
  const int share = (p.height + parts - 1) / parts;
  const int begin = static_cast<int>(blockIdx.y) * share;
  const int count = max(min(share, p.height - begin), 0);
  const int reach = p.kernel_height - 1;
  const int64_t row_pitch = static_cast<int64_t>(p.width) * kColumnChannels;
  const T* grad = static_cast<const T*>(p.grad) + (static_cast<int64_t>(n) * p.height + begin) * row_pitch +
                  static_cast<int64_t>(x) * kColumnChannels;
  const T* input = static_cast<const T*>(p.input) + (static_cast<int64_t>(n) * (p.height + reach) + begin) * row_pitch +
                   static_cast<int64_t>(x) * kColumnChannels;

  const auto copy_step = [&](int step) {
    if (step < count) {
      copy_row(grad_ring + step % kGradRows * kRowBytes, grad + step * row_pitch, pixels);
      const int row = step + reach;
      copy_row(input_ring + row % kInputRows * kRowBytes, input + row * row_pitch, pixels);
    }
    copy_commit();
  };

  wait_for_predecessor();
  release_successor();
  if (count > 0) {
    for (int row = 0; row < reach; ++row) copy_row(input_ring + row * kRowBytes, input + row * row_pitch, pixels);
  }
  for (int step = 0; step < kAhead; ++step) copy_step(step);

  // Matrix i = lane / 8 of ldmatrix, its row lane % 8. Of the gradient (rows of the result): pixels 8 (i / 2) and
  // channels 8 (i % 2) on; of the input (columns): pixels 8 (i % 2) and channels 8 (i / 2) on.
  const int matrix = lane / 8;
  const int grad_pixel = matrix / 2 * 8 + lane % 8;
  const int grad_piece = matrix % 2;
  const int input_pixel = matrix % 2 * 8 + lane % 8;
  const int input_piece = matrix / 2;
  float sum[2][4][4] = {};
  for (int step = 0; step < count; ++step) {
    copy_wait<kAhead - 1>();
    __syncthreads();  // this step's rows are there, and nobody reads those of the step before, which are overwritten
    copy_step(step + kAhead);
    const uint32_t grad_row = grad_ring + step % kGradRows * kRowBytes;
    const uint32_t input_row = input_ring + (step + k) % kInputRows * kRowBytes;
#pragma unroll
    for (int q = 0; q < kPixels / 16; ++q) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_matrices_transposed(a[half], grad_row + place_of(q * 16 + grad_pixel, half * 2 + grad_piece));
        load_matrices_transposed(b[half], input_row + place_of(q * 16 + input_pixel, half * 2 + input_piece));
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          multiply<T>(sum[m][c], a[m], b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1], sum[m][c]);
      }
    }
  }

  const int64_t block = (static_cast<int64_t>(n) * parts + blockIdx.y) * gridDim.x + blockIdx.x;
  float* out = p.partials + (block * p.kernel_height + k) * kResults;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float* at = out + (m * 16 + lane / 4) * kColumnChannels + c * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = make_float2(sum[m][c][0], sum[m][c][1]);
      *reinterpret_cast<float2*>(at + 8 * kColumnChannels) = make_float2(sum[m][c][2], sum[m][c][3]);
    }
  }
#endif
}

// A block adds up kSumResults results: groups of blocks by turns, then the groups in their order.
__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const __grid_constant__ ColumnGradientParams p, int blocks) {
  constexpr int kGroups = kSumThreads / kSumResults;
  __shared__ float groups[kGroups][kSumResults];
  const int group = static_cast<int>(threadIdx.x) / kSumResults;
  const int in_block = static_cast<int>(threadIdx.x) % kSumResults;
  const int i = static_cast<int>(blockIdx.x) * kSumResults + in_block;
  const int64_t pitch = static_cast<int64_t>(p.kernel_height) * kResults;
  wait_for_predecessor();
  release_successor();
  float sum = 0;
#pragma unroll 8
  for (int block = group; block < blocks; block += kGroups) sum += __ldcg(p.partials + block * pitch + i);
  groups[group][in_block] = sum;
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int g = 1; g < kGroups; ++g) sum += groups[g][in_block];
  p.output[i] = sum;
}

int pieces_of(const ColumnGradientParams& params) { return static_cast<int>(ceil_div(params.width, kPixels)); }

}  // namespace

cudaError_t schedule_column_gradient(const ColumnGradientParams& params, int& parts, size_t& workspace_bytes) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (facts.compiled_for < 80) return cudaErrorNotSupported;  // the kernel has nothing in it
  // Two blocks a multiprocessor, of at least as many rows as the ring takes to fill.
  const int64_t others = static_cast<int64_t>(params.batch) * pieces_of(params);
  int64_t wanted = ceil_div(2 * facts.multiprocessors, others);
  const int64_t most = ceil_div(params.height, kMostColumnRows);
  if (wanted > most) wanted = most;
  const int64_t share = ceil_div(params.height, wanted);
  parts = static_cast<int>(ceil_div(params.height, share));
  workspace_bytes = static_cast<size_t>(others * parts * params.kernel_height * kResults) * sizeof(float);
  return cudaSuccess;
}

cudaError_t launch_column_gradient(const ColumnGradientParams& params, int parts, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (params.kernel_height < 1 || params.kernel_height > kMostColumnRows) return cudaErrorInvalidValue;
  const int pieces = pieces_of(params);
  const auto grid =
      dim3(static_cast<unsigned>(pieces), static_cast<unsigned>(parts), static_cast<unsigned>(params.batch));
  const auto block = dim3(static_cast<unsigned>(params.kernel_height * kWarp));
  auto* kernel =
      params.dtype == DType::kFloat16 ? column_gradient_kernel<__half> : column_gradient_kernel<__nv_bfloat16>;
  if (const auto error = launch(kernel, grid, block, kSharedBytes, 1, facts, stream, params, parts)) return error;
  const auto results = static_cast<unsigned>(params.kernel_height * kResults / kSumResults);
  return launch(sum_partials_kernel, dim3(results), dim3(kSumThreads), 0, 1, facts, stream, params,
                params.batch * parts * pieces);
}

}  // namespace styleforge::cuda
