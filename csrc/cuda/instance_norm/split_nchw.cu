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
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "parts.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = 8;  // loads in flight for each thread

template <typename T, int kWidth>
struct Tile {
  int64_t first;  // index of its first vector in the tensor
  int count;      // vectors
};

template <typename T, int kWidth>
__device__ __forceinline__ Tile<T, kWidth> tile_at(const InstanceNormParams& p, unsigned plane, int part, int share) {
  const int64_t vectors = p.pixels / kWidth;
  const int64_t begin = static_cast<int64_t>(part) * share;
  return {plane * vectors + begin, static_cast<int>(min(static_cast<int64_t>(share), vectors - begin))};
}

// (mean, M2) of one tile, by the whole block; thread 0 writes them.
template <typename T, int kWidth>
__device__ __forceinline__ void tile_moments(const InstanceNormParams& p, unsigned plane, int part, int share,
                                             Part<acc_t<T>>* out) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  __shared__ Acc scratch[3][kWarps];
  const auto tile = tile_at<T, kWidth>(p, plane, part, share);
  Moments<Acc> own;
  for (int i = threadIdx.x; i < tile.count; i += kBatch * kThreads) {
    V v[kBatch];
    const int present = min((tile.count - i + kThreads - 1) / kThreads, kBatch);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u < present) v[u] = load_const<V>(p.input, tile.first + i + u * kThreads);
    }
    own.add(v, present);
  }
  const int of_warp = warp_vectors<kThreads>(static_cast<int>(threadIdx.x) / kWarp, tile.count);
  const auto whole = merge_warps_of_block<kWarps>(static_cast<Acc>(tile.count) * kWidth,
                                                  merge_lanes(static_cast<Acc>(of_warp) * kWidth, own), scratch);
  if (threadIdx.x == 0) store_part(out, whole.mean, whole.m2);
}

// A tile is at most kBatch vectors a thread: it lies in registers while its plane's statistics are waited for.
template <typename T, int kWidth>
struct HeldTile {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  Tile<T, kWidth> tile;
  V x[kBatch];
  Acc weight, shift;

  __device__ __forceinline__ void load(const InstanceNormParams& p, unsigned plane, int part, int share) {
    tile = tile_at<T, kWidth>(p, plane, part, share);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = threadIdx.x + u * kThreads;
      if (i < tile.count) x[u] = load_const<V>(p.input, tile.first + i);
    }
    const int64_t param = param_of(p, plane);
    weight = load_param(p.weight, p.param_dtype, param, Acc(1));
    shift = load_param(p.bias, p.param_dtype, param, Acc(0));
  }

  __device__ __forceinline__ void finish(const InstanceNormParams& p, Acc mean, Acc rstd) const {
    const PlaneAffine<Acc> affine{mean, rstd * weight, shift};
    switch_finish(p, [&]<Finish kFinish>() {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = threadIdx.x + u * kThreads;
        if (i >= tile.count) continue;
        const V r = has_residual<kFinish>(p) ? load_const<V>(p.residual, tile.first + i) : V{};
        store(p.output, tile.first + i, normalize<kFinish>(p, affine, x[u], r));
      }
    });
  }
};

// The moments of tile `part` of a plane whose parts are `own`.
template <typename T, int kWidth>
__device__ __forceinline__ Moments<acc_t<T>> part_at(const InstanceNormParams& p, int part, int share,
                                                     const Part<acc_t<T>>* own) {
  const auto elements = static_cast<acc_t<T>>(tile_at<T, kWidth>(p, 0, part, share).count) * kWidth;
  const auto both = load_part(own + part);
  return {elements, both.mean, both.m2};
}

// A plane's tiles, merged by the whole block in a fixed order; every thread gets the result. Each part is read once a
// block: where every warp reads the same few lines of the L2 cache, their slices are what everything waits for.
template <typename T, int kWidth>
__device__ __forceinline__ Moments<acc_t<T>> merge_tiles(const InstanceNormParams& p, int parts, int share,
                                                         const Part<acc_t<T>>* own) {
  using Acc = acc_t<T>;
  __shared__ Acc scratch[3][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  Moments<Acc> of_warp;
  if (thread / kWarp * kWarp < parts) {
    Moments<Acc> of_thread;
    if (thread < parts) of_thread = part_at<T, kWidth>(p, thread, share, own);
    for (int j = thread + kThreads; j < parts; j += kThreads) of_thread.add(part_at<T, kWidth>(p, j, share, own));
    const Acc total = parts > kWarp ? warp_sum(of_thread.count) : static_cast<Acc>(p.pixels);
    of_warp = merge_lanes(total, of_thread);
  }
  if (parts > kWarp) return merge_warps_of_block<kWarps>(static_cast<Acc>(p.pixels), of_warp, scratch);
  if (thread == 0) {
    scratch[1][0] = of_warp.mean;
    scratch[2][0] = of_warp.m2;
  }
  __syncthreads();
  of_warp = {static_cast<Acc>(p.pixels), scratch[1][0], scratch[2][0]};
  return of_warp;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, Part<acc_t<T>>* partials) {
  const unsigned plane = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x - plane * parts);
  wait_for_predecessor();
  release_successor();
  tile_moments<T, kWidth>(p, plane, part, share, partials + blockIdx.x);
}

// The tile is loaded before the wait: pass 1 writes nothing of it, and whatever did write it was complete before pass 1
// let this kernel start. So the second read runs beside pass 1.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 0)
    apply_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, const Part<acc_t<T>>* partials) {
  const unsigned index = gridDim.x - 1 - blockIdx.x;
  const unsigned plane = index / static_cast<unsigned>(parts);
  const int part = static_cast<int>(index - plane * parts);
  HeldTile<T, kWidth> held;
  held.load(p, plane, part, share);
  wait_for_predecessor();
  release_successor();
  const auto whole = merge_tiles<T, kWidth>(p, parts, share, partials + static_cast<int64_t>(plane) * parts);
  const auto rstd = whole.rstd(p.eps);
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
    ticket_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, unsigned lead,
                  Part<acc_t<T>>* partials, Part<acc_t<T>>* statistics, TicketState state) {
  using Acc = acc_t<T>;
  __shared__ unsigned drawn;
  __shared__ bool completes;
  __shared__ Acc known[2];  // mean and rstd
  wait_for_predecessor();
  if (threadIdx.x == 0) drawn = atomicAdd(state.next, 1u);
  __syncthreads();
  const unsigned ticket = drawn;
  const unsigned tiles = gridDim.x / 2;
  unsigned index;
  bool apply;
  if (ticket < lead) {
    index = ticket;
    apply = false;
  } else if (ticket < lead + 2 * (tiles - lead)) {
    const unsigned pair = (ticket - lead) / 2;
    apply = (ticket - lead) % 2 == 1;
    index = apply ? pair : lead + pair;
  } else {
    index = ticket - tiles;
    apply = true;
  }
  const unsigned plane = index / static_cast<unsigned>(parts);
  const int part = static_cast<int>(index - plane * parts);
  if (!apply) {
    tile_moments<T, kWidth>(p, plane, part, share, partials + index);
    if (threadIdx.x == 0) {
      __threadfence();
      completes = atomicAdd(&state.tiles[plane], 1u) + 1 == static_cast<unsigned>(parts);
      __threadfence();
    }
    __syncthreads();
    if (!completes) return;
    const auto whole = merge_tiles<T, kWidth>(p, parts, share, partials + static_cast<int64_t>(plane) * parts);
    if (threadIdx.x == 0) {
      const Acc rstd = whole.rstd(p.eps);
      store_part(statistics + plane, whole.mean, rstd);
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
    const auto both = load_part(statistics + plane);
    known[0] = both.mean;
    known[1] = both.m2;
  }
  __syncthreads();
  held.finish(p, known[0], known[1]);
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
    auto* partials = static_cast<Part<acc_t<T>>*>(workspace);
    const auto grid = dim3(static_cast<unsigned>(tiles));
    if (schedule.lead == 0) {
      auto* moments = schedule.vectorized ? moments_kernel<T, kFullWidth<T>> : moments_kernel<T, 1>;
      auto* apply = schedule.vectorized ? apply_kernel<T, kFullWidth<T>> : apply_kernel<T, 1>;
      if (const auto error = launch(moments, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials))
        return error;
      return launch(apply, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share, partials);
    }
    const int64_t planes = params.batch * params.channels;
    auto* statistics = partials + tiles;
    auto* counters = reinterpret_cast<unsigned*>(statistics + planes);
    const size_t bytes = sizeof(unsigned) * static_cast<size_t>(1 + planes);
    if (const auto error = cudaMemsetAsync(counters, 0, bytes, stream)) return error;
    auto* kernel = schedule.vectorized ? ticket_kernel<T, kFullWidth<T>> : ticket_kernel<T, 1>;
    return launch(kernel, dim3(static_cast<unsigned>(2 * tiles)), dim3(kThreads), 0, 1, facts, stream, params, parts,
                  share, static_cast<unsigned>(schedule.lead), partials, statistics,
                  TicketState{counters, counters + 1});
  });
}

}  // namespace styleforge::cuda
