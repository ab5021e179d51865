// NCHW, one read and one write: a plane stays in shared memory, in one block or spread over a cluster.
//
//   plane:   |<------------------- pixels ------------------->|
//   cluster: | block 0    | block 1    | block 2    | block 3  |   each block: `share` vectors in shared memory
//   thread:   t, t + T, t + 2T ... (coalesced, and a thread reads back only what it wrote: no barrier between the
//   phases)
//
// 1. load and sum -> the block's own mean; 2. M2 about that mean, from shared memory; 3. the blocks' (count, mean, M2)
// are merged by every block in the same order through distributed shared memory (one cluster barrier; writing the parts
// into the other blocks instead of reading them there needs a second barrier and was slower); 4. normalise from
// shared memory, add the residual, activate, write. The variance is taken about a mean, never as E[x^2] - E[x]^2, which
// cancels.
#include "../common/awaited_param.cuh"
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/reduce.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kUnroll = 8;  // loads in flight for each thread

template <typename T, int kWidth>
__global__ void __launch_bounds__(1024, 1)
    plane_kernel(const __grid_constant__ InstanceNormParams p, int share, int prefetched) {
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  V* held = reinterpret_cast<V*>(shared);
  __shared__ Acc scratch[2][kMaxWarps];
  __shared__ Acc own[2];  // this block's mean and M2, read by the whole cluster

  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const unsigned plane = blockIdx.x / static_cast<unsigned>(blocks);
  const int vectors = static_cast<int>(p.pixels / kWidth);
  const int begin = min(rank * share, vectors);
  const int count = min(share, vectors - begin);
  const int64_t first = static_cast<int64_t>(plane) * vectors + begin;

  release_successor();
#ifdef STYLEFORGE_HAS_BULK_COPY
  // On its way to the L2 cache while the predecessor drains; also faster than what the threads ask for at a time.
  if (kWidth > 1 && threadIdx.x == 0 && static_cast<int>(blockIdx.x) < prefetched && count > 0) {
    bulk_prefetch(reinterpret_cast<const V*>(p.input) + first, static_cast<uint32_t>(count) * sizeof(V));
  }
#endif
  wait_for_predecessor();
  const int64_t param = param_of(p, plane);
  const AwaitedParam<Acc> weight(p.weight, p.param_dtype, param), bias(p.bias, p.param_dtype, param);

  // 1. load and sum
  Acc sum = 0;
  const int stride = blockDim.x;
  int i = threadIdx.x;
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    V v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_const<V>(p.input, first + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      held[i + u * stride] = v[u];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum += to_acc(v[u].data[k]);
    }
  }
  for (; i < count; i += stride) {
    const V v = load_const<V>(p.input, first + i);
    held[i] = v;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += to_acc(v.data[k]);
  }
  const Acc elements = static_cast<Acc>(count) * kWidth;
  Acc mean = block_sum(sum, scratch[0]) / max(elements, Acc(1));

  // 2. squares about the block's mean
  Acc squares = 0;
#pragma unroll 4
  for (i = threadIdx.x; i < count; i += stride) {
    const V v = held[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Acc d = to_acc(v.data[k]) - mean;
      squares += d * d;
    }
  }
  Acc m2 = block_sum(squares, scratch[1]);

  // 3. merge over the cluster
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      own[0] = mean;
      own[1] = m2;
    }
    cluster_arrive();
    cluster_wait();
    // Lane r of every warp reads the part of rank r; the warp's butterfly adds them in the same order everywhere.
    const int r = threadIdx.x % kWarp;
    Moments<Acc> part;
    if (r < blocks) {
      part.count = static_cast<Acc>(max(min(share, vectors - r * share), 0)) * kWidth;
      part.mean = load_remote(&own[0], r);
      part.m2 = load_remote(&own[1], r);
    }
    cluster_arrive();  // this block has read; the wait stands at the end, before any block may leave
    const auto whole = merge_lanes(static_cast<Acc>(p.pixels), part);
    mean = whole.mean;
    m2 = whole.m2;
  }
  const Acc rstd = reciprocal_sqrt(m2 / static_cast<Acc>(p.pixels) + static_cast<Acc>(p.eps));

  // 4. normalise
  if (rank == 0 && threadIdx.x == 0) store_statistics(p, plane, mean, rstd);
  const PlaneAffine<Acc> affine{mean, rstd * weight.value(1), bias.value(0)};
  switch_finish(p, [&]<Finish kFinish>() {
    if (!has_residual<kFinish>(p)) {
#pragma unroll(kFinish == Finish::kSmooth ? 1 : 4)
      for (i = threadIdx.x; i < count; i += stride) {
        store(p.output, first + i, normalize<kFinish>(p, affine, held[i], V{}));
      }
      return;
    }
    constexpr int kBatch = kFinish == Finish::kSmooth ? 1 : 4;
    for (i = threadIdx.x; i + (kBatch - 1) * stride < count; i += kBatch * stride) {
      V r[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) r[u] = load_const<V>(p.residual, first + i + u * stride);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        store(p.output, first + i + u * stride, normalize<kFinish>(p, affine, held[i + u * stride], r[u]));
      }
    }
#pragma unroll 1
    for (; i < count; i += stride) {
      const V r = load_const<V>(p.residual, first + i);
      store(p.output, first + i, normalize<kFinish>(p, affine, held[i], r));
    }
  });
  if (blocks > 1) cluster_wait();
}

}  // namespace

cudaError_t launch_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return switch_dtype(params.dtype, [&]<typename T>() {
    const auto grid = dim3(static_cast<unsigned>(params.batch * params.channels * schedule.cluster));
    auto* kernel = schedule.vectorized ? plane_kernel<T, kFullWidth<T>> : plane_kernel<T, 1>;
    return launch(kernel, grid, dim3(schedule.threads), schedule.shared_bytes, schedule.cluster, facts, stream, params,
                  static_cast<int>(schedule.share), schedule.prefetched);
  });
}

}  // namespace styleforge::cuda
