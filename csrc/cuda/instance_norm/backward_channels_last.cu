// Backward, channels_last: pass 1 sums g and g * d (gradient.cuh) of every channel over tiles of pixels, a small kernel
// adds a channel's tiles in a fixed order, pass 2 writes the gradients. Tiles as in split_channels_last.cu.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "channel_sums.cuh"
#include "channel_tiles.cuh"
#include "gradient.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    reduce_kernel(const __grid_constant__ InstanceNormBackwardParams p, int lanes, int tiles, int share,
                  acc_t<T>* partials) {
  using Acc = acc_t<T>;
  __shared__ __align__(16) Acc scratch[2][kSumScratch<kWidth>];
  const auto at = channel_tile<kWidth>(p, lanes, tiles, share, blockIdx.x);
  wait_for_predecessor();
  release_successor();
  Acc sum_g[kWidth] = {}, sum_gd[kWidth] = {};
  if (at.active) {
    const auto f = channel_facts<kWidth, Acc>(p, at.n, at.vector);
    walk_gradients<64, T, kWidth>(
        p, f, at.row, at.count, at.rows, [&](int i) { return at.index(i); },
        [&](int64_t, const Acc(&g)[kWidth], const Acc(&d)[kWidth]) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            sum_g[k] += g[k];
            sum_gd[k] += g[k] * d[k];
          }
        });
  }
  sum_over_rows<kWidth>(sum_g, lanes, scratch[0]);
  sum_over_rows<kWidth>(sum_gd, lanes, scratch[1]);
  if (at.active && at.row == 0) {
    Acc* out = partials + (at.n * tiles + at.tile) * 2 * p.channels + static_cast<int64_t>(at.vector) * kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      out[k] = sum_g[k];
      out[p.channels + k] = sum_gd[k];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kMergeWarps)
    add_tiles_kernel(const __grid_constant__ InstanceNormBackwardParams p, int tiles, const acc_t<T>* partials) {
  using Acc = acc_t<T>;
  __shared__ Acc groups[2][kMergeWarps][kWarp];
  const int blocks_per_sample = static_cast<int>((p.channels + kWarp - 1) / kWarp);
  const int64_t n = blockIdx.x / blocks_per_sample;
  const int64_t c = static_cast<int64_t>(blockIdx.x % blocks_per_sample) * kWarp + threadIdx.x;
  wait_for_predecessor();
  release_successor();
  Acc sum_g = 0, sum_gd = 0;
  if (c < p.channels) {
#pragma unroll 4
    for (int tile = threadIdx.y; tile < tiles; tile += kMergeWarps) {
      const Acc* in = partials + (n * tiles + tile) * 2 * p.channels + c;
      sum_g += in[0];
      sum_gd += in[p.channels];
    }
  }
  groups[0][threadIdx.y][threadIdx.x] = sum_g;
  groups[1][threadIdx.y][threadIdx.x] = sum_gd;
  __syncthreads();
  if (threadIdx.y != 0 || c >= p.channels) return;
  for (int g = 1; g < kMergeWarps; ++g) {
    sum_g += groups[0][g][threadIdx.x];
    sum_gd += groups[1][g][threadIdx.x];
  }
  static_cast<Acc*>(p.grad_bias)[n * p.channels + c] = sum_g;
  static_cast<Acc*>(p.grad_weight)[n * p.channels + c] = sum_gd * static_cast<const Acc*>(p.rstd)[n * p.channels + c];
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    apply_kernel(const __grid_constant__ InstanceNormBackwardParams p, int lanes, int tiles, int share) {
  using Acc = acc_t<T>;
  const auto at = channel_tile<kWidth>(p, lanes, tiles, share, gridDim.x - 1 - blockIdx.x);
  wait_for_predecessor();
  release_successor();
  if (!at.active) return;
  const auto f = channel_facts<kWidth, Acc>(p, at.n, at.vector);
  Acc slope[kWidth], offset[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int64_t c = at.n * p.channels + static_cast<int64_t>(at.vector) * kWidth + k;
    const GradientFactors<Acc> factors(f.scale[k], f.rstd[k], static_cast<const Acc*>(p.grad_bias)[c],
                                       static_cast<const Acc*>(p.grad_weight)[c], p.pixels);
    slope[k] = factors.slope;
    offset[k] = factors.offset;
  }
  walk_gradients<64, T, kWidth>(
      p, f, at.row, at.count, at.rows, [&](int i) { return at.index(i); },
      [&](int64_t index, const Acc(&g)[kWidth], const Acc(&d)[kWidth]) {
        store_gradients<T, kWidth>(p, index, f.scale, slope, offset, g, d);
      });
}

}  // namespace

cudaError_t launch_backward_channels_last(const InstanceNormBackwardParams& params,
                                          const InstanceNormSchedule& schedule, void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int tiles = static_cast<int>(schedule.parts);
  const int share = static_cast<int>(schedule.share);
  const int lanes = schedule.lanes;
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    auto* partials = static_cast<acc_t<T>*>(workspace);
    constexpr int kNarrow = kChannelWidth<T>, kWide = kFullWidth<T>;
    const int64_t vectors = params.channels / schedule.width;
    const auto grid = dim3(static_cast<unsigned>(params.batch * ceil_div(vectors, lanes) * tiles));
    auto* reduce = schedule.width == kWide     ? reduce_kernel<T, kWide>
                   : schedule.width == kNarrow ? reduce_kernel<T, kNarrow>
                                               : reduce_kernel<T, 1>;
    auto* apply = schedule.width == kWide     ? apply_kernel<T, kWide>
                  : schedule.width == kNarrow ? apply_kernel<T, kNarrow>
                                              : apply_kernel<T, 1>;
    if (const auto error =
            launch(reduce, grid, dim3(kTileThreads), 0, 1, facts, stream, params, lanes, tiles, share, partials))
      return error;
    if (const auto error =
            launch(add_tiles_kernel<T>, dim3(static_cast<unsigned>(params.batch * ceil_div(params.channels, kWarp))),
                   dim3(kWarp, kMergeWarps), 0, 1, facts, stream, params, tiles, partials))
      return error;
    return launch(apply, grid, dim3(kTileThreads), 0, 1, facts, stream, params, lanes, tiles, share);
  });
}

}  // namespace styleforge::cuda
