// NCHW, one read and one write of planes of any size (sm_90+): tiles of planes flow through a ring of stages in the
// shared memory of one resident block for each multiprocessor, so that loads, sums and stores of different tiles go on
// at the same time and memory never idles.
//
//            draw, bulk load          full            moments -> parts[]
//   producer ----------------> stage ------> stats ---------------------.
//       ^                        |             | summed                 | (global memory, all blocks)
//       |         empty          v    ready    v                        v
//       '----------------------apply <------ mergers <------- all parts of the plane are there
//
//   warp 0        producer  gets tiles in order, waits until a stage is free, starts its load
//   warps 1-3     mergers   take tiles in turn, wait for all parts of the tile's plane, merge them in their order
//   warps 4-7     stats     (mean, M2) of a tile from shared memory; the last of the four publishes it
//   warps 8-15    apply     stage -> registers (the stage is free again), normalise, residual, activate, store
//
// A block's first tiles are its own by number; the others are drawn by ticket, so that blocks end together. What a
// block publishes waits for nobody, and where all blocks run the tiles of the oldest unfinished plane are always with
// one. Two cases are left: blocks that cannot run yet, and a plane of more tiles than the rings of the blocks that run
// have stages (a slice of a GPU, many streams). A merger that has waited kPatience takes the missing parts itself, from
// global memory and to the bit as their owner takes them. So every block by itself always gets on, and a grid of one
// block is correct for any plane.
//
// A plane of one tile concerns no other block: nothing goes through global memory, and there is no workspace to zero.
//
// Blocks come as soon as the predecessor's leave their multiprocessors, and ask for their first tiles in the L2 cache
// before they wait for it: a prefetch of what may still be written does no harm. H200, cold: 4x64x256x256 in half 23.8
// us without that and with three tiles by number, 20.6 with it and with five (float 39.2, 37.0), 1.2 of it the
// prefetch.
//
// What limits it (4x64x256x256 in half, a copy by a plain kernel 17.2 us, by this ring 15.7): loads run at the full
// rate, the first store comes five microseconds after the first tile, and ten pass from the last load to the end.
// Tried, and slower: planes held by one block or a cluster of two, parts exchanged in shared memory and no zero kernel
// (21.2 and 25 us; 16x128x128x128 40.5 against 35.0; clusters of four find room on 120 multiprocessors: 32; tiles of 8
// KB a quarter to a half more); results stored from shared memory by the copy engine take as long as stores from
// registers, or up to 5 percent longer.
//
// In place: only a tile's owner writes it, and only after the tile's part is published. A merger that read a tile of
// another block looks at its part again afterwards, and drops what it computed if the part is there by then.
#include <algorithm>

#include "../common/awaited_param.cuh"
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "parts.cuh"
#include "tile_moments.cuh"
#include "turn.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kMergers = 3;
constexpr int kApplyWarps = 8;
constexpr int kFirstStats = 1 + kMergers;
constexpr int kFirstApply = kFirstStats + kStatsWarps;
constexpr int kThreads = (kFirstApply + kApplyWarps) * kWarp;
constexpr int kHeld = 8;  // vectors of a tile, at most, that an apply thread finishes
constexpr int kZeroThreads = 128;
// Parts that a lane of a merger looks for at a time.
template <typename Acc>
constexpr int kPartsHeld = sizeof(Acc) == 8 ? 2 : 4;
static_assert(kHeld * kApplyWarps * kWarp * 16 == kStreamTile);

// Not all registers of a multiprocessor, so that the next kernel's first blocks can come while these drain.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
#define STYLEFORGE_STREAM_BOUNDS __maxnreg__(sizeof(T) == 8 ? 128 : 120)
#else
#define STYLEFORGE_STREAM_BOUNDS __launch_bounds__(kThreads, 1)
#endif

struct StreamCut {
  int tiles;       // of the tensor
  int parts;       // tiles of a plane
  int share;       // vectors of a tile, the plane's last one may have fewer
  int stages;      // up to kStreamStages
  int first;       // a block's first tiles are blockIdx.x, + gridDim.x, ..., this many; 0: all are
  int fill;        // tickets that it draws at once after those
  int prefetched;  // of its first tiles, those that the L2 cache gets before the predecessor is through
  int stage_bytes;
  bool read_once;      // loads are the first that the L2 cache lets go
  bool stream_stores;  // stores, too
  bool alone;          // no workspace: tiles are planes, and all are given by number
};

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr unsigned kPause = 40;        // nanoseconds between two looks at parts that are not there
constexpr uint64_t kPatience = 20000;  // nanoseconds: many times what a plane takes where all is well

template <typename Acc>
struct Ring {
  uint64_t full[kStreamStages], counted[kStreamStages], summed[kStreamStages], ready[kStreamStages];
  uint64_t empty[kStreamStages];
  int tile[kStreamStages];  // -1: no more
  Part<Acc> warp_part[kStreamStages][kStatsWarps];
  Part<Acc> part[kStreamStages];
  PlaneAffine<Acc> affine[kStreamStages];
};

struct Span {
  int64_t plane;
  int64_t first;  // index of its first vector in the tensor
  int part;
  int count;  // vectors
};

template <int kWidth>
__device__ __forceinline__ Span span_of(const InstanceNormParams& p, const StreamCut& cut, int tile) {
  const int vectors = static_cast<int>(p.pixels / kWidth);
  const int plane = cut.parts == 1 ? tile : static_cast<int>(static_cast<unsigned>(tile) / cut.parts);
  const int part = tile - plane * cut.parts;
  const int begin = part * cut.share;
  return {plane, static_cast<int64_t>(plane) * vectors + begin, part, min(cut.share, vectors - begin)};
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

template <typename T>
struct Stream {
  static constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;

  const InstanceNormParams& p;
  const StreamCut& cut;
  Ring<Acc>& ring;
  unsigned char* stages;
  unsigned* tickets;
  Part<Acc>* parts;

  __device__ __forceinline__ V* stage(int s) const { return reinterpret_cast<V*>(stages + s * cut.stage_bytes); }
  __device__ __forceinline__ Span span(int tile) const { return span_of<kWidth>(p, cut, tile); }

  // A warp waits for the next tile. One lane reads its number, the one that lets go of the stage afterwards.
  __device__ __forceinline__ int arrived(const Turn& turn) const {
    mbarrier_wait(&ring.full[turn.stage], turn.parity);
    int tile = 0;
    if (threadIdx.x % kWarp == 0) tile = ring.tile[turn.stage];
    return __shfl_sync(0xffffffffu, tile, 0);
  }

  // One thread: the first tiles on their way to the L2 cache, while the predecessor drains.
  __device__ __forceinline__ void prefetch() const {
    int tile = static_cast<int>(blockIdx.x);
    for (int i = 0; i < cut.prefetched && tile < cut.tiles; ++i, tile += static_cast<int>(gridDim.x)) {
      const Span at = span(tile);
      bulk_prefetch(reinterpret_cast<const V*>(p.input) + at.first, static_cast<uint32_t>(at.count) * sizeof(V));
    }
  }

  // One thread.
  __device__ __forceinline__ void produce() const {
    const int blocks = static_cast<int>(gridDim.x);
    int next = static_cast<int>(blockIdx.x);
    int drawn = 0;  // tickets in hand
    Turn turn;
    for (int used = 0;; ++used, turn.next(cut.stages)) {
      const int s = turn.stage;
      const bool again = used >= cut.stages;
      if (cut.first > 0 && used >= cut.first && drawn == 0) {
        // Once its statistics are known the stage becomes free whatever other blocks do. Not earlier: a ticket in hand
        // that waits for its own plane would wait for kPatience.
        if (again) mbarrier_wait(&ring.ready[s], turn.parity ^ 1);
        drawn = used == cut.first ? cut.fill : 1;
        next = cut.first * blocks + static_cast<int>(atomicAdd(tickets, static_cast<unsigned>(drawn)));
      }
      if (again) mbarrier_wait(&ring.empty[s], turn.parity ^ 1);
      if (next >= cut.tiles) {
        ring.tile[s] = -1;
        mbarrier_arrive(&ring.full[s]);
        break;
      }
      const Span at = span(next);
      const uint32_t bytes = static_cast<uint32_t>(at.count) * sizeof(V);
      const V* from = reinterpret_cast<const V*>(p.input) + at.first;
      ring.tile[s] = next;
      mbarrier_arrive_expect(&ring.full[s], bytes);
      if (cut.read_once) {
        bulk_load_once(stage(s), from, bytes, &ring.full[s]);
      } else {
        bulk_load(stage(s), from, bytes, &ring.full[s]);
      }
      if (drawn > 0) {
        --drawn;
        ++next;
      } else {
        next += blocks;
      }
    }
  }

  // Stats warp `w`.
  __device__ __forceinline__ void take_moments(int w) const {
    for (Turn turn;; turn.next(cut.stages)) {
      const int s = turn.stage;
      const int tile = arrived(turn);
      if (tile < 0) return;
      const int count = span(tile).count;
      const V* held = stage(s);
      const auto own = warp_moments<V, Acc>(w, count, [&](int i) { return held[i]; });
      if (threadIdx.x % kWarp == 0) {
        ring.warp_part[s][w] = {own.mean, own.m2};
        if (mbarrier_arrive_is_last(&ring.counted[s])) {
          mbarrier_wait(&ring.counted[s], turn.parity);  // returns at once, and orders what comes after
          Moments<Acc> of[kStatsWarps];
#pragma unroll
          for (int v = 0; v < kStatsWarps; ++v) {
            const Part<Acc>& part = ring.warp_part[s][v];
            of[v] = {static_cast<Acc>(warp_vectors<kStatsWarps * kWarp>(v, count) * kWidth), part.mean, part.m2};
          }
          const auto merged = merge_warps<kWidth>(count, of);
          if (!cut.alone) publish(&parts[tile], merged.mean, merged.m2);
          ring.part[s] = {merged.mean, merged.m2};
          mbarrier_arrive(&ring.summed[s]);
        }
        mbarrier_arrive(&ring.empty[s]);
      }
    }
  }

  // One merger warp: waits until all parts of the plane are there, and merges them in their order; false where they do
  // not come.
  __device__ __forceinline__ bool plane_moments(int64_t plane, Moments<Acc>& whole) const {
    const int vectors = static_cast<int>(p.pixels / kWidth);
    const Part<Acc>* first = parts + plane * cut.parts;
    uint64_t since = 0;
    whole = {};
    for (int base = 0; base < cut.parts; base += kPartsHeld<Acc> * kWarp) {
      const int count = min(cut.parts - base, kPartsHeld<Acc> * kWarp);
      const int left = vectors - base * cut.share;
      Moments<Acc> part[kPartsHeld<Acc>];
      if (!collect(first + base, count, left, part, since)) return false;
      whole.add(merge_moments(
          static_cast<Acc>(min(count * cut.share, left)) * kWidth,
          [&](auto visit) {
#pragma unroll
            for (int u = 0; u < kPartsHeld<Acc>; ++u) visit(part[u]);
          },
          [](Acc v) { return warp_sum(v); }));
    }
    return true;
  }

  // Lane l gets parts l, l + 32, ... of `count`; false where they do not come.
  __device__ __forceinline__ bool collect(const Part<Acc>* first, int count, int vectors,
                                          Moments<Acc> (&part)[kPartsHeld<Acc>], uint64_t& since) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    bool there[kPartsHeld<Acc>];
#pragma unroll
    for (int u = 0; u < kPartsHeld<Acc>; ++u) {
      const int j = u * kWarp + lane;
      there[u] = j >= count;
      part[u] = {};
      if (!there[u]) part[u].count = static_cast<Acc>(min(cut.share, vectors - j * cut.share)) * kWidth;
    }
    while (true) {
      bool missing = false;
#pragma unroll
      for (int u = 0; u < kPartsHeld<Acc>; ++u) {
        if (!there[u]) there[u] = look(first + u * kWarp + lane, part[u]);
        missing |= !there[u];
      }
      if (!__any_sync(0xffffffffu, missing)) return true;
      // All mergers of the device ask for these few lines; asked for without a pause, they would hold up what else goes
      // through their slices of the L2 cache.
      __nanosleep(kPause);
      const uint64_t now = __shfl_sync(0xffffffffu, nanoseconds(), 0);
      if (since == 0) since = now;
      if (now - since > kPatience) return false;
    }
  }

  // Merger `m` takes tiles m, m + kMergers, ... of the block.
  __device__ __forceinline__ void merge(int m) const {
    int64_t known = -1;
    Acc mean = 0, rstd = 0;
    AwaitedParam<Acc> weight, bias;
    int others = m;  // tiles until the next of its own
    for (Turn turn;; turn.next(cut.stages)) {
      const int s = turn.stage;
      const int tile = arrived(turn);
      if (tile < 0) return;
      if (threadIdx.x % kWarp == 0) mbarrier_arrive(&ring.empty[s]);  // has seen the tile's number
      if (others-- != 0) continue;
      others = kMergers - 1;
      const Span at = span(tile);
      if (at.plane != known) {
        // On their way while the parts are waited for.
        const int64_t param = param_of(p, static_cast<unsigned>(at.plane));
        weight = {p.weight, p.param_dtype, param};
        bias = {p.bias, p.param_dtype, param};
        // Before this tile's part is there, no look at the others is of use.
        mbarrier_wait(&ring.summed[s], turn.parity);
        Moments<Acc> whole{static_cast<Acc>(p.pixels), ring.part[s].mean, ring.part[s].m2};
        if (cut.parts > 1) {
          while (!plane_moments(at.plane, whole)) {
            const int vectors = static_cast<int>(p.pixels / kWidth);
            help<T>(parts + at.plane * cut.parts, cut.parts,
                    reinterpret_cast<const uint4*>(p.input) + at.plane * vectors, vectors, cut.share);
          }
        }
        known = at.plane;
        mean = whole.mean;
        rstd = whole.rstd(p.eps);
      }
      if (threadIdx.x % kWarp == 0) {
        ring.affine[s] = {mean, rstd * weight.value(1), bias.value(0)};
        mbarrier_arrive(&ring.ready[s]);
        if (at.part == 0) store_statistics(p, at.plane, mean, rstd);
      }
      __syncwarp();
    }
  }

  // Apply thread `t`.
  template <Finish kFinish>
  __device__ __forceinline__ void apply(int t) const {
    constexpr int kStride = kApplyWarps * kWarp;
    // Vectors that a thread takes from shared memory at a time. The short code is unrolled and has the residual on its
    // way while the statistics are waited for; the long code is a loop.
    constexpr bool kLong = kFinish == Finish::kSmooth;
    constexpr int kTaken = kLong ? 2 : 4;
    constexpr int kAhead = kLong ? kTaken : kHeld;
    const auto load_residual = [&](uint4(&r)[kAhead], const Span& at, int from) {
      const uint4* residual = reinterpret_cast<const uint4*>(p.residual) + at.first;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = t + (from + u) * kStride;
        if (i < at.count) r[u] = __ldg(residual + i);
      }
    };
    for (Turn turn;; turn.next(cut.stages)) {
      const int s = turn.stage;
      const int tile = arrived(turn);
      if (tile < 0) return;
      const Span at = span(tile);
      uint4 r[kAhead] = {};  // as raw words: elements of two bytes, zeroed, take a register each
      if (!kLong && has_residual<kFinish>(p)) load_residual(r, at, 0);
      mbarrier_wait(&ring.ready[s], turn.parity);
      const PlaneAffine<Acc> affine = ring.affine[s];
      const V* held = stage(s);
#pragma unroll(kLong ? 1 : kHeld)
      for (int from = 0; from < kHeld; from += kTaken) {
        V x[kTaken];
#pragma unroll
        for (int u = 0; u < kTaken; ++u) {
          const int i = t + (from + u) * kStride;
          if (i < at.count) x[u] = held[i];
        }
        if (from + kTaken == kHeld) {
          __syncwarp();
          if (t % kWarp == 0) mbarrier_arrive(&ring.empty[s]);
        }
        if (kLong && has_residual<kFinish>(p)) load_residual(r, at, from);
#pragma unroll
        for (int u = 0; u < kTaken; ++u) {
          const int i = t + (from + u) * kStride;
          if (i >= at.count) continue;
          const V y = normalize<kFinish>(p, affine, x[u], *reinterpret_cast<const V*>(&r[(kLong ? 0 : from) + u]));
          if (cut.stream_stores) {
            __stcs(reinterpret_cast<uint4*>(p.output) + at.first + i, *reinterpret_cast<const uint4*>(&y));
          } else {
            store(p.output, at.first + i, y);
          }
        }
      }
    }
  }
};

#endif  // STYLEFORGE_HAS_BULK_COPY

template <typename T>
__global__ void STYLEFORGE_STREAM_BOUNDS stream_kernel(const __grid_constant__ InstanceNormParams p,
                                                       const __grid_constant__ StreamCut cut, unsigned* tickets,
                                                       Part<acc_t<T>>* parts) {
#ifdef STYLEFORGE_HAS_BULK_COPY
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ Ring<acc_t<T>> ring;
  if (threadIdx.x == 0) {
    for (int s = 0; s < cut.stages; ++s) {
      mbarrier_init(&ring.full[s], 1);
      mbarrier_init(&ring.counted[s], kStatsWarps);
      mbarrier_init(&ring.summed[s], 1);
      mbarrier_init(&ring.ready[s], 1);
      mbarrier_init(&ring.empty[s], kMergers + kStatsWarps + kApplyWarps);
    }
    mbarrier_init_fence();
    release_successor();
  }
  __syncthreads();
  const Stream<T> stream{p, cut, ring, stages, tickets, parts};
  if (threadIdx.x == 0) stream.prefetch();
  wait_for_predecessor();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warp >= kFirstApply) {
    switch_finish(p, [&]<Finish kFinish>() {
      stream.template apply<kFinish>(static_cast<int>(threadIdx.x) - kFirstApply * kWarp);
    });
  } else if (warp >= kFirstStats) {
    stream.take_moments(warp - kFirstStats);
  } else if (warp > 0) {
    stream.merge(warp - 1);
  } else if (threadIdx.x == 0) {
    stream.produce();
  }
#endif
}

// No memset: this one starts while its predecessor runs, and lets the stream kernel's blocks come as that one drains.
__global__ void __launch_bounds__(kZeroThreads) zero_kernel(uint4* at, int count) {
  release_successor();
  wait_for_predecessor();
  for (int i = blockIdx.x * kZeroThreads + threadIdx.x; i < count; i += gridDim.x * kZeroThreads) at[i] = uint4{};
}

}  // namespace

cudaError_t launch_stream(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                          cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool alone = schedule.workspace_bytes == 0;
  if (!alone) {
    const auto quads = static_cast<int>(schedule.workspace_bytes / sizeof(uint4));
    const auto zero_blocks = static_cast<unsigned>(std::clamp(quads / (4 * kZeroThreads), 1, 32));
    if (const auto error = launch(zero_kernel, dim3(zero_blocks), dim3(kZeroThreads), 0, 1, facts, stream,
                                  static_cast<uint4*>(workspace), quads))
      return error;
  }
  const StreamCut cut{static_cast<int>(params.batch * params.channels * schedule.parts),
                      static_cast<int>(schedule.parts),
                      static_cast<int>(schedule.share),
                      schedule.stages,
                      schedule.first,
                      schedule.fill,
                      schedule.prefetched,
                      static_cast<int>(schedule.shared_bytes) / schedule.stages,
                      schedule.read_once,
                      schedule.stream_stores,
                      alone};
  return switch_dtype(params.dtype, [&]<typename T>() {
    auto* tickets = static_cast<unsigned*>(workspace);
    auto* parts = reinterpret_cast<Part<acc_t<T>>*>(static_cast<unsigned char*>(workspace) + kStreamHead);
    return launch(stream_kernel<T>, dim3(schedule.blocks), dim3(kThreads), schedule.shared_bytes, 1, facts, stream,
                  params, cut, tickets, parts);
  });
}

}  // namespace styleforge::cuda
