// channels_last tensors whose slabs do not fit on chip: pass 1 takes (mean, M2) of every channel in tiles of pixels, a
// small kernel merges a channel's tiles in a fixed order, pass 2 normalises, last tile first, so that it starts with
// what the L2 cache still holds. Blocks are cut as in slab.cu: lanes x 16 bytes of channels by rows of pixels.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "channel_sums.cuh"
#include "channel_tiles.cuh"
#include "kernels.h"
#include "normalize.cuh"
#include "phases.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kBatch = 4;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads)
    moments_kernel(const __grid_constant__ InstanceNormParams p, int lanes, int tiles, int share, acc_t<T>* partials) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  __shared__ __align__(16) Acc scratch[2][kSumScratch<kWidth>];
  const auto at = channel_tile<kWidth>(p, lanes, tiles, share, blockIdx.x);
  wait_for_predecessor();
  release_successor();
  ChannelMoments<kWidth, Acc> own;
  if (at.active) {
    int i = at.row;
    for (; i + (kBatch - 1) * at.rows < at.count; i += kBatch * at.rows) {
      V v[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) v[u] = load_const<V>(p.input, source_vector(p, at, i + u * at.rows));
      own.add(v);
    }
    for (; i < at.count; i += at.rows) {
      const V v[1] = {load_const<V>(p.input, source_vector(p, at, i))};
      own.add(v);
    }
  }
  Acc sum[kWidth], mean[kWidth], m2[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] = own.mean[k] * own.count;
  sum_over_rows<kWidth>(sum, lanes, scratch[0]);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    mean[k] = sum[k] / max(static_cast<Acc>(at.count), Acc(1));
    const Acc d = own.mean[k] - mean[k];
    m2[k] = own.m2[k] + own.count * d * d;
  }
  sum_over_rows<kWidth>(m2, lanes, scratch[1]);
  if (at.active && at.row == 0) {
    Acc* out = partials + (at.n * tiles + at.tile) * 2 * p.channels + static_cast<int64_t>(at.vector) * kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      out[k] = mean[k];
      out[p.channels + k] = m2[k];
    }
  }
}

// Block: 32 channels (threadIdx.x) by kMergeWarps groups of tiles (threadIdx.y): mean first, then squares about it,
// each group in the order of the tiles, then the groups in their order.
template <typename T>
__global__ void __launch_bounds__(kWarp* kMergeWarps)
    merge_moments_kernel(const __grid_constant__ InstanceNormParams p, int tiles, int share, const acc_t<T>* partials,
                         acc_t<T>* mean_out, acc_t<T>* rstd_out) {
  using Acc = acc_t<T>;
  __shared__ Acc groups[2][kMergeWarps][kWarp];
  const int blocks_per_sample = static_cast<int>((p.channels + kWarp - 1) / kWarp);
  const int64_t n = blockIdx.x / blocks_per_sample;
  const int64_t c = static_cast<int64_t>(blockIdx.x % blocks_per_sample) * kWarp + threadIdx.x;
  wait_for_predecessor();
  release_successor();
  const bool active = c < p.channels;
  const Acc* own = partials + n * tiles * 2 * p.channels + (active ? c : 0);
  const auto pixels_of = [&](int tile) {
    return static_cast<Acc>(min(static_cast<int64_t>(share), p.pixels - static_cast<int64_t>(tile) * share));
  };
  const auto over_groups = [&](Acc value, Acc(&scratch)[kMergeWarps][kWarp]) {
    scratch[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    Acc total = 0;
#pragma unroll
    for (int g = 0; g < kMergeWarps; ++g) total += scratch[g][threadIdx.x];
    return total;
  };
  Acc sum = 0;
#pragma unroll 8
  for (int tile = threadIdx.y; tile < tiles; tile += kMergeWarps) {
    sum += own[static_cast<int64_t>(tile) * 2 * p.channels] * pixels_of(tile);
  }
  const Acc mean = over_groups(sum, groups[0]) / static_cast<Acc>(p.pixels);
  Acc squares = 0;
#pragma unroll 8
  for (int tile = threadIdx.y; tile < tiles; tile += kMergeWarps) {
    const Acc* in = own + static_cast<int64_t>(tile) * 2 * p.channels;
    const Acc d = in[0] - mean;
    squares += in[p.channels] + pixels_of(tile) * d * d;
  }
  const Acc m2 = over_groups(squares, groups[1]);
  if (threadIdx.y != 0 || !active) return;
  mean_out[n * p.channels + c] = mean;
  rstd_out[n * p.channels + c] = reciprocal_sqrt(m2 / static_cast<Acc>(p.pixels) + static_cast<Acc>(p.eps));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads)
    apply_kernel(const __grid_constant__ InstanceNormParams p, int lanes, int tiles, int share, const acc_t<T>* mean_in,
                 const acc_t<T>* rstd_in) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  const auto at = channel_tile<kWidth>(p, lanes, tiles, share, gridDim.x - 1 - blockIdx.x);
  // The first vectors are loaded before the wait: pass 1 writes nothing of them, and whatever did write them was
  // complete before pass 1 let its successors start.
  constexpr int kAhead = 4;
  V ahead[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    const int i = at.row + u * at.rows;
    if (at.active && i < at.count) ahead[u] = load_const<V>(p.input, source_vector(p, at, i));
  }
  // Statistics and parameters of the block's channels, one thread a channel: read by all threads for themselves, those
  // few lines of the L2 cache would be what everything waits for.
  __shared__ __align__(16) Acc facts[3][kMaxLanes * kWidth];  // mean, scale, shift
  const int own = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(p.channels);
  const int channel = (at.vector - own % lanes) * kWidth + own;
  const bool owns = own < lanes * kWidth && channel < channels;
  const int64_t param = at.n * p.param_batch_stride + channel;
  const Acc weight = owns ? load_param(p.weight, p.param_dtype, param, Acc(1)) : Acc(0);
  const Acc bias = owns ? load_param(p.bias, p.param_dtype, param, Acc(0)) : Acc(0);
  wait_for_predecessor();
  release_successor();
  if (owns) {
    facts[0][own] = mean_in[at.n * channels + channel];
    facts[1][own] = rstd_in[at.n * channels + channel] * weight;
    facts[2][own] = bias;
  }
  __syncthreads();
  if (!at.active) return;
  ChannelAffine<Acc, kWidth> affine;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int column = own % lanes * kWidth + k;
    affine.mean[k] = facts[0][column];
    affine.scale[k] = facts[1][column];
    affine.shift[k] = facts[2][column];
  }
  switch_finish(p, [&]<Finish kFinish>() {
    const auto residual_at = [&](int i, const V& unused) {
      return has_residual<kFinish>(p) ? load_const<V>(p.residual, at.index(i)) : unused;
    };
    const auto put = [&](int i, const V& x, const V& r) {
      store(p.output, at.index(i), normalize<kFinish>(p, affine, x, r));
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = at.row + u * at.rows;
      if (i < at.count) put(i, ahead[u], residual_at(i, ahead[u]));
    }
    constexpr int kApplyBatch = kFinish == Finish::kSmooth ? 2 : 4;
    int i = at.row + kAhead * at.rows;
    for (; i + (kApplyBatch - 1) * at.rows < at.count; i += kApplyBatch * at.rows) {
      V x[kApplyBatch], r[kApplyBatch];
#pragma unroll
      for (int u = 0; u < kApplyBatch; ++u) x[u] = load_const<V>(p.input, source_vector(p, at, i + u * at.rows));
#pragma unroll
      for (int u = 0; u < kApplyBatch; ++u) r[u] = residual_at(i + u * at.rows, x[u]);
#pragma unroll
      for (int u = 0; u < kApplyBatch; ++u) put(i + u * at.rows, x[u], r[u]);
    }
#pragma unroll 1
    for (; i < at.count; i += at.rows) {
      const V x = load_const<V>(p.input, source_vector(p, at, i));
      put(i, x, residual_at(i, x));
    }
  });
}

}  // namespace

cudaError_t launch_split_channels_last(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                       void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int tiles = static_cast<int>(schedule.parts);
  const int share = static_cast<int>(schedule.share);
  const int lanes = schedule.lanes;
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    using Acc = acc_t<T>;
    auto* partials = static_cast<Acc*>(workspace);
    Acc* mean = partials + params.batch * tiles * 2 * params.channels;
    Acc* rstd = mean + params.batch * params.channels;
    if (params.mean != nullptr) {
      mean = static_cast<Acc*>(params.mean);
      rstd = static_cast<Acc*>(params.rstd);
    }
    const int64_t vectors = params.channels / (schedule.vectorized ? kChannelWidth<T> : 1);
    const auto grid = dim3(static_cast<unsigned>(params.batch * ceil_div(vectors, lanes) * tiles));
    auto* moments = schedule.vectorized ? moments_kernel<T, kChannelWidth<T>> : moments_kernel<T, 1>;
    auto* apply = schedule.vectorized ? apply_kernel<T, kChannelWidth<T>> : apply_kernel<T, 1>;
    if (const auto error =
            launch(moments, grid, dim3(kTileThreads), 0, 1, facts, stream, params, lanes, tiles, share, partials))
      return error;
    if (const auto error = launch(
            merge_moments_kernel<T>, dim3(static_cast<unsigned>(params.batch * ceil_div(params.channels, kWarp))),
            dim3(kWarp, kMergeWarps), 0, 1, facts, stream, params, tiles, share, partials, mean, rstd))
      return error;
    return launch(apply, grid, dim3(kTileThreads), 0, 1, facts, stream, params, lanes, tiles, share, mean, rstd);
  });
}

}  // namespace styleforge::cuda
