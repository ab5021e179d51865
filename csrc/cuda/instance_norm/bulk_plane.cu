// NCHW, large planes of large tensors (sm_90+): a block's part of a plane comes to shared memory by one bulk copy, and
// several blocks share a multiprocessor, so that some load while others store.
//
//   cluster: | block 0    | block 1    |   a plane; each block: `share` vectors in shared memory
//   warp:    moments of its vectors -> one part, which goes straight to all blocks of the cluster (st.async)
//   block:   waits for the parts of all warps of the cluster, and every warp merges all of them for itself; normalise
//            from shared memory, add the residual, activate, store
//
// Blocks come one by one as others leave, those of the next launch too: the first of them ask for their parts in the L2
// cache before they wait for their predecessor.
//
// H200, cold: 4x64x256x256 in float 34.2 us, a copy 33.7, rings of one resident block (stream.cu) 37.8; in half 18.4,
// 17.8, 21.4; 16x64x256x256 in half 67.3, 64.9, 73.5.
//
// Few large copies count. On a prototype (ReLU, even planes), 4x64x256x256 in half, clusters of two, one run: one copy
// of 64 KB a block 20.5 us, copies of 32 KB or 16 KB, of which moments are taken as they come, 22.9 and 22.5, of 8 KB
// 25.3. (Perhaps the order in which memory is asked; not shown.) In the same run, whole planes of 128 KB in a block, a
// quarter of it in registers: 23.2; results stored from shared memory by the copy engine: 1 to 6 percent more.
//
// Lines of the L2 cache are let go as the cache does it: input and output that are the first to go cost 4x64x256x256 in
// half a microsecond. Results that are kept (none is written over another within a graph) take 0.7 us more there.
#include "../common/awaited_param.cuh"
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kBlocks = 3;  // of a multiprocessor, at least

struct BulkPlaneCut {
  int vectors;         // of a plane
  int share;           // of a block, the cluster's last ones may have fewer
  int prefetched;      // blocks that ask for their part before the predecessor is through
  bool read_once;      // loads are the first that the L2 cache lets go
  bool stream_stores;  // stores, too
};

#ifdef STYLEFORGE_HAS_BULK_COPY

constexpr int kMaxCluster = 16;
constexpr int kMaxParts = kMaxCluster * kBulkPlaneThreads / kWarp;

// Moments of the vectors that a thread takes in turn, `stride` apart.
template <typename V>
__device__ __forceinline__ Moments<float> thread_moments(const V* held, int count, int stride) {
  constexpr int kTaken = 4;
  Moments<float> own;
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kTaken - 1) * stride < count; i += kTaken * stride) {
    V v[kTaken];
#pragma unroll
    for (int u = 0; u < kTaken; ++u) v[u] = held[i + u * stride];
    own.add(v, kTaken);
  }
  for (; i < count; i += stride) {
    const V v[1] = {held[i]};
    own.add(v, 1);
  }
  return own;
}

#endif  // STYLEFORGE_HAS_BULK_COPY

template <typename T>
__global__ void __launch_bounds__(kBulkPlaneThreads, kBlocks)
    bulk_plane_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ BulkPlaneCut cut) {
#ifdef STYLEFORGE_HAS_BULK_COPY
  constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full, arrived;
  __shared__ float4 parts[kMaxParts];  // mean, M2, count
  const V* held = reinterpret_cast<const V*>(shared);

  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const unsigned plane = cluster_id();
  const int begin = min(rank * cut.share, cut.vectors);
  const int count = min(cut.share, cut.vectors - begin);
  const int64_t first = static_cast<int64_t>(plane) * cut.vectors + begin;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int stride = static_cast<int>(blockDim.x);
  const int warps = stride / kWarp;
  const int number = blocks * warps;

  if (thread == 0) {
    mbarrier_init(&full, 1);
    mbarrier_init(&arrived, blocks > 1 ? 1u : static_cast<uint32_t>(warps));
    mbarrier_init_fence();
    if (blocks > 1) mbarrier_arrive_expect(&arrived, static_cast<uint32_t>(number * sizeof(float4)));
    release_successor();
    const auto* from = reinterpret_cast<const V*>(p.input) + first;
    const uint32_t bytes = static_cast<uint32_t>(count) * sizeof(V);
    if (static_cast<int>(blockIdx.x) < cut.prefetched && count > 0) bulk_prefetch(from, bytes);
    wait_for_predecessor();
    mbarrier_arrive_expect(&full, bytes);
    if (count > 0) {
      if (cut.read_once) {
        bulk_load_once(shared, from, bytes, &full);
      } else {
        bulk_load(shared, from, bytes, &full);
      }
    }
  }
  __syncthreads();
  if (blocks > 1) cluster_arrive_relaxed();  // the fence is all that has to be seen
  wait_for_predecessor();
  const int64_t param = param_of(p, plane);
  const AwaitedParam<float> weight(p.weight, p.param_dtype, param), bias(p.bias, p.param_dtype, param);

  mbarrier_wait(&full, 0);
  const auto own = thread_moments(held, count, stride);
  const auto of_warp = merge_lanes(warp_sum(own.count), own);
  const float4 part = make_float4(of_warp.mean, of_warp.m2, of_warp.count, 0.0f);
  float4* place = &parts[rank * warps + thread / kWarp];
  if (blocks > 1) {
    cluster_wait();
    if (lane < blocks) {
      store_remote(map_shared(shared_address(place), static_cast<uint32_t>(lane)), part,
                   map_shared(shared_address(&arrived), static_cast<uint32_t>(lane)));
    }
    mbarrier_wait_cluster(shared_address(&arrived), 0);  // and after that nobody writes here: the block may leave
  } else {
    if (lane == 0) {
      *place = part;
      mbarrier_arrive(&arrived);
    }
    mbarrier_wait(&arrived, 0);
  }
  constexpr int kPartRows = kMaxParts / kWarp;
  Moments<float> set[kPartRows];
#pragma unroll
  for (int u = 0; u < kPartRows; ++u) {
    if (u * kWarp + lane >= number) continue;
    const float4 v = parts[u * kWarp + lane];
    set[u] = {v.z, v.x, v.y};
  }
  const auto whole = merge_moments(
      static_cast<float>(p.pixels),
      [&](auto visit) {
#pragma unroll
        for (int u = 0; u < kPartRows; ++u) visit(set[u]);
      },
      [](float v) { return warp_sum(v); });
  const float rstd = whole.rstd(p.eps);
  if (rank == 0 && thread == 0) store_statistics(p, plane, whole.mean, rstd);

  const PlaneAffine<float> affine{whole.mean, rstd * weight.value(1.0f), bias.value(0.0f)};
  const auto* words = reinterpret_cast<const uint4*>(shared);
  const auto* residual = reinterpret_cast<const uint4*>(p.residual) + first;
  auto* output = reinterpret_cast<uint4*>(p.output) + first;
  switch_finish(p, [&]<Finish kFinish>() {
    constexpr int kTaken = kFinish == Finish::kSmooth ? 1 : 4;
    const auto finish = [&](int i, const uint4& x, const uint4& r) {
      const V y = normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&x), *reinterpret_cast<const V*>(&r));
      const auto& raw = *reinterpret_cast<const uint4*>(&y);
      if (cut.stream_stores) {
        __stcs(output + i, raw);
      } else {
        output[i] = raw;
      }
    };
    int i = thread;
    for (; i + (kTaken - 1) * stride < count; i += kTaken * stride) {
      uint4 x[kTaken], r[kTaken] = {};  // as words: elements of two bytes would take a register each
#pragma unroll
      for (int u = 0; u < kTaken; ++u) {
        if (has_residual<kFinish>(p)) r[u] = __ldg(residual + i + u * stride);
        x[u] = words[i + u * stride];
      }
#pragma unroll
      for (int u = 0; u < kTaken; ++u) finish(i + u * stride, x[u], r[u]);
    }
    if constexpr (kTaken > 1) {
#pragma unroll 1
      for (; i < count; i += stride) {
        uint4 r = {};
        if (has_residual<kFinish>(p)) r = __ldg(residual + i);
        finish(i, words[i], r);
      }
    }
  });
#endif
}

}  // namespace

cudaError_t launch_bulk_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                              cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto go = [&]<typename T>() {
    const BulkPlaneCut cut{static_cast<int>(params.pixels / kFullWidth<T>), static_cast<int>(schedule.share),
                           schedule.prefetched, schedule.read_once, schedule.stream_stores};
    const auto grid = dim3(static_cast<unsigned>(params.batch * params.channels * schedule.cluster));
    return launch(bulk_plane_kernel<T>, grid, dim3(schedule.threads), schedule.shared_bytes, schedule.cluster, facts,
                  stream, params, cut);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return go.operator()<float>();
    case DType::kFloat16:
      return go.operator()<__half>();
    case DType::kBFloat16:
      return go.operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
