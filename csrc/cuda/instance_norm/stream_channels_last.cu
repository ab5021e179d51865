// channels_last, one launch for tensors of any size (sm_90+): tiles of pixels flow through a ring of stages in the
// shared memory of one resident block for each multiprocessor, as in stream.cu; what differs is that a tile concerns
// many channels, and so every block concerns every other one.
//
//   unit:   one sample, a slice of its channels: what statistics are taken of before any of it can be normalised
//   tile:   `share` pixels of a unit; the tiles of all units, numbered, belong to the blocks by turns
//
//            bulk load or box       full          a unit's tiles are in -> parts[]     all blocks' parts ->
//            statistics[]
//   producer ----------------> stage ------> stats ------------------> mergers ------------------> mergers --> apply
//
//   warp 0        producer  loads the block's tiles in order into the next free stage
//   warps 1-3     mergers   take units in turn, since a unit's way takes microseconds while the memory is busy: a
//   channel's
//                           parts, of all blocks, are merged by one block, which publishes mean and rstd; then collect
//                           those of the unit's channels for this block. Where channels are few every block merges all
//                           of them for itself: one journey through the L2 cache less
//   warps 4-11    stats     moments of the block's own tiles of a unit, a thread with the channels of one vector,
//                           running on from tile to tile: merged over the threads once a unit, not once a tile
//   warps 12-19   apply     normalise, residual, activate, store
//
// A unit that the rings of all blocks hold is read once: its tiles stay until its statistics are known, while the next
// unit's tiles come in behind them. Of a larger one the block's last tiles stay, and the others are read a second time,
// in the opposite order, so that the L2 cache still has most of them.
//
// Blocks wait for each other, so the launch is cooperative: all of them run at the same time, or the grid is made
// smaller until they do (a slice of a GPU). Tiles belong to blocks by number, so results are the same from run to run.
// What is published says by itself that it is there (parts.cuh); its memory is zeroed at the start, while the first
// tiles are on their way, which costs no launch and hides the barrier behind it.
//
// What limits it (H200): a unit's statistics make four journeys through the L2 cache (parts there, parts read,
// statistics there, statistics read), and each stands in line behind the block's own loads and stores; about ten
// microseconds pass from a unit's last tile to its first store, and the rings hold three units or so. Hence few tiles
// on their way at a time (`ahead`: with all of the ring 52.1 us on 4x64x256x256 in float, with three tiles 48.4; in
// half 32.7 and 28.2), and all statistics of a unit asked for together (16x128x128x128 in half 64.7, then 57.3). Slices
// that a cluster or a team of blocks holds do with fewer: cluster_channels.cu, team_channels.cu. Tried for the others,
// and worse (4x64x256x256 in half, 28.1): all parts read by every block, whose threads that apply merge them, 41.5 (the
// same 67 KB for all blocks are five microseconds); one warp that merges and two that collect, 31.9; blocks in teams
// that take samples in turn, 29.8 (16x128x128x128 in half 59.0, then 53.1, but in float 95.1, then 101).
//
// 1x64x1024x1024 in half (one unit of 134 MB) reads 213 MB from memory: 55 of the 134 MB are still in the rings or the
// L2 cache when they are read again. What the cache is asked to keep, and how many tiles are on their way, changes
// nothing (106 to 110 us); slices of 64 bytes read 195 MB, but take 132 us against 102.
//
// Few channels: rows of a tensor with C = 3 are no whole vectors. Then 2, 4 or 8 pixels in a row count as one pixel of
// as many times more channels ("copies" of the real ones), and the copies are merged with the rows.
#include <cooperative_groups.h>

#include <algorithm>

#include "../common/awaited_param.cuh"
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/tensor_map.h"
#include "channel_merge.cuh"
#include "channel_sums.cuh"
#include "channel_walk.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "parts.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kMergers = 3;
constexpr int kGroupWarps = 8;  // stats, and apply
constexpr int kGroup = kGroupWarps * kWarp;
constexpr int kFirstStats = 1 + kMergers;
constexpr int kFirstApply = kFirstStats + kGroupWarps;
constexpr int kThreads = (kFirstApply + kGroupWarps) * kWarp;
static_assert(kGroup == kChannelStreamThreads && kGroup >= kChannelStreamChannels);

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr int kPartsHeld = 5;     // parts that a lane of a merger waits for at a time: 160 blocks
constexpr int kTakenBarrier = 2;  // and the next kMergers - 1; kStatsBarrier is 1
constexpr unsigned kPause = 40;   // nanoseconds between two looks at parts that are not there

template <int kWidth>
struct ChannelRing {
  uint64_t full[kStreamStages], empty[kStreamStages];
  // Of a merger's unit: its affine map is there. Every lane arrives for itself: an arrival of one lane for its warp,
  // behind __syncwarp, is as right, but racecheck does not follow it. That all have taken the map is said by a named
  // barrier, where 256 threads would arrive one after the other.
  uint64_t ready[kMergers];
  ThreadMoments<kWidth> threads;
  float affine[kMergers][3][kChannelStreamChannels];  // mean, scale, shift
};

template <typename T>
struct ChannelStream {
  static constexpr int kWidth = kFullWidth<T>;
  static constexpr int kTaken = kChannelStreamRows;  // vectors of a tile that a thread has, at most
  using V = Vec<T, kWidth>;

  const InstanceNormParams& p;
  const ChannelCut& cut;
  ChannelRing<kWidth>& ring;
  unsigned char* stages;
  const CUtensorMap* map;
  Part<float>* parts;       // [units, channels, slots]
  Part<float>* statistics;  // [units, channels]: mean and rstd

  __device__ __forceinline__ V* stage(int s) const { return reinterpret_cast<V*>(stages + s * cut.stage_bytes); }
  // of a slice, real ones
  __device__ __forceinline__ int channels(const Walk& at) const {
    return min(cut.channels, static_cast<int>(p.channels) - at.slice * cut.channels);
  }

  // One thread: loads what may be on its way at first, or what comes after that.
  __device__ __forceinline__ void produce(bool first) const {
    const int initial = min(cut.ahead, cut.stages);
    int past = 0;  // the stage of the tile that has to be there first
    uint32_t past_parity = 0;
    const uint64_t once = cache_policy(cut.read_once, false);
    const uint64_t twice = cache_policy(false, cut.keep);
    Walk at(cut);
    while (!first || at.used < initial) {
      if (at.unit < 0 || !at.next_tile()) {
        if (!at.next_unit()) return;
        continue;
      }
      if (!first && at.used <= initial) continue;
      const int s = at.stage;
      if (!first && cut.ahead < cut.stages) {
        mbarrier_wait(&ring.full[past], past_parity);
        if (++past == cut.stages) {
          past = 0;
          past_parity ^= 1;
        }
      }
      if (at.used > cut.stages) mbarrier_wait(&ring.empty[s], at.parity ^ 1);
      const uint64_t policy = at.finishes ? once : twice;
      if (cut.slices == 1) {
        const uint32_t bytes = static_cast<uint32_t>(at.row_count() * cut.vectors) * sizeof(V);
        const int64_t from = (static_cast<int64_t>(at.sample) * cut.rows + at.first_row()) * cut.vectors;
        mbarrier_arrive_expect(&ring.full[s], bytes);
        load_span(stage(s), reinterpret_cast<const V*>(p.input) + from, bytes, &ring.full[s], policy);
      } else {  // what lies beyond the slice or the sample comes as zeros, and counts
        mbarrier_arrive_expect(&ring.full[s], static_cast<uint32_t>(cut.share * cut.lanes) * sizeof(V));
        load_slice(stage(s), map, at.slice * cut.lanes * kWidth, at.first_row(), at.sample, &ring.full[s], policy);
      }
    }
  }

  // Stats thread `t`.
  __device__ __forceinline__ void take_moments(int t) const {
    const int rows = kGroup / cut.lanes;
    const int row = t / cut.lanes;
    const int lane = t - row * cut.lanes;
    Walk at(cut);
    while (at.next_unit()) {
      const bool active = row < rows && lane < at.lanes();
      ChannelMoments<kWidth, float> own;
      while (at.next_tile()) {
        const int s = at.stage;
        mbarrier_wait(&ring.full[s], at.parity);
        const int count = at.row_count();
        if (at.counts && active && row < count) {
          const auto* held = reinterpret_cast<const uint4*>(stage(s)) + t;
          uint4 raw[kTaken];  // as words: elements of two bytes would take a register each
          int present = 0;
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            raw[u] = uint4{};
            if (row + u * rows >= count) continue;
            raw[u] = held[u * rows * cut.lanes];
            ++present;
          }
          const auto& v = reinterpret_cast<const V(&)[kTaken]>(raw);
          if (present == kTaken) {
            own.add(v);
          } else {
            own.add(v, present);
          }
        }
        __syncwarp();
        if (t % kWarp == 0) mbarrier_arrive(&ring.empty[s]);
        if (!at.closes) continue;

        merge_threads(cut, at, t, channels(at), own, ring.threads, parts);
      }
    }
  }

  // One warp: words that other blocks publish, all of them asked for together; at(u) is where word u lies, or null.
  template <int kWords, typename At>
  __device__ __forceinline__ void wait_for(uint64_t (&words)[kWords], At&& at) const {
    while (true) {
      bool missing = false;
#pragma unroll
      for (int u = 0; u < kWords; ++u) {
        const Part<float>* place = at(u);
        words[u] = place == nullptr ? uint64_t{1} << 63 : fetch(place);
      }
#pragma unroll
      for (int u = 0; u < kWords; ++u) missing |= !is_there(words[u]);
      if (!__any_sync(0xffffffffu, missing)) return;
      __nanosleep(kPause);
    }
  }

  // One warp: the moments of one channel of a unit, from all blocks.
  __device__ __forceinline__ Moments<float> channel_moments(int unit, int channel) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const Part<float>* first = parts + (static_cast<int64_t>(unit) * cut.channels + channel) * cut.slots;
    Moments<float> whole;
    for (int from = 0; from < cut.slots; from += kPartsHeld * kWarp) {
      Moments<float> part[kPartsHeld];
      float count = 0;
#pragma unroll
      for (int u = 0; u < kPartsHeld; ++u) {
        const int slot = from + u * kWarp + lane;
        if (slot < cut.slots) part[u].count = pixels_of(cut, slot);
        count += part[u].count;
      }
      uint64_t words[kPartsHeld];
      wait_for(words, [&](int u) {
        const int slot = from + u * kWarp + lane;
        return slot < cut.slots ? first + slot : nullptr;
      });
#pragma unroll
      for (int u = 0; u < kPartsHeld; ++u) unpack(words[u], part[u]);
      whole.add(merge_moments(
          warp_sum(count),
          [&](auto visit) {
#pragma unroll
            for (int u = 0; u < kPartsHeld; ++u) visit(part[u]);
          },
          [](float v) { return warp_sum(v); }));
    }
    return whole;
  }

  // Stores the map of one channel where the apply warps look for it, once for every copy. One lane.
  __device__ __forceinline__ void put_affine(int at, int channel, float mean, float rstd, float weight,
                                             float bias) const {
    for (int copy = 0; copy < 1 << cut.copies_log2; ++copy) {
      const int column = channel + copy * cut.channels;
      ring.affine[at][0][column] = mean;
      ring.affine[at][1][column] = rstd * weight;
      ring.affine[at][2][column] = bias;
    }
  }

  // One warp: the maps of all channels of a unit, asked for together; lane l has channels l, l + 32, ...
  __device__ __forceinline__ void collect(int at, int present, int64_t param, const Part<float>* of_unit) const {
    constexpr int kEach = kChannelStreamChannels / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    AwaitedParam<float> weight[kEach], bias[kEach];
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int c = min(lane + u * kWarp, present - 1);
      weight[u] = {p.weight, p.param_dtype, param + c};
      bias[u] = {p.bias, p.param_dtype, param + c};
    }
    uint64_t words[kEach];
    wait_for(words, [&](int u) {
      const int c = lane + u * kWarp;
      return c < present ? of_unit + c : nullptr;
    });
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      Moments<float> known;
      unpack(words[u], known);
      if (lane + u * kWarp < present)
        put_affine(at, lane + u * kWarp, known.mean, known.m2, weight[u].value(1.0f), bias[u].value(0.0f));
    }
  }

  // Merger warp `m` takes units m, m + kMergers, ... and hands them over in a place of its own.
  __device__ __forceinline__ void merge(int m) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int blocks = static_cast<int>(gridDim.x);
    Walk at(cut);
    bool given = false;                        // a map
    int owner = static_cast<int>(blockIdx.x);  // the first channel of the unit that this block merges
    for (; at.next_unit(); owner = (owner + blocks - cut.channels % blocks) % blocks) {
      if (at.unit % kMergers != m) continue;
      const int present = channels(at);
      const int64_t first_channel = static_cast<int64_t>(at.slice) * cut.channels;
      const int64_t plane = at.sample * p.channels + first_channel;
      const int64_t param = at.sample * p.param_batch_stride + first_channel;
      Part<float>* of_unit = statistics + static_cast<int64_t>(at.unit) * cut.channels;
      if (!cut.direct) {
        for (int c = owner; c < present; c += blocks) {
          const auto whole = channel_moments(at.unit, c);
          if (lane == 0) {
            const float rstd = whole.rstd(p.eps);
            publish(of_unit + c, whole.mean, rstd);
            store_statistics(p, plane + c, whole.mean, rstd);
          }
          __syncwarp();
        }
      }
      if (at.owned == 0) continue;
      __syncwarp();
      if (given) named_barrier(kTakenBarrier + m, kGroup + kWarp);
      given = true;
      if (cut.direct) {
        for (int c = 0; c < present; ++c) {
          const float weight = load_param(p.weight, p.param_dtype, param + c, 1.0f);
          const float bias = load_param(p.bias, p.param_dtype, param + c, 0.0f);
          const auto whole = channel_moments(at.unit, c);
          if (lane == 0) {
            const float rstd = whole.rstd(p.eps);
            put_affine(m, c, whole.mean, rstd, weight, bias);
            if (at.slot == 0) store_statistics(p, plane + c, whole.mean, rstd);
          }
          __syncwarp();
        }
      } else {
        collect(m, present, param, of_unit);
      }
      mbarrier_arrive(&ring.ready[m]);
    }
    __syncwarp();
    if (given) named_barrier(kTakenBarrier + m, kGroup + kWarp);  // each arrival has its wait
  }

  // Apply thread `t`.
  template <Finish kFinish>
  __device__ __forceinline__ void apply(int t) const {
    const int rows = kGroup / cut.lanes;
    const int row = t / cut.lanes;
    const int lane = t - row * cut.lanes;
    const int step = rows * cut.vectors;
    Walk at(cut);
    uint32_t turns = 0;  // of each merger, the parity of the units so far
    while (at.next_unit()) {
      const int from = at.unit % kMergers;
      const bool active = row < rows && lane < at.lanes();
      ChannelAffine<float, kWidth> affine;
      bool known = false;
      while (at.next_tile()) {
        const int s = at.stage;
        if (!at.finishes) {
          mbarrier_wait(&ring.full[s], at.parity);
          if (t % kWarp == 0) mbarrier_arrive(&ring.empty[s]);
          continue;
        }
        const int count = active ? at.row_count() : 0;
        const int64_t first = (static_cast<int64_t>(at.sample) * cut.rows + at.first_row() + row) * cut.vectors +
                              at.slice * cut.lanes + lane;
        constexpr bool kLong = kFinish == Finish::kSmooth;
        uint4 r[kLong ? 1 : kTaken] = {};  // on its way while the statistics are waited for
        if constexpr (kFinish == Finish::kResidual) {
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows < count) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step);
          }
        }
        if (!known) {
          mbarrier_wait(&ring.ready[from], turns >> from & 1);
          if (active) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              affine.mean[k] = ring.affine[from][0][lane * kWidth + k];
              affine.scale[k] = ring.affine[from][1][lane * kWidth + k];
              affine.shift[k] = ring.affine[from][2][lane * kWidth + k];
            }
          }
          __syncwarp();
          named_arrive(kTakenBarrier + from, kGroup + kWarp);
          known = true;
          turns ^= 1u << from;
        }
        mbarrier_wait(&ring.full[s], at.parity);
        const auto* held = reinterpret_cast<const uint4*>(stage(s)) + t;
        const auto put = [&](int u, const uint4& x, const uint4& residual) {
          const V y =
              normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&x), *reinterpret_cast<const V*>(&residual));
          uint4* to = reinterpret_cast<uint4*>(p.output) + first + u * step;
          if (cut.stream_stores) {
            __stcs(to, *reinterpret_cast<const uint4*>(&y));
          } else {
            *to = *reinterpret_cast<const uint4*>(&y);
          }
        };
        if constexpr (kFinish != Finish::kPlain) {
#pragma unroll(kLong ? 1 : kTaken)
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows >= count) break;
            if (kLong && p.residual != nullptr) {
              r[0] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step);
            }
            put(u, held[u * rows * cut.lanes], r[kLong ? 0 : u]);
          }
          __syncwarp();
          if (t % kWarp == 0) mbarrier_arrive(&ring.empty[s]);
        } else {
          uint4 x[kTaken] = {};
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows < count) x[u] = held[u * rows * cut.lanes];
          }
          __syncwarp();
          if (t % kWarp == 0) mbarrier_arrive(&ring.empty[s]);
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows < count) put(u, x[u], r[u]);
          }
        }
      }
    }
  }
};

#endif  // STYLEFORGE_HAS_BULK_COPY

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    channel_stream_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ ChannelCut cut,
                          const __grid_constant__ CUtensorMap map, uint4* workspace, int quads) {
#ifdef STYLEFORGE_HAS_BULK_COPY
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ ChannelRing<kFullWidth<T>> ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  auto* parts = reinterpret_cast<Part<float>*>(workspace);
  auto* statistics = parts + static_cast<int64_t>(cut.units) * cut.channels * cut.slots;
  const ChannelStream<T> stream{p, cut, ring, stages, &map, parts, statistics};
  if (thread == 0) {
    prefetch_map(&map);
    for (int s = 0; s < cut.stages; ++s) {
      mbarrier_init(&ring.full[s], 1);
      mbarrier_init(&ring.empty[s], 2 * kGroupWarps);
    }
    for (int m = 0; m < kMergers; ++m) {
      mbarrier_init(&ring.ready[m], kWarp);
    }
    mbarrier_init_fence();
    wait_for_predecessor();
    stream.produce(true);
  }
  wait_for_predecessor();
  for (int i = blockIdx.x * kThreads + thread; i < quads; i += gridDim.x * kThreads) workspace[i] = uint4{};
  if (gridDim.x > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  if (warp >= kFirstApply) {
    switch_finish(p, [&]<Finish kFinish>() { stream.template apply<kFinish>(thread - kFirstApply * kWarp); });
  } else if (warp >= kFirstStats) {
    stream.take_moments(thread - kFirstStats * kWarp);
  } else if (warp > 0) {
    stream.merge(warp - 1);
  } else if (thread == 0) {
    stream.produce(false);
    release_successor();
  }
#endif
}

}  // namespace

cudaError_t launch_channel_stream(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                  void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto element = static_cast<int>(size_of(params.dtype));
  const int width = 16 / element;
  ChannelCut cut = {};
  while (params.channels << cut.copies_log2 & (width - 1)) ++cut.copies_log2;
  cut.vectors = static_cast<int>(params.channels << cut.copies_log2) / width;
  cut.lanes = schedule.lanes;
  cut.slices = static_cast<int>(ceil_div(cut.vectors, cut.lanes));
  cut.units = static_cast<int>(params.batch) * cut.slices;
  cut.channels = static_cast<int>(std::min<int64_t>(params.channels, cut.lanes * width));
  cut.rows = static_cast<int>(params.pixels >> cut.copies_log2);
  cut.share = static_cast<int>(schedule.share);
  cut.tiles = static_cast<int>(schedule.parts);
  cut.stages = schedule.stages;
  cut.held = schedule.held;
  cut.ahead = schedule.ahead;
  cut.stage_bytes = static_cast<int>(ceil_div(schedule.share * schedule.lanes * 16, 128)) * 128;
  cut.direct = schedule.direct;
  cut.read_once = schedule.read_once;
  cut.keep = schedule.keep;
  cut.stream_stores = schedule.stream_stores;
  CUtensorMap map = {};
  if (cut.slices > 1) {
    const auto pitch = static_cast<cuuint64_t>(params.channels * element);
    const auto pixels = static_cast<cuuint64_t>(params.pixels);
    const auto error = tensor_map<3>(
        params.dtype, params.input,
        {static_cast<cuuint64_t>(params.channels), pixels, static_cast<cuuint64_t>(params.batch)},
        {pitch, pitch * pixels}, {static_cast<cuuint32_t>(cut.lanes * width), static_cast<cuuint32_t>(cut.share), 1},
        map, CU_TENSOR_MAP_SWIZZLE_NONE,
        cut.lanes < 8 ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
    if (error != cudaSuccess) return error;
  }
  const auto with = [&](auto* kernel) {
    // All blocks must run at the same time. Where this process has only some of the multiprocessors (MPS, a green
    // context), fewer do; one always does.
    for (int blocks = schedule.blocks;; blocks = (blocks + 1) / 2) {
      cut.slots = std::min(cut.tiles, blocks);
      const auto error =
          launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), schedule.shared_bytes,
                 Together{1, blocks > 1}, facts, stream, params, cut, map, static_cast<uint4*>(workspace),
                 static_cast<int>(schedule.workspace_bytes / sizeof(uint4)));
      if (blocks == 1 || (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported)) return error;
      cudaGetLastError();
    }
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with(channel_stream_kernel<float>);
    case DType::kFloat16:
      return with(channel_stream_kernel<__half>);
    case DType::kBFloat16:
      return with(channel_stream_kernel<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
