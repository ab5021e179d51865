// channels_last, one read and one write: a slab (one sample, a few neighbouring channels, all pixels) stays in shared
// memory, in one block or spread over a cluster by pixels.
//
//   a pixel:  |<-------------------- channels -------------------->|
//             | slab 0: lanes x vector   | slab 1 | ...                   2 lanes = one 32-byte sector of memory
//   thread:   lane = t % lanes owns kWidth channels; row = t / lanes owns pixels row, row + rows, ...
//   cluster:  block r owns pixels [r * share, (r + 1) * share)
//
// A thread sums its own channels over its own pixels; sums over the rows go through warp shuffles and shared memory;
// the blocks merge (count, mean, M2) of every channel in the order of their ranks through distributed shared memory
// (Chan et al. 1983). A thread has four channels: eight, the 16 bytes of a half, make its chain of dependent steps
// longer than the shorter loads cost.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "channel_sums.cuh"
#include "kernels.h"
#include "normalize.cuh"
#include "phases.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kUnroll = 8;  // loads in flight for each thread
constexpr int kMaxCluster = 16;

template <typename T, int kWidth>
__global__ void __launch_bounds__(512) slab_kernel(const __grid_constant__ InstanceNormParams p, int lanes, int share) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  constexpr int kMaxChannels = kMaxLanes * kWidth;
  extern __shared__ __align__(16) unsigned char shared[];
  V* held = reinterpret_cast<V*>(shared);
  __shared__ __align__(16) Acc scratch[2][kSumScratch<kWidth>];
  __shared__ Acc own[2][kMaxChannels];     // this block's mean and M2 of each channel, read by the whole cluster
  __shared__ Acc result[3][kMaxChannels];  // mean, scale, shift

  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const int vectors = static_cast<int>(p.channels / kWidth);  // of one pixel
  const int slabs = (vectors + lanes - 1) / lanes;
  const unsigned unit = blockIdx.x / static_cast<unsigned>(blocks);
  const int64_t n = unit / static_cast<unsigned>(slabs);
  const int slab = static_cast<int>(unit - static_cast<unsigned>(n) * slabs);
  const int lane = threadIdx.x % lanes;
  const int row = threadIdx.x / lanes;
  const int rows = blockDim.x / lanes;
  const int vector = slab * lanes + lane;
  const bool active = vector < vectors;
  const int pixels = static_cast<int>(p.pixels);
  const int begin = min(rank * share, pixels);
  const int count = min(share, pixels - begin);
  const int64_t first = (n * p.pixels + begin) * vectors + vector;

  // of the thread's vector in the block's i-th pixel, in the input (which may lie in phases)
  const auto source = [&](int i) {
    return p.phase_width == 0 ? first + static_cast<int64_t>(i) * vectors
                              : phase_vector(p, n, begin + i, vectors, vector);
  };

  wait_for_predecessor();
  // Thread j < channels takes care of the slab's channel j between the passes; its parameters are on their way
  // meanwhile.
  const int channels = lanes * kWidth;
  const int64_t channel = static_cast<int64_t>(slab) * channels + threadIdx.x;
  const bool owns = threadIdx.x < channels && channel < p.channels;
  const int64_t param = owns ? n * p.param_batch_stride + channel : 0;
  const Acc weight = load_param(p.weight, p.param_dtype, param, Acc(1));
  const Acc bias = load_param(p.bias, p.param_dtype, param, Acc(0));

  // 1. load and sum
  Acc sum[kWidth] = {};
  int i = row;
  if (active) {
    for (; i + (kUnroll - 1) * rows < count; i += kUnroll * rows) {
      V v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) v[u] = load_const<V>(p.input, source(i + u * rows));
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        held[(i + u * rows) * lanes + lane] = v[u];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[k] += to_acc(v[u].data[k]);
      }
    }
    for (; i < count; i += rows) {
      const V v = load_const<V>(p.input, source(i));
      held[i * lanes + lane] = v;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += to_acc(v.data[k]);
    }
  }
  release_successor();
  sum_over_rows<kWidth>(sum, lanes, scratch[0]);
  Acc mean[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) mean[k] = sum[k] / max(static_cast<Acc>(count), Acc(1));

  // 2. squares about the block's mean
  Acc squares[kWidth] = {};
  if (active) {
#pragma unroll 4
    for (i = row; i < count; i += rows) {
      const V v = held[i * lanes + lane];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Acc d = to_acc(v.data[k]) - mean[k];
        squares[k] += d * d;
      }
    }
  }
  sum_over_rows<kWidth>(squares, lanes, scratch[1]);

  // 3. merge over the cluster
  if (row == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      own[0][lane * kWidth + k] = mean[k];
      own[1][lane * kWidth + k] = squares[k];
    }
  }
  if (blocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (owns) {
    const int j = threadIdx.x;
    Acc channel_mean = own[0][j];
    Acc channel_m2 = own[1][j];
    if (blocks > 1) {
      // All reads of other blocks are in flight together.
      Acc rank_mean[kMaxCluster], rank_m2[kMaxCluster];
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        rank_mean[r] = r < blocks ? load_remote(&own[0][j], r) : Acc(0);
        rank_m2[r] = r < blocks ? load_remote(&own[1][j], r) : Acc(0);
      }
      const auto held_by = [&](int r) { return static_cast<Acc>(max(min(share, pixels - r * share), 0)); };
      Acc sum_of_blocks = 0;
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) sum_of_blocks += held_by(r) * rank_mean[r];
      channel_mean = sum_of_blocks / static_cast<Acc>(pixels);
      channel_m2 = 0;
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        const Acc d = rank_mean[r] - channel_mean;
        channel_m2 += rank_m2[r] + held_by(r) * d * d;
      }
    }
    const Acc rstd = reciprocal_sqrt(channel_m2 / static_cast<Acc>(pixels) + static_cast<Acc>(p.eps));
    result[0][j] = channel_mean;
    result[1][j] = rstd * weight;
    result[2][j] = bias;
    if (rank == 0 && p.mean != nullptr) {
      reinterpret_cast<Acc*>(p.mean)[n * p.channels + channel] = channel_mean;
      reinterpret_cast<Acc*>(p.rstd)[n * p.channels + channel] = rstd;
    }
  }
  if (blocks > 1) cluster_arrive();  // has read; the wait stands at the end, before any block may leave
  __syncthreads();

  // 4. normalise
  if (active) {
    ChannelAffine<Acc, kWidth> affine;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      affine.mean[k] = result[0][lane * kWidth + k];
      affine.scale[k] = result[1][lane * kWidth + k];
      affine.shift[k] = result[2][lane * kWidth + k];
    }
    switch_finish(p, [&]<Finish kFinish>() {
      i = row;
      if constexpr (kFinish == Finish::kResidual) {
        constexpr int kBatch = 4;
        for (; i + (kBatch - 1) * rows < count; i += kBatch * rows) {
          V r[kBatch];
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            r[u] = load_const<V>(p.residual, first + static_cast<int64_t>(i + u * rows) * vectors);
          }
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            store(p.output, first + static_cast<int64_t>(i + u * rows) * vectors,
                  normalize<kFinish>(p, affine, held[(i + u * rows) * lanes + lane], r[u]));
          }
        }
      }
#pragma unroll(kFinish == Finish::kPlain ? 4 : 1)
      for (; i < count; i += rows) {
        const int64_t index = first + static_cast<int64_t>(i) * vectors;
        const V r = has_residual<kFinish>(p) ? load_const<V>(p.residual, index) : V{};
        store(p.output, index, normalize<kFinish>(p, affine, held[i * lanes + lane], r));
      }
    });
  }
  if (blocks > 1) cluster_wait();
}

}  // namespace

cudaError_t launch_slab(const InstanceNormParams& params, const InstanceNormSchedule& schedule, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return switch_dtype(params.dtype, [&]<typename T>() {
    const int64_t vectors = params.channels / (schedule.vectorized ? kChannelWidth<T> : 1);
    const auto grid = dim3(static_cast<unsigned>(params.batch * ceil_div(vectors, schedule.lanes) * schedule.cluster));
    auto* kernel = schedule.vectorized ? slab_kernel<T, kChannelWidth<T>> : slab_kernel<T, 1>;
    return launch(kernel, grid, dim3(schedule.threads), schedule.shared_bytes, schedule.cluster, facts, stream, params,
                  schedule.lanes, static_cast<int>(schedule.share));
  });
}

}  // namespace styleforge::cuda
