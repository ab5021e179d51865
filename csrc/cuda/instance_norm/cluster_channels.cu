// channels_last in units that the shared memory of one cluster holds (sm_90+): stream_channels_last.cu, but the blocks
// that share a unit are neighbours, and say what they found in each other's shared memory. No way through the L2 cache,
// no memory to be zeroed, no grid that has to run all at once.
//
//   unit:   one sample, a slice of its channels (whole lines of the cache); clusters take units in turn
//   block:  its part of the unit's pixels, in tiles, all of which find room in its ring
//
//   warp 0       producer  loads the block's tiles into the next free stage: the next unit's follow
//   warps 1-8    stats     moments of the unit's tiles, merged over the block, sent to all blocks of the cluster
//   warps 9-16   apply     all blocks' moments -> map of each channel; normalise, residual, activate, store
//
// What limits it (H200): clusters of 16 find room on 112 of 132 multiprocessors, 32 units are five rounds of seven, and
// of a unit's round of nine microseconds at 128 KB a block (16x128x128x128 in half 48 us, NCHW 36) about three pass
// between its last tile and its first store, while the ring has room for half of the next unit. Half as large units, of
// 64 bytes of a pixel, 48.8; clusters of eight with those (15 at once) 48.7, and 72.6 where a sixteenth has to wait;
// slices of 32 bytes 104, and 4x64x256x256 by those 41.6 against 28.1 by stream_channels_last.cu.
//
// Without clusters, and mostly faster: team_channels.cu, which leaves this path the few units that teams share badly.
// The first tiles asked for in the L2 cache before the predecessor is through: no faster, here and in the other two.
//
// Places for moments are two, by turns. A block sends into one of them again when all blocks have said that they have
// taken what was there.
#include <algorithm>

#include "../common/cluster.cuh"
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

constexpr int kGroupWarps = 8;  // stats, and apply
constexpr int kGroup = kGroupWarps * kWarp;
constexpr int kThreads = kWarp + 2 * kGroup;
static_assert(kGroup == kChannelStreamThreads);

struct ClusterCut {
  int lanes;     // vectors of 16 bytes of a slice
  int slices;    // of a sample
  int units;     // samples x slices
  int channels;  // of a slice
  int rows;      // pixels of a sample
  int share;     // of a tile
  int tiles;     // of a block
  int stages;
  int ahead;  // tiles on their way at a time
  int stage_bytes;
  bool read_once;      // what is loaded is the first that the L2 cache lets go
  bool stream_stores;  // what is stored, too
};

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr int kStatsBarrier = 1, kApplyBarrier = 2;
constexpr int kStages = 32;
constexpr int kMaxCluster = 16;

struct ClusterRing {
  uint64_t full[kStages], empty[kStages];
  uint64_t arrived[2], taken[2];
  float2 parts[2][kMaxCluster][kClusterChannels];  // mean and M2, of all blocks
  float2 warps[2][kGroupWarps][kClusterChannels];
  float counts[2][kGroupWarps];
  float affine[2][3][kClusterChannels];  // mean, scale, shift
};

// Into the place of `local` in the shared memory of block `rank`, whose `barrier` counts the bytes.
__device__ __forceinline__ void send(const float2* local, uint64_t* barrier, uint32_t rank, float mean, float m2) {
  store_remote(map_shared(shared_address(local), rank), make_float2(mean, m2),
               map_shared(shared_address(barrier), rank));
}
// At the barrier of block `rank`.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(map_shared(shared_address(barrier), rank))
      : "memory");
}
template <typename T>
struct ClusterStream {
  static constexpr int kWidth = kFullWidth<T>;
  static constexpr int kTaken = kChannelStreamRows;  // vectors of a tile that a thread has, at most
  using V = Vec<T, kWidth>;

  const InstanceNormParams& p;
  const ClusterCut& cut;
  ClusterRing& ring;
  unsigned char* stages;
  const CUtensorMap* map;
  int blocks, rank;       // of the cluster
  int first_unit, step;   // of the cluster's units
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
    for (int unit = first_unit; unit < cut.units; unit += step) {
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
        mbarrier_arrive_expect(&ring.full[at.stage], static_cast<uint32_t>(cut.stage_bytes));
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
    const int rows = kGroup / cut.lanes;
    const int row = t / cut.lanes;
    const int warp = t / kWarp, lane = t % kWarp;
    Turn at;
    int turn = 0;
    for (int unit = first_unit; unit < cut.units; unit += step, ++turn) {
      ChannelSums sum;
      for (int tile = 0; tile < own; ++tile, at.next(cut.stages)) {
        mbarrier_wait(&ring.full[at.stage], at.parity);
        const auto* held = reinterpret_cast<const uint4*>(stage(at.stage)) + t;
        const int there = rows_of(tile);
        uint4 raw[kTaken];  // as words: elements of two bytes would take a register each
        const auto& v = reinterpret_cast<const V(&)[kTaken]>(raw);
        const auto add = [&](int u) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const float d = to_acc(v[u].data[k]) - sum.base[k];
            sum.sum[k] += d;
            sum.squares[k] += d * d;
          }
        };
        if (there == rows * kTaken) {
#pragma unroll
          for (int u = 0; u < kTaken; ++u) raw[u] = held[u * kGroup];
          if (tile == 0) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) sum.base[k] = to_acc(v[0].data[k]);
          }
#pragma unroll
          for (int u = 0; u < kTaken; ++u) add(u);
          sum.count += static_cast<float>(kTaken);
        } else {
#pragma unroll 1
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows >= there) break;
            raw[0] = held[u * kGroup];
            if (tile == 0 && u == 0) {
#pragma unroll
              for (int k = 0; k < kWidth; ++k) sum.base[k] = to_acc(v[0].data[k]);
            }
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
      publish(own_moments, turn, t, warp, lane);
    }
  }

  // Rows of a warp by a butterfly, then the warps by one thread for each channel, which sends the block's part.
  __device__ __forceinline__ void publish(ChannelMoments<kWidth, float>& sum, int turn, int t, int warp,
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
    named_barrier(kStatsBarrier, kGroup);
    if (t >= cut.channels) return;
    Moments<float> part[kGroupWarps];
#pragma unroll
    for (int w = 0; w < kGroupWarps; ++w) {
      const float2 both = ring.warps[place][w][t];
      part[w] = {ring.counts[place][w], both.x, both.y};
    }
    const auto whole = merge_moments(
        static_cast<float>(count),
        [&](auto visit) {
#pragma unroll
          for (int w = 0; w < kGroupWarps; ++w) visit(part[w]);
        },
        [](float v) { return v; });
    if (turn >= 2) mbarrier_wait_cluster(shared_address(&ring.taken[place]), (turn / 2 - 1) & 1);
    for (int r = 0; r < blocks; ++r) {
      send(&ring.parts[place][rank][t], &ring.arrived[place], static_cast<uint32_t>(r), whole.mean, whole.m2);
    }
  }

  // Of a place, by one thread: what its next moments are.
  __device__ __forceinline__ void expect_parts(int place) const {
    mbarrier_arrive_expect(&ring.arrived[place], static_cast<uint32_t>(blocks * cut.channels * sizeof(float2)));
  }

  // All apply threads: the maps of a unit's channels, kGroup / channels lanes to a channel.
  __device__ __forceinline__ void collect(int unit, int turn, int t, int per) const {
    const int place = turn & 1;
    const int c = t / per, g = t - c * per;
    const int sample = unit / cut.slices;
    const int channel = (unit - sample * cut.slices) * cut.channels + c;
    float weight = 1, bias = 0;
    if (g == 0) {
      const int64_t param = sample * p.param_batch_stride + channel;
      weight = load_param(p.weight, p.param_dtype, param, 1.0f);
      bias = load_param(p.bias, p.param_dtype, param, 0.0f);
    }
    constexpr int kEach = kMaxCluster / (kGroup / kClusterChannels);
    Moments<float> part[kEach];
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      part[u].count = g + u * per < blocks ? static_cast<float>(pixels_of(g + u * per)) : 0;
    mbarrier_wait(&ring.arrived[place], turn / 2 & 1);
    if (t == 0) expect_parts(place);
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (g + u * per >= blocks) continue;
      const float2 both = ring.parts[place][g + u * per][c];
      part[u].mean = both.x;
      part[u].m2 = both.y;
    }
    const auto whole = merge_moments(
        static_cast<float>(cut.rows),
        [&](auto visit) {
#pragma unroll
          for (int u = 0; u < kEach; ++u) visit(part[u]);
        },
        [&](float v) {
          for (int offset = per / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
          return v;
        });
    if (g == 0) {
      const float rstd = whole.rstd(p.eps);
      ring.affine[place][0][c] = whole.mean;
      ring.affine[place][1][c] = rstd * weight;
      ring.affine[place][2][c] = bias;
      if (rank == 0) store_statistics(p, sample * p.channels + channel, whole.mean, rstd);
    }
    named_barrier(kApplyBarrier, kGroup);
    if (t < blocks) arrive_at(&ring.taken[place], static_cast<uint32_t>(t));
  }

  // Apply thread `t`.
  template <Finish kFinish>
  __device__ __forceinline__ void apply(int t) const {
    const int rows = kGroup / cut.lanes;
    const int row = t / cut.lanes;
    const int lane = t % cut.lanes;
    const int vectors = cut.slices * cut.lanes;
    const int step_u = rows * vectors;
    const int per = kGroup / cut.channels;  // a power of two, part of a warp
    const uint64_t policy = cache_policy(cut.stream_stores, false);
    Turn at;
    int turn = 0;
    for (int unit = first_unit; unit < cut.units; unit += step, ++turn) {
      collect(unit, turn, t, per);
      ChannelAffine<float, kWidth> affine;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        affine.mean[k] = ring.affine[turn & 1][0][lane * kWidth + k];
        affine.scale[k] = ring.affine[turn & 1][1][lane * kWidth + k];
        affine.shift[k] = ring.affine[turn & 1][2][lane * kWidth + k];
      }
      const int sample = unit / cut.slices;
      const int slice = unit - sample * cut.slices;
      int64_t first = (static_cast<int64_t>(sample) * cut.rows + begin + row) * vectors + slice * cut.lanes + lane;
      for (int tile = 0; tile < own; ++tile, at.next(cut.stages), first += static_cast<int64_t>(cut.share) * vectors) {
        const int there = rows_of(tile);
        constexpr bool kLong = kFinish == Finish::kSmooth;
        uint4 r[kLong ? 1 : kTaken] = {};
        if constexpr (kFinish == Finish::kResidual) {
#pragma unroll
          for (int u = 0; u < kTaken; ++u) {
            if (row + u * rows < there) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step_u);
          }
        }
        mbarrier_wait(&ring.full[at.stage], at.parity);
        const auto* held = reinterpret_cast<const uint4*>(stage(at.stage)) + t;
        if constexpr (kFinish == Finish::kPlain) {
          if (there == rows * kTaken) {
            const auto whole = [&]<Activation kActivation>() {
              uint4 x[kTaken];
#pragma unroll
              for (int u = 0; u < kTaken; ++u) x[u] = held[u * kGroup];
              __syncwarp();
              if (t % kWarp == 0) mbarrier_arrive(&ring.empty[at.stage]);
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
        const auto put = [&](int u, const uint4& x, const uint4& residual) {
          const V y =
              normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&x), *reinterpret_cast<const V*>(&residual));
          uint4* to = reinterpret_cast<uint4*>(p.output) + first + u * step_u;
          if (cut.stream_stores) {
            __stcs(to, *reinterpret_cast<const uint4*>(&y));
          } else {
            *to = *reinterpret_cast<const uint4*>(&y);
          }
        };
#pragma unroll(kLong ? 1 : kTaken)
        for (int u = 0; u < kTaken; ++u) {
          if (row + u * rows >= there) break;
          if (kLong && p.residual != nullptr) {
            r[0] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * step_u);
          }
          put(u, held[u * kGroup], r[kLong ? 0 : u]);
        }
        __syncwarp();
        if (t % kWarp == 0) mbarrier_arrive(&ring.empty[at.stage]);
      }
    }
  }
};

#endif  // STYLEFORGE_HAS_BULK_COPY

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    channel_cluster_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ ClusterCut cut,
                           const __grid_constant__ CUtensorMap map) {
#ifdef STYLEFORGE_HAS_BULK_COPY
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ ClusterRing ring;
  const int thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const int begin = rank * cut.tiles * cut.share;
  const int count = min(max(cut.rows - begin, 0), cut.tiles * cut.share);
  const ClusterStream<T> stream{p,
                                cut,
                                ring,
                                stages,
                                &map,
                                blocks,
                                rank,
                                static_cast<int>(cluster_id()),
                                static_cast<int>(gridDim.x) / blocks,
                                begin,
                                count,
                                (count + cut.share - 1) / cut.share};
  if (thread == 0) {
    prefetch_map(&map);
    for (int s = 0; s < cut.stages; ++s) {
      mbarrier_init(&ring.full[s], 1);
      mbarrier_init(&ring.empty[s], 2 * kGroupWarps);
    }
    for (int place = 0; place < 2; ++place) {
      mbarrier_init(&ring.arrived[place], 1);
      mbarrier_init(&ring.taken[place], static_cast<uint32_t>(blocks));
    }
    mbarrier_init_fence();
    stream.expect_parts(0);
    stream.expect_parts(1);
    wait_for_predecessor();
    stream.produce(true);
  }
  __syncwarp();
  wait_for_predecessor();
  cluster_arrive();
  cluster_wait();
  if (thread >= kWarp + kGroup) {
    switch_finish(p, [&]<Finish kFinish>() { stream.template apply<kFinish>(thread - kWarp - kGroup); });
  } else if (thread >= kWarp) {
    stream.take_moments(thread - kWarp);
  } else if (thread == 0) {
    stream.produce(false);
    release_successor();
  }
  // Others may still say that they have taken what this block sent.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace

cudaError_t launch_channel_cluster(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                   cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto element = static_cast<int>(size_of(params.dtype));
  ClusterCut cut = {};
  cut.lanes = schedule.lanes;
  cut.channels = cut.lanes * (16 / element);
  cut.slices = static_cast<int>(params.channels) / cut.channels;
  cut.units = static_cast<int>(params.batch) * cut.slices;
  cut.rows = static_cast<int>(params.pixels);
  cut.share = static_cast<int>(schedule.share);
  cut.tiles = static_cast<int>(schedule.parts);
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
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  if (error != cudaSuccess) return error;
  const auto with = [&](auto* kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kThreads), schedule.shared_bytes,
                  schedule.cluster, facts, stream, params, cut, map);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with(channel_cluster_kernel<float>);
    case DType::kFloat16:
      return with(channel_cluster_kernel<__half>);
    case DType::kBFloat16:
      return with(channel_cluster_kernel<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
