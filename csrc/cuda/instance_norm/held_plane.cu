// NCHW, small planes: as in plane.cu, but what a block has of its plane is in its threads' registers, a few vectors
// each. Nothing is bound by memory here, it is the chain of dependent steps that takes the time: one batch of loads,
// moments in registers, one barrier of the block, one exchange in the cluster, stores.
//
// A block writes its part into all others instead of being read by them, which saves a way there and back. It must not
// do so before they run: the barrier for that is behind the loads.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "parts.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kMaxCluster = 16;
constexpr int kWarps = kHeldThreads / kWarp;

#ifdef STYLEFORGE_HAS_CLUSTER
// Into the place of `local` in the shared memory of block `rank`.
__device__ __forceinline__ void store_remote(Part<float>* local, uint32_t rank, const Moments<float>& v) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(map_shared(address, rank)), "f"(v.mean), "f"(v.m2)
               : "memory");
}
#endif

template <typename T>
__global__ void __launch_bounds__(kHeldThreads)
    held_plane_kernel(const __grid_constant__ InstanceNormParams p, int share) {
  constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  using Acc = acc_t<T>;
  __shared__ Acc scratch[3][kWarps];
  __shared__ Part<Acc> of_block[kMaxCluster];

  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const unsigned plane = blockIdx.x / static_cast<unsigned>(blocks);
  const int vectors = static_cast<int>(p.pixels / kWidth);
  const int begin = min(rank * share, vectors);
  const int count = min(share, vectors - begin);
  const int64_t first = static_cast<int64_t>(plane) * vectors + begin + threadIdx.x;
  const int stride = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  if (blocks > 1) cluster_arrive();

  wait_for_predecessor();
  uint4 x[kHeldVectors];  // as words: elements of two bytes would take a register each
  int present = 0;
#pragma unroll
  for (int u = 0; u < kHeldVectors; ++u) {
    if (thread + u * stride >= count) continue;
    x[u] = __ldg(reinterpret_cast<const uint4*>(p.input) + first + u * stride);
    ++present;
  }
  const int64_t param = param_of(p, plane);
  const Acc weight = load_param(p.weight, p.param_dtype, param, Acc(1));
  const Acc shift = load_param(p.bias, p.param_dtype, param, Acc(0));
  release_successor();

  Moments<Acc> own;
  const auto& vectors_held = reinterpret_cast<const V(&)[kHeldVectors]>(x);
  if (present == kHeldVectors) {
    own.add(vectors_held, kHeldVectors);  // a number that the compiler knows
  } else {
    own.add(vectors_held, present);
  }
  own = merge_lanes(warp_sum(own.count), own);
  if (thread % kWarp == 0) {
    scratch[0][thread / kWarp] = own.count;
    scratch[1][thread / kWarp] = own.mean;
    scratch[2][thread / kWarp] = own.m2;
  }
  __syncthreads();
  const int lane = thread % kWarp;
  Moments<Acc> whole;
  if (lane < stride / kWarp) whole = {scratch[0][lane], scratch[1][lane], scratch[2][lane]};
  whole = merge_lanes(static_cast<Acc>(count) * kWidth, whole);
#ifdef STYLEFORGE_HAS_CLUSTER
  if (blocks > 1) {
    cluster_wait();
    if (thread < blocks) store_remote(&of_block[rank], thread, whole);
    cluster_arrive();
    cluster_wait();
    Moments<Acc> part;
    if (lane < blocks) {
      part.count = static_cast<Acc>(max(min(share, vectors - lane * share), 0)) * kWidth;
      part.mean = of_block[lane].mean;
      part.m2 = of_block[lane].m2;
    }
    whole = merge_lanes(static_cast<Acc>(p.pixels), part);
  }
#endif
  const Acc rstd = reciprocal_sqrt(whole.m2 / static_cast<Acc>(p.pixels) + static_cast<Acc>(p.eps));
  if (rank == 0 && thread == 0) store_statistics(p, plane, whole.mean, rstd);
  const PlaneAffine<Acc> affine{whole.mean, rstd * weight, shift};
  switch_finish(p, [&]<Finish kFinish>() {
    uint4 r[kHeldVectors];
    if (has_residual<kFinish>(p)) {
#pragma unroll
      for (int u = 0; u < kHeldVectors; ++u) {
        if (u < present) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kHeldVectors; ++u) {
      if (u >= present) continue;
      store(p.output, first + u * stride,
            normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&x[u]), *reinterpret_cast<const V*>(&r[u])));
    }
  });
}

}  // namespace

cudaError_t launch_held_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                              cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) <= 4) {
      const auto grid = dim3(static_cast<unsigned>(params.batch * params.channels * schedule.cluster));
      return launch(held_plane_kernel<T>, grid, dim3(schedule.threads), schedule.shared_bytes, schedule.cluster, facts,
                    stream, params, static_cast<int>(schedule.share));
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace styleforge::cuda
