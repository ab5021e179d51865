// channels_last by teams of blocks (sm_90+): cluster_channels.cu without the clusters. A unit (one sample, a slice of
// its channels) belongs to a team, whose blocks hold all of it in their rings; teams take units in turn. Blocks of a
// team say what they found through the L2 cache, so that a team may have any number of blocks and all multiprocessors
// take part, where clusters of 16 find room on 112 of 132.
//
//   warp 0        producer    loads the block's tiles into the next free stage: the next unit's follow
//   warps 1-3     collectors  all blocks' parts of a unit -> map of each channel
//   warps 4-7     stats       moments of the unit's tiles, merged over the block, published
//   warps 8-15    apply       normalise, residual, activate, store
//
// A part says by itself that it is there (grid.cuh). Blocks mark their own parts as absent at the start; only who reads
// those of others waits for the grid, while the first tiles are on their way. Launched cooperatively: all blocks run.
//
// Measured (H200, cold, in turns with the way taken before, us, half and float): 16x128x128x128 47.6 -> 41.2, 86.2 ->
// 73.9 (clusters); 8x128x128x128 26.9 -> 22.9, 47.2 -> 38.1; 17x128x129x129 54.7 -> 45.4, 102 -> 79.9; 4x64x256x256
// 26.9 -> 24.2, 48.7 -> 46.1 (stream_channels_last.cu); 16x256x64x64 34.1 -> 23.9, 75 -> 41.7; 64x128x64x64 98 -> 43.5,
// 213 -> 79.0 (held_channels.cu). With a residual 16x128x128x128 85.6 -> 62.2, 134 -> 111; with silu 146 -> 110, 176 ->
// 134.
//
// What limits it, by kernels that leave out what they wait for (16x128x128x128, us in half and float): nothing is
// waited for, 40.7 and 75.7; a block waits for its own part of a unit, 41.1 and 76; all, 42.3 and 74.2. So it is no
// longer the exchange but the way of the tiles: slices of 128 bytes of a longer pixel (NCHW, whole planes: 35.3 and
// 66.7). On 4x64x256x256 in half, where a unit of whole pixels would take 20 without waiting, units of which a block
// has 127 KB cost 26, and with the exchange of 66 blocks 28.6; slices of 64 bytes in four teams 21.9, 24.0 and 24.5.
//
// In half it is the threads' latency as well: full tiles go without a question for each vector and with the activation
// known, four vectors at a time, and nothing is spilled. With eight warps of stats (96 registers and 32 bytes on the
// stack) 46.9, with 16 that apply 44.3, with both 47.6. Results stored by the copy engine: 44.5; where no more than
// one, two or four such stores are on their way, no better. Without the cooperative launch, marks by a kernel of its
// own: equal. Three teams 54, which take slices of the same pixels at different times.
#include <algorithm>

#include "../common/awaited_param.cuh"
#include "../common/cluster.cuh"
#include "../common/grid.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/tensor_map.h"
#include "channel_sums.cuh"
#include "channel_walk.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "turn.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kStatsWarps = 4;
constexpr int kApplyWarps = 8;
constexpr int kStatsThreads = kStatsWarps * kWarp;
constexpr int kCollectors = 3;  // warps
constexpr int kFirstStats = (1 + kCollectors) * kWarp;
constexpr int kFirstApply = kFirstStats + kStatsThreads;
constexpr int kThreads = kFirstApply + kApplyWarps * kWarp;
struct TeamCut {
  int lanes;     // vectors of 16 bytes of a slice
  int slices;    // of a sample
  int units;     // samples x slices
  int channels;  // of a slice
  int rows;      // pixels of a sample
  int share;     // of a tile
  int tiles;     // of a block
  int teams;
  int stages;
  int ahead;  // tiles on their way at a time
  int stage_bytes;
  bool read_once;      // what is loaded is the first that the L2 cache lets go
  bool stream_stores;  // what is stored, too
};

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr int kTile = 1024;  // vectors
constexpr int kStatsBarrier = 1, kCollectBarrier = 2;
constexpr int kCollectThreads = kCollectors * kWarp;
constexpr int kPartsHeld = 6;  // pairs of channels that a thread of the collectors waits for at a time
constexpr int kStages = 32;
constexpr int kMaxChannels = kClusterChannels;

struct TeamRing {
  uint64_t full[kStages], empty[kStages];
  float2 warps[2][kStatsWarps][kMaxChannels];
  float counts[2][kStatsWarps];
  // Of a unit: the block's part is published; the maps of its channels are there; they have been taken.
  uint64_t closed[2], ready[2], taken[2];
  float numbers[2][kCollectors];
  float2 collected[2][kCollectors][kMaxChannels];  // mean and M2
  float affine[2][3][kMaxChannels];                // mean, scale, shift
};

template <typename T>
struct TeamStream {
  static constexpr int kWidth = kFullWidth<T>;
  // Vectors of a tile that a thread has, and those of a stats thread that are on their way at a time.
  static constexpr int kTaken = kTile / (kApplyWarps * kWarp), kCounted = kTile / kStatsThreads, kAtOnce = 4;
  using V = Vec<T, kWidth>;

  const InstanceNormParams& p;
  const TeamCut& cut;
  TeamRing& ring;
  unsigned char* stages;
  const CUtensorMap* map;
  float2* pairs;          // [units, blocks, channels]: mean and M2
  int blocks, rank;       // of the team
  int team;               // whose units are team, team + teams, ...
  int begin, count, own;  // the block's pixels of a unit, and tiles of them

  __device__ __forceinline__ V* stage(int s) const { return reinterpret_cast<V*>(stages + s * cut.stage_bytes); }
  // Pixels that block `r` has of a unit.
  __device__ __forceinline__ int pixels_of(int r) const {
    const int each = cut.tiles * cut.share;
    return min(max(cut.rows - r * each, 0), each);
  }
  __device__ __forceinline__ int rows_of(int tile) const { return min(cut.share, count - tile * cut.share); }

  // One thread: loads what may be on its way at first, or what comes after that.
  __device__ __forceinline__ void produce(bool first) const {
    const uint64_t policy = cache_policy(cut.read_once, false);
    const int initial = min(cut.ahead, cut.stages);
    Turn at, past;  // `past`: the tile that has to be there first
    int used = 0;
    for (int unit = team; unit < cut.units; unit += cut.teams) {
      const int sample = unit / cut.slices;
      const int channel = (unit - sample * cut.slices) * cut.channels;
      for (int tile = 0; tile < own; ++tile, ++used, at.next(cut.stages)) {
        if (used < initial ? !first : first) {
          if (first) return;
          continue;
        }
        if (!first && cut.ahead < cut.stages) {
          mbarrier_wait(&ring.full[past.stage], past.parity);
          past.next(cut.stages);
        }
        if (used >= cut.stages) mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect(&ring.full[at.stage], static_cast<uint32_t>(cut.share * cut.lanes) * 16);
        load_slice(stage(at.stage), map, channel, begin + tile * cut.share, sample, &ring.full[at.stage], policy);
      }
    }
  }

  // Of a thread's pixels, about the first of them: no merge from tile to tile. What cancels is no more than the square
  // of what that pixel differs by, which is part of M2: an error of as many roundings as the thread has pixels, at
  // most.
  struct ChannelSums {
    float count = 0;
    float base[kWidth] = {}, sum[kWidth] = {}, squares[kWidth] = {};
  };

  // Stats thread `t`.
  __device__ __forceinline__ void take_moments(int t) const {
    const int rows = kStatsThreads / cut.lanes;
    const int row = t / cut.lanes;
    const int warp = t / kWarp, lane = t % kWarp;
    Turn at;
    int turn = 0;
    for (int unit = team; unit < cut.units; unit += cut.teams, ++turn) {
      ChannelSums sum;
      for (int tile = 0; tile < own; ++tile, at.next(cut.stages)) {
        mbarrier_wait(&ring.full[at.stage], at.parity);
        const auto* held = reinterpret_cast<const uint4*>(stage(at.stage)) + t;
        const int there = rows_of(tile);
        uint4 raw[kAtOnce];  // as words: elements of two bytes would take a register each
        const auto& v = reinterpret_cast<const V(&)[kAtOnce]>(raw);
        const auto add = [&](int u) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const float d = to_acc(v[u].data[k]) - sum.base[k];
            sum.sum[k] += d;
            sum.squares[k] += d * d;
          }
        };
        const auto start = [&] {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum.base[k] = to_acc(v[0].data[k]);
        };
        if (there == rows * kCounted) {
#pragma unroll
          for (int from = 0; from < kCounted; from += kAtOnce) {
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) raw[u] = held[(from + u) * kStatsThreads];
            if (tile == 0 && from == 0) start();
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) add(u);
          }
          sum.count += static_cast<float>(kCounted);
        } else {
#pragma unroll 1
          for (int u = 0; u < kCounted; ++u) {
            if (row + u * rows >= there) break;
            raw[0] = held[u * kStatsThreads];
            if (tile == 0 && u == 0) start();
            add(0);
            sum.count += 1.0f;
          }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&ring.empty[at.stage]);
      }
      ChannelMoments<kWidth, float> own_moments;
      own_moments.count = sum.count;
      const float inverse = sum.count > 0 ? reciprocal(sum.count) : 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float mean = sum.sum[k] * inverse;
        own_moments.mean[k] = sum.base[k] + mean;
        const float m2 = sum.squares[k] - sum.sum[k] * mean;
        own_moments.m2[k] = m2 < 0.0f ? 0.0f : m2;  // NaN stays NaN
      }
      merge(own_moments, unit, turn, t, warp, lane);
    }
  }

  // Rows of a warp by a butterfly, then the warps by one thread for each channel, which sends the block's part.
  __device__ __forceinline__ void merge(ChannelMoments<kWidth, float>& sum, int unit, int turn, int t, int warp,
                                        int lane) const {
    for (int offset = kWarp / 2; offset >= cut.lanes; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, sum.count, offset);
      const float total = sum.count + other;
      const float inverse = total > 0 ? reciprocal(total) : 0.0f;
      const float share = other * inverse, weight = sum.count * share;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float d = __shfl_xor_sync(0xffffffffu, sum.mean[k], offset) - sum.mean[k];
        sum.m2[k] += __shfl_xor_sync(0xffffffffu, sum.m2[k], offset) + d * weight * d;
        sum.mean[k] += d * share;
      }
      sum.count = total;
    }
    const int place = turn & 1;
    if (lane < cut.lanes) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        ring.warps[place][warp][lane * kWidth + k] = make_float2(sum.mean[k], sum.m2[k]);
      }
    }
    if (lane == 0) ring.counts[place][warp] = sum.count;
    named_barrier(kStatsBarrier, kStatsThreads);
    if (t >= cut.channels) return;
    Moments<float> part[kStatsWarps];
#pragma unroll
    for (int w = 0; w < kStatsWarps; ++w) {
      const float2 both = ring.warps[place][w][t];
      part[w] = {ring.counts[place][w], both.x, both.y};
    }
    const auto whole = merge_moments(
        static_cast<float>(count),
        [&](auto visit) {
#pragma unroll
          for (int w = 0; w < kStatsWarps; ++w) visit(part[w]);
        },
        [](float v) { return v; });
    publish(&pairs[(static_cast<int64_t>(unit) * blocks + rank) * cut.channels + t], make_float2(whole.mean, whole.m2));
    if (t == 0) {
      if (turn >= 2) mbarrier_wait(&ring.ready[turn & 1], (turn / 2 - 1) & 1);
      mbarrier_arrive(&ring.closed[turn & 1]);
    }
  }

  // Collector thread `t`: all blocks' parts of two channels by turns, merged over the threads: the maps of all
  // channels.
  __device__ __forceinline__ void collect(int t) const {
    const int lane = t % kWarp, warp = t / kWarp;
    const int columns = cut.channels / 2;
    const int column = t % columns, row = t / columns, rows = kCollectThreads / columns;
    int turn = 0;
    for (int unit = team; unit < cut.units; unit += cut.teams, ++turn) {
      const int place = turn & 1;
      const int sample = unit / cut.slices;
      const int channel = (unit - sample * cut.slices) * cut.channels + t;
      AwaitedParam<float> weight, bias;
      if (t < cut.channels) {
        const int64_t param = sample * p.param_batch_stride + channel;
        weight = {p.weight, p.param_dtype, param};
        bias = {p.bias, p.param_dtype, param};
      }
      const float2* from = pairs + static_cast<int64_t>(unit) * blocks * cut.channels + 2 * column;
      mbarrier_wait(&ring.closed[place], turn / 2 & 1);
      float number = 0, base[2] = {}, sum[2] = {}, squares[2] = {};
      for (int first = row; first < blocks; first += kPartsHeld * rows) {
        AwaitedTwo part[kPartsHeld];
#pragma unroll
        for (int u = 0; u < kPartsHeld; ++u) {
          const int r = first + u * rows;
          if (r >= blocks || pixels_of(r) == 0) part[u].pair[0].bits = part[u].pair[1].bits = 0;
        }
        bool there;
        do {
          there = true;
#pragma unroll
          for (int u = 0; u < kPartsHeld; ++u)
            part[u].look(from + static_cast<int64_t>(first + u * rows) * cut.channels);
#pragma unroll
          for (int u = 0; u < kPartsHeld; ++u) there = there && part[u].there();
        } while (!there);
        if (first == row) {
          base[0] = part[0].pair[0].first();
          base[1] = part[0].pair[1].first();
        }
#pragma unroll
        for (int u = 0; u < kPartsHeld; ++u) {
          const int r = first + u * rows;
          const float count = r < blocks ? static_cast<float>(pixels_of(r)) : 0.0f;
          number += count;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float d = count > 0 ? part[u].pair[k].first() - base[k] : 0.0f;
            sum[k] += count * d;
            squares[k] += part[u].pair[k].second() + count * d * d;
          }
        }
      }
      __syncwarp();
      Moments<float> own[2];
      const float inverse = number > 0 ? reciprocal(number) : 0.0f;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float shift = sum[k] * inverse;
        const float m2 = squares[k] - sum[k] * shift;
        own[k] = {number, base[k] + shift, m2 < 0.0f ? 0.0f : m2};  // NaN stays NaN
      }
      for (int offset = columns; offset < kWarp; offset *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, number, offset);
        const float total = number + other;
        const float share = total > 0 ? __fdividef(other, total) : 0.0f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float d = __shfl_xor_sync(0xffffffffu, own[k].mean, offset) - own[k].mean;
          own[k].m2 += __shfl_xor_sync(0xffffffffu, own[k].m2, offset) + d * (number * share) * d;
          own[k].mean += d * share;
        }
        number = total;
      }
      if (lane < columns) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          ring.collected[place][warp][2 * column + k] = make_float2(own[k].mean, own[k].m2);
        }
      }
      if (lane == 0) ring.numbers[place][warp] = number;
      named_barrier(kCollectBarrier, kCollectThreads);
      if (t >= cut.channels) continue;
      Moments<float> part[kCollectors];
#pragma unroll
      for (int w = 0; w < kCollectors; ++w) {
        const float2 both = ring.collected[place][w][t];
        part[w] = {ring.numbers[place][w], both.x, both.y};
      }
      const auto whole = merge_moments(
          static_cast<float>(cut.rows),
          [&](auto visit) {
#pragma unroll
            for (int w = 0; w < kCollectors; ++w) visit(part[w]);
          },
          [](float v) { return v; });
      const float rstd = whole.rstd(p.eps);
      if (turn >= 2) mbarrier_wait(&ring.taken[place], (turn / 2 - 1) & 1);
      ring.affine[place][0][t] = whole.mean;
      ring.affine[place][1][t] = rstd * weight.value(1.0f);
      ring.affine[place][2][t] = bias.value(0.0f);
      mbarrier_arrive(&ring.ready[place]);
      if (rank == 0) store_statistics(p, static_cast<int64_t>(sample) * p.channels + channel, whole.mean, rstd);
    }
  }

  // Apply thread `t`. A warp has the same rows of every tile, next to each other.
  template <Finish kFinish>
  __device__ __forceinline__ void apply(int t) const {
    const int warp = t / kWarp, in_warp = t % kWarp;
    const int lane = in_warp % cut.lanes;
    const int row = in_warp / cut.lanes, rows = kWarp / cut.lanes;
    const int of_warp = cut.share / kApplyWarps;  // rows
    const int vectors = cut.slices * cut.lanes;
    const int step_u = rows * vectors;
    const uint64_t policy = cache_policy(cut.stream_stores, false);
    Turn at;
    int turn = 0;
    for (int unit = team; unit < cut.units; unit += cut.teams, ++turn) {
      const int place = turn & 1;
      mbarrier_wait(&ring.ready[place], turn / 2 & 1);
      ChannelAffine<float, kWidth> affine;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        affine.mean[k] = ring.affine[place][0][lane * kWidth + k];
        affine.scale[k] = ring.affine[place][1][lane * kWidth + k];
        affine.shift[k] = ring.affine[place][2][lane * kWidth + k];
      }
      mbarrier_arrive(&ring.taken[place]);
      const int sample = unit / cut.slices;
      const int slice = unit - sample * cut.slices;
      int pixel = begin + warp * of_warp;
      for (int tile = 0; tile < own; ++tile, at.next(cut.stages), pixel += cut.share) {
        const int there = min(of_warp, cut.rows - pixel);  // of this warp
        const int64_t first =
            (static_cast<int64_t>(sample) * cut.rows + pixel + row) * vectors + slice * cut.lanes + lane;
        constexpr bool kLong = kFinish == Finish::kSmooth;
        uint4 r[kLong ? 1 : kTaken] = {};
        if constexpr (kFinish == Finish::kResidual) {
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows < there) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step_u);
          }
        }
        mbarrier_wait(&ring.full[at.stage], at.parity);
        const auto* held = reinterpret_cast<uint4*>(stage(at.stage)) + warp * of_warp * cut.lanes + in_warp;
        if constexpr (kFinish == Finish::kPlain) {
          if (there >= of_warp && of_warp == kTaken * rows) {
            const auto whole = [&]<Activation kActivation>() {
              uint4 x[kTaken];
#pragma unroll
              for (int u = 0; u < kTaken; ++u) x[u] = held[u * kWarp];
              __syncwarp();
              if (in_warp == 0) mbarrier_arrive(&ring.empty[at.stage]);
              uint4* to = reinterpret_cast<uint4*>(p.output) + first;
#pragma unroll
              for (int u = 0; u < kTaken; ++u) {
                const V& v = *reinterpret_cast<const V*>(&x[u]);
                float y[kWidth];
#pragma unroll
                for (int k = 0; k < kWidth; ++k) y[k] = affine(to_acc(v.data[k]), k);
                if constexpr (kActivation != Activation::kNone) {
                  activate_piecewise(y, kActivation, static_cast<float>(p.negative_slope));
                }
                const V out = rounded<T>(y);
                store_hinted(to + u * step_u, *reinterpret_cast<const uint4*>(&out), policy);
              }
            };
            if (p.activation == Activation::kRelu) {
              whole.template operator()<Activation::kRelu>();
            } else if (p.activation == Activation::kLeakyRelu) {
              whole.template operator()<Activation::kLeakyRelu>();
            } else {
              whole.template operator()<Activation::kNone>();
            }
            continue;
          }
        }
        uint4* to = reinterpret_cast<uint4*>(p.output) + first;
#pragma unroll(kLong ? 1 : kTaken)
        for (int u = 0; u < kTaken; ++u) {
          if (row + u * rows >= there) break;
          if (kLong && p.residual != nullptr) {
            r[0] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step_u);
          }
          const uint4 x = held[u * kWarp];
          const V y = normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&x),
                                         *reinterpret_cast<const V*>(&r[kLong ? 0 : u]));
          store_hinted(to + u * step_u, *reinterpret_cast<const uint4*>(&y), policy);
        }
        __syncwarp();
        if (in_warp == 0) mbarrier_arrive(&ring.empty[at.stage]);
      }
    }
  }
};

#endif  // STYLEFORGE_HAS_BULK_COPY

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    channel_team_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ TeamCut cut,
                        const __grid_constant__ CUtensorMap map, float2* pairs) {
#ifdef STYLEFORGE_HAS_BULK_COPY
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ TeamRing ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(gridDim.x) / cut.teams;
  const int team = static_cast<int>(blockIdx.x) % cut.teams;
  const int rank = static_cast<int>(blockIdx.x) / cut.teams;
  const int begin = rank * cut.tiles * cut.share;
  const int count = min(max(cut.rows - begin, 0), cut.tiles * cut.share);
  const TeamStream<T> stream{p,      cut,  ring, stages, &map,  pairs,
                             blocks, rank, team, begin,  count, (count + cut.share - 1) / cut.share};
  if (thread == 0) {
    prefetch_map(&map);
    for (int s = 0; s < cut.stages; ++s) {
      mbarrier_init(&ring.full[s], 1);
      mbarrier_init(&ring.empty[s], kStatsWarps + kApplyWarps);
    }
    for (int place = 0; place < 2; ++place) {
      mbarrier_init(&ring.closed[place], 1);
      mbarrier_init(&ring.ready[place], static_cast<uint32_t>(cut.channels));
      mbarrier_init(&ring.taken[place], kApplyWarps * kWarp);
    }
    mbarrier_init_fence();
    wait_for_predecessor();
    stream.produce(true);
  }
  __syncwarp();
  wait_for_predecessor();
  for (int unit = team; unit < cut.units; unit += cut.teams) {
    for (int c = thread; c < cut.channels; c += kThreads) {
      retract(&pairs[(static_cast<int64_t>(unit) * blocks + rank) * cut.channels + c]);
    }
  }
  __syncthreads();
  if (thread >= kFirstApply) {
    switch_finish(p, [&]<Finish kFinish>() { stream.template apply<kFinish>(thread - kFirstApply); });
  } else if (thread >= kFirstStats) {
    stream.take_moments(thread - kFirstStats);
  } else if (thread >= kWarp) {
    if (thread == kWarp) grid_wait(grid_arrive());
    __syncwarp();
    named_barrier(kCollectBarrier, kCollectThreads);
    stream.collect(thread - kWarp);
  } else if (thread == 0) {
    stream.produce(false);
    release_successor();
  }
#endif
}

}  // namespace

cudaError_t launch_channel_team(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                                cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto element = static_cast<int>(size_of(params.dtype));
  TeamCut cut = {};
  cut.lanes = schedule.lanes;
  cut.channels = cut.lanes * (16 / element);
  cut.slices = static_cast<int>(params.channels) / cut.channels;
  cut.units = static_cast<int>(params.batch) * cut.slices;
  cut.rows = static_cast<int>(params.pixels);
  cut.share = static_cast<int>(schedule.share);
  cut.tiles = static_cast<int>(schedule.parts);
  cut.teams = schedule.teams;
  cut.stages = schedule.stages;
  cut.ahead = schedule.ahead;
  cut.stage_bytes = cut.share * cut.lanes * 16;
  cut.read_once = schedule.read_once;
  cut.stream_stores = schedule.stream_stores;
  const auto pitch = static_cast<cuuint64_t>(params.channels * element);
  const auto pixels = static_cast<cuuint64_t>(params.pixels);
  CUtensorMap map = {};
  const auto error = tensor_map<3>(
      params.dtype, params.input,
      {static_cast<cuuint64_t>(params.channels), pixels, static_cast<cuuint64_t>(params.batch)},
      {pitch, pitch * pixels}, {static_cast<cuuint32_t>(cut.channels), static_cast<cuuint32_t>(cut.share), 1}, map,
      CU_TENSOR_MAP_SWIZZLE_NONE, cut.lanes < 8 ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  if (error != cudaSuccess) return error;
  const auto with = [&](auto* kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kThreads), schedule.shared_bytes,
                  Together{1, true}, facts, stream, params, cut, map, static_cast<float2*>(workspace));
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with(channel_team_kernel<float>);
    case DType::kFloat16:
      return with(channel_team_kernel<__half>);
    case DType::kBFloat16:
      return with(channel_team_kernel<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
