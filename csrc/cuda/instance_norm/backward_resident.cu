// Backward, channels_last, one launch, every tensor read once (sm_90+): all of the input and of the gradient is in the
// shared memory of the multiprocessors at the same time.
//
//   unit:     one sample, a slice of its channels (`lanes` vectors), all pixels: what sums are taken of
//   block:    `share` pixels of a unit; a unit has `parts` blocks
//   thread:   lane = t % lanes owns a vector of channels; row = t / lanes owns pixels row, row + rows, ...
//
// Copies of all that a block holds leave at once (cp.async), in chunks, so that sums are taken of the first while the
// last is on its way. A thread copies what it reads, so nobody waits for the others' copies. Sums of g and g * xhat go
// over the rows of a block in a fixed order and are handed to the unit's other blocks as pairs that say by themselves
// that they are there (common/grid.cuh; the marks are set while the copies are on their way); then every thread has its
// vectors at hand for the gradient. The launch is cooperative where units have several blocks.
//
// The two passes of backward_channels_last.cu read both tensors twice and need three launches one behind the other.
// Clusters in place of the grid would hand the sums over faster, but cover 112 to 120 of 132 multiprocessors, and their
// blocks are packed.
#include "../common/cluster.cuh"
#include "../common/grid.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "channel_sums.cuh"
#include "gradient.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = kBackwardResidentThreads;
constexpr int kChunks = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_resident_kernel(const __grid_constant__ InstanceNormBackwardParams p, int lanes, int share, int parts,
                             float2* sums) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr int kWidth = kFullWidth<T>;
  constexpr int kMaxChannels = kBackwardResidentLanes * kWidth;
  using V = Vec<T, kWidth>;
  using Acc = float;
  static_assert(sizeof(V) == 16);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ __align__(16) Acc scratch[2][kThreads / kWarp * kMaxChannels];
  __shared__ float2 groups[kThreads];
  __shared__ float2 total[kMaxChannels];  // a unit's sums of g and g * xhat over its pixels

  const int vectors = static_cast<int>(p.channels / kWidth);  // of one pixel
  const int slices = (vectors + lanes - 1) / lanes;
  const unsigned unit = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x - unit * parts);
  const int64_t n = unit / static_cast<unsigned>(slices);
  const int slice = static_cast<int>(unit - static_cast<unsigned>(n) * slices);
  const int lane = threadIdx.x % lanes;
  const int row = threadIdx.x / lanes;
  const int rows = blockDim.x / lanes;
  const int vector = slice * lanes + lane;
  const bool active = vector < vectors;
  const int pixels = static_cast<int>(p.pixels);
  const int begin = min(part * share, pixels);
  const int count = active ? min(share, pixels - begin) : 0;  // of this thread's lane
  const int64_t first = (n * p.pixels + begin) * vectors + vector;
  const V* held_x = reinterpret_cast<const V*>(shared);
  const V* held_dy = held_x + share * lanes;
  const int channels = lanes * kWidth;
  sums += static_cast<int64_t>(unit) * parts * channels;  // [parts, channels], the unit's
  const int per_chunk = (share + rows * kChunks - 1) / (rows * kChunks);  // of this thread's rows

  wait_for_predecessor();
  {
    const auto x_to = static_cast<uint32_t>(__cvta_generic_to_shared(held_x));
    const auto dy_to = static_cast<uint32_t>(__cvta_generic_to_shared(held_dy));
    const V* x_from = static_cast<const V*>(p.input) + first;
    const V* dy_from = static_cast<const V*>(p.grad_output) + first;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll 2
      for (int j = 0; j < per_chunk; ++j) {
        const int i = row + (chunk * per_chunk + j) * rows;
        const int64_t at = static_cast<int64_t>(i) * vectors;
        const uint32_t slot = static_cast<uint32_t>(i * lanes + lane) * sizeof(V);
        copy_async(x_to + slot, x_from + at, true, i < count);
        copy_async(dy_to + slot, dy_from + at, true, i < count);
      }
      copy_commit();
    }
  }
  release_successor();
  uint32_t token = 0;
  if (parts > 1) {
    if (threadIdx.x < channels) retract(&sums[part * channels + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) token = grid_arrive();
  }

  // 1. sums
  ChannelFacts<kWidth, Acc> f = {};
  if (active) f = channel_facts<kWidth, Acc>(p, n, vector);
  Acc sum_g[kWidth] = {}, sum_gx[kWidth] = {};
  const auto add_chunk = [&](int chunk) {
#pragma unroll 1
    for (int j = 0; j < per_chunk; ++j) {
      const int i = row + (chunk * per_chunk + j) * rows;
      if (i >= count) return;
      Acc g[kWidth], xhat[kWidth];
      gradient_before_norm<T, kWidth>(p, first + static_cast<int64_t>(i) * vectors, held_x[i * lanes + lane],
                                      held_dy[i * lanes + lane], f.mean, f.rstd, f.scale, f.shift, g, xhat);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        sum_g[k] += g[k];
        sum_gx[k] += g[k] * xhat[k];
      }
    }
  };
  static_assert(kChunks == 4);
  copy_wait<3>();
  add_chunk(0);
  copy_wait<2>();
  add_chunk(1);
  copy_wait<1>();
  add_chunk(2);
  copy_wait<0>();
  add_chunk(3);
  if (parts > 1 && threadIdx.x == 0) grid_wait(token);  // before the barrier in the sums: nothing is published before
  sum_over_rows<kWidth>(sum_g, lanes, scratch[0]);
  sum_over_rows<kWidth>(sum_gx, lanes, scratch[1]);

  // 2. over the unit's blocks: groups of threads take parts by turns, then the groups in their order
  if (row == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float2 own = make_float2(sum_g[k], sum_gx[k]);
      if (parts > 1) {
        publish(&sums[part * channels + lane * kWidth + k], own);
      } else {
        total[lane * kWidth + k] = own;
      }
    }
  }
  if (parts > 1) {
    const int group_count = static_cast<int>(blockDim.x) / channels;
    const int group = static_cast<int>(threadIdx.x) / channels;
    const int j = static_cast<int>(threadIdx.x) - group * channels;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int other = group; other < parts; other += group_count) {
      const float2 pair = await(&sums[other * channels + j]);
      sum.x += pair.x;
      sum.y += pair.y;
    }
    groups[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0) {
      for (int g = 1; g < group_count; ++g) {
        sum.x += groups[g * channels + j].x;
        sum.y += groups[g * channels + j].y;
      }
      total[j] = sum;
    }
  }
  __syncthreads();
  if (part == 0 && threadIdx.x < channels) {
    const int64_t channel = static_cast<int64_t>(slice) * channels + threadIdx.x;
    if (channel < p.channels) {
      static_cast<Acc*>(p.grad_bias)[n * p.channels + channel] = total[threadIdx.x].x;
      static_cast<Acc*>(p.grad_weight)[n * p.channels + channel] = total[threadIdx.x].y;
    }
  }

  // 3. the gradient
  Acc factor[kWidth], mean_g[kWidth], mean_gx[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    factor[k] = f.rstd[k] * f.scale[k];
    mean_g[k] = total[lane * kWidth + k].x / static_cast<Acc>(pixels);
    mean_gx[k] = total[lane * kWidth + k].y / static_cast<Acc>(pixels);
  }
#pragma unroll 1
  for (int i = row; i < count; i += rows) {
    const int64_t index = first + static_cast<int64_t>(i) * vectors;
    Acc g[kWidth], xhat[kWidth];
    gradient_before_norm<T, kWidth>(p, index, held_x[i * lanes + lane], held_dy[i * lanes + lane], f.mean, f.rstd,
                                    f.scale, f.shift, g, xhat);
    store_gradients<T, kWidth>(p, index, factor, mean_g, mean_gx, g, xhat);
  }
#endif
}

}  // namespace

cudaError_t launch_backward_resident(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                     void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto with = [&](auto* kernel, int64_t vectors) {
    const auto grid = static_cast<unsigned>(params.batch * ceil_div(vectors, schedule.lanes) * schedule.parts);
    return launch(kernel, dim3(grid), dim3(schedule.threads), schedule.shared_bytes, Together{1, schedule.parts > 1},
                  facts, stream, params, schedule.lanes, static_cast<int>(schedule.share),
                  static_cast<int>(schedule.parts), static_cast<float2*>(workspace));
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with(backward_resident_kernel<float>, params.channels / kFullWidth<float>);
    case DType::kFloat16:
      return with(backward_resident_kernel<__half>, params.channels / kFullWidth<__half>);
    case DType::kBFloat16:
      return with(backward_resident_kernel<__nv_bfloat16>, params.channels / kFullWidth<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
