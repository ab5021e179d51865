// NCHW planes that do not fit on chip: pass 1 takes (mean, M2) of tiles of a plane, pass 2 merges a plane's tiles in a
// fixed order and normalises. The second read is to come from the L2 cache:
//
// - a tensor that the L2 holds: two launches, the second in reverse order (what was read last is still there);
// - a larger one, where the stream path does not take it (before sm_90, single elements, planes larger than all rings):
//   one launch of 2 x tiles blocks that draw tickets. Ticket order runs pass 1 ahead of pass 2 by `lead`
//   tiles, so that pass 2 finds its tile in the L2 and its plane's statistics complete:
//
//     ticket:  S0 S1 ... S(lead-1) | S(lead) A0 | S(lead+1) A1 | ... | A(last-1) A(last)
//
//   A block that waits for a plane's tiles waits only for smaller tickets, whose blocks already run and wait for
//   nothing (S) or for still smaller ones (A): no co-residency is needed, and the order of block launches does not
//   matter.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "channel_sums.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 8;  // loads in flight for each thread

template <typename T, int kWidth>
struct Tile {
  int64_t first;  // index of its first vector in the tensor
  int count;      // vectors
};

template <typename T, int kWidth>
__device__ __forceinline__ Tile<T, kWidth> tile_at(const InstanceNormParams& p, int64_t plane, int part, int share) {
  const int64_t vectors = p.pixels / kWidth;
  const int64_t begin = static_cast<int64_t>(part) * share;
  return {plane * vectors + begin, static_cast<int>(min(static_cast<int64_t>(share), vectors - begin))};
}

// (mean, M2) of one tile, by the whole block; thread 0 writes them.
template <typename T, int kWidth>
__device__ __forceinline__ void tile_moments(const InstanceNormParams& p, int64_t plane, int part, int parts, int share,
                                             acc_t<T>* partials) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  __shared__ Acc scratch[2][kMaxWarps];
  const auto tile = tile_at<T, kWidth>(p, plane, part, share);
  ChannelMoments<kWidth, Acc> own;
  int i = threadIdx.x;
  for (; i + (kBatch - 1) * kThreads < tile.count; i += kBatch * kThreads) {
    V v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) v[u] = load_const<V>(p.input, tile.first + i + u * kThreads);
    own.add(v);
  }
  for (; i < tile.count; i += kThreads) {
    const V v[1] = {load_const<V>(p.input, tile.first + i)};
    own.add(v);
  }
  // A thread's kWidth columns have the same count: their common mean, then the block's.
  Acc sum = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum += own.mean[k] * own.count;
  const Acc mean = block_sum(sum, scratch[0]) / (static_cast<Acc>(tile.count) * kWidth);
  Acc m2 = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const Acc d = own.mean[k] - mean;
    m2 += own.m2[k] + own.count * d * d;
  }
  m2 = block_sum(m2, scratch[1]);
  if (threadIdx.x == 0) {
    __stcg(&partials[(plane * parts + part) * 2], mean);
    __stcg(&partials[(plane * parts + part) * 2 + 1], m2);
  }
}

// A tile is at most kBatch vectors a thread: it lies in registers while its plane's statistics are waited for.
template <typename T, int kWidth>
struct HeldTile {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  Tile<T, kWidth> tile;
  V x[kBatch];
  Acc weight, shift;

  __device__ __forceinline__ void load(const InstanceNormParams& p, int64_t plane, int part, int share) {
    tile = tile_at<T, kWidth>(p, plane, part, share);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = threadIdx.x + u * kThreads;
      if (i < tile.count) x[u] = load_const<V>(p.input, tile.first + i);
    }
    const int64_t param = plane / p.channels * p.param_batch_stride + plane % p.channels;
    weight = load_param(p.weight, p.param_dtype, param, Acc(1));
    shift = load_param(p.bias, p.param_dtype, param, Acc(0));
  }

  __device__ __forceinline__ void finish(const InstanceNormParams& p, Acc mean, Acc rstd) const {
    const PlaneAffine<Acc> affine{mean, rstd * weight, shift};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = threadIdx.x + u * kThreads;
      if (i >= tile.count) continue;
      const V r = p.residual != nullptr ? load_const<V>(p.residual, tile.first + i) : V{};
      store(p.output, tile.first + i, normalize(p, affine, x[u], r));
    }
  }
};

// The part of tile `part` of a plane whose parts are `own`.
template <typename T, int kWidth>
__device__ __forceinline__ Moments<acc_t<T>> part_at(const InstanceNormParams& p, int64_t plane, int part, int share,
                                                     const acc_t<T>* own) {
  const auto elements = static_cast<acc_t<T>>(tile_at<T, kWidth>(p, plane, part, share).count) * kWidth;
  return {elements, __ldcg(&own[2 * part]), __ldcg(&own[2 * part + 1])};
}

// Merges a plane's tiles by the `step` threads that `sum` adds over.
template <typename T, int kWidth, typename Sum>
__device__ __forceinline__ Moments<acc_t<T>> merge_tiles(const InstanceNormParams& p, int64_t plane, int parts,
                                                         int share, const acc_t<T>* own, int step, Sum&& sum) {
  return merge_moments(
      static_cast<acc_t<T>>(p.pixels),
      [&](auto visit) {
        for (int j = threadIdx.x % step; j < parts; j += step) visit(part_at<T, kWidth>(p, plane, j, share, own));
      },
      sum);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, acc_t<T>* partials) {
  wait_for_predecessor();
  release_successor();
  tile_moments<T, kWidth>(p, blockIdx.x / parts, static_cast<int>(blockIdx.x % parts), parts, share, partials);
}

// The tile is loaded before the wait: pass 1 writes nothing of it, and whatever did write it was complete before pass 1
// let this kernel start. So the second read runs beside pass 1.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, const acc_t<T>* partials) {
  using Acc = acc_t<T>;
  const int64_t index = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t plane = index / parts;
  const int part = static_cast<int>(index % parts);
  HeldTile<T, kWidth> held;
  held.load(p, plane, part, share);
  wait_for_predecessor();
  release_successor();
  // Every warp merges the plane's tiles for itself.
  const Acc* own = partials + plane * parts * 2;
  const int lane = threadIdx.x % kWarp;
  Moments<Acc> whole;
  if (parts <= kWarp) {
    Moments<Acc> of_lane;
    if (lane < parts) of_lane = part_at<T, kWidth>(p, plane, lane, share, own);
    whole = merge_lanes(static_cast<Acc>(p.pixels), of_lane);
  } else {
    whole = merge_tiles<T, kWidth>(p, plane, parts, share, own, kWarp, [](Acc v) { return warp_sum(v); });
  }
  const Acc rstd = whole.rstd(p.eps);
  if (part == 0 && threadIdx.x == 0) store_statistics(p, plane, whole.mean, rstd);
  held.finish(p, whole.mean, rstd);
}

__device__ __forceinline__ void wait_a_little() { __nanosleep(64); }

// What the ticket kernel keeps in memory between its blocks; all zero at the start.
struct TicketState {
  unsigned* next;   // the next ticket
  unsigned* tiles;  // [planes]: tiles whose moments are there; parts + 1 once the plane's statistics are
};

// The block that completes a plane's moments merges them once for all; `statistics` holds mean and rstd of every plane.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 3)
    ticket_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, int64_t lead, acc_t<T>* partials,
                  acc_t<T>* statistics, TicketState state) {
  using Acc = acc_t<T>;
  __shared__ int64_t drawn;
  __shared__ bool completes;
  __shared__ Acc scratch[kMaxWarps];
  wait_for_predecessor();
  if (threadIdx.x == 0) drawn = atomicAdd(state.next, 1u);
  __syncthreads();
  const int64_t ticket = drawn;
  const int64_t tiles = gridDim.x / 2;
  int64_t index;
  bool apply;
  if (ticket < lead) {
    index = ticket;
    apply = false;
  } else if (ticket < lead + 2 * (tiles - lead)) {
    const int64_t pair = (ticket - lead) / 2;
    apply = (ticket - lead) % 2 == 1;
    index = apply ? pair : lead + pair;
  } else {
    index = ticket - tiles;
    apply = true;
  }
  const int64_t plane = index / parts;
  const int part = static_cast<int>(index % parts);
  if (!apply) {
    tile_moments<T, kWidth>(p, plane, part, parts, share, partials);
    if (threadIdx.x == 0) {
      __threadfence();
      completes = atomicAdd(&state.tiles[plane], 1u) + 1 == static_cast<unsigned>(parts);
      __threadfence();
    }
    __syncthreads();
    if (!completes) return;
    const auto whole = merge_tiles<T, kWidth>(p, plane, parts, share, partials + plane * parts * 2, kThreads,
                                              [&](Acc v) { return block_sum(v, scratch); });
    if (threadIdx.x == 0) {
      const Acc rstd = whole.rstd(p.eps);
      __stcg(&statistics[2 * plane], whole.mean);
      __stcg(&statistics[2 * plane + 1], rstd);
      store_statistics(p, plane, whole.mean, rstd);
      __threadfence();
      atomicAdd(&state.tiles[plane], 1u);
    }
    return;
  }

  HeldTile<T, kWidth> held;
  held.load(p, plane, part, share);
  if (threadIdx.x == 0) {
    volatile unsigned* done = &state.tiles[plane];
    while (*done <= static_cast<unsigned>(parts)) wait_a_little();
    __threadfence();
  }
  __syncthreads();
  held.finish(p, __ldcg(&statistics[2 * plane]), __ldcg(&statistics[2 * plane + 1]));
}

}  // namespace

cudaError_t launch_split_nchw(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                              cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int64_t tiles = params.batch * params.channels * schedule.parts;
  const int parts = static_cast<int>(schedule.parts);
  const int share = static_cast<int>(schedule.share);
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    using Acc = acc_t<T>;
    auto* partials = static_cast<Acc*>(workspace);
    const auto grid = dim3(static_cast<unsigned>(tiles));
    if (schedule.lead == 0) {
      auto* moments = schedule.vectorized ? moments_kernel<T, kFullWidth<T>> : moments_kernel<T, 1>;
      auto* apply = schedule.vectorized ? apply_kernel<T, kFullWidth<T>> : apply_kernel<T, 1>;
      if (const auto error = launch(moments, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials))
        return error;
      return launch(apply, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials);
    }
    const int64_t planes = params.batch * params.channels;
    Acc* statistics = partials + 2 * tiles;
    auto* counters = reinterpret_cast<unsigned*>(statistics + 2 * planes);
    const size_t bytes = sizeof(unsigned) * static_cast<size_t>(1 + planes);
    if (const auto error = cudaMemsetAsync(counters, 0, bytes, stream)) return error;
    auto* kernel = schedule.vectorized ? ticket_kernel<T, kFullWidth<T>> : ticket_kernel<T, 1>;
    return launch(kernel, dim3(static_cast<unsigned>(2 * tiles)), dim3(kThreads), 0, 1, facts, stream, params, parts,
                  share, schedule.lead, partials, statistics, TicketState{counters, counters + 1});
  });
}

}  // namespace styleforge::cuda
