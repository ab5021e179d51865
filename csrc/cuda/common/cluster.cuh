// Thread-block clusters (sm_90+) and programmatic dependent launch, as the few PTX instructions that are used. On older
// architectures a cluster is one block and there is nothing to wait for, so kernels need no second version.
#pragma once

#include <cstdint>

namespace styleforge::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define STYLEFORGE_HAS_CLUSTER 1
#endif

__device__ __forceinline__ uint32_t cluster_size() {
#ifdef STYLEFORGE_HAS_CLUSTER
  uint32_t v;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
#else
  return 1;
#endif
}

__device__ __forceinline__ uint32_t cluster_rank() {
#ifdef STYLEFORGE_HAS_CLUSTER
  uint32_t v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
#else
  return 0;
#endif
}

// The number of the cluster in the (one-dimensional) grid.
__device__ __forceinline__ uint32_t cluster_id() {
#ifdef STYLEFORGE_HAS_CLUSTER
  uint32_t v;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(v));
  return v;
#else
  return blockIdx.x;
#endif
}

// All threads of all blocks of the cluster; what was written before arrive is seen after wait.
__device__ __forceinline__ void cluster_arrive() {
#ifdef STYLEFORGE_HAS_CLUSTER
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef STYLEFORGE_HAS_CLUSTER
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

#ifdef STYLEFORGE_HAS_CLUSTER
// The same of threads that have only read, or made barriers and said so: a release would wait for what is on its way.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// The same shared address in block `rank` of the cluster.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Into the shared memory of a block of the cluster, counted in bytes by a barrier there (both addresses by map_shared).
__device__ __forceinline__ void store_remote(uint32_t to, const float2& v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(v.x),
               "f"(v.y), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t to, const float4& v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t to, const uint4& v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}
// As mbarrier_wait, for what other blocks of the cluster wrote.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}
#endif

// The value at the address of `local` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float load_remote(const float* local, uint32_t rank) {
#ifdef STYLEFORGE_HAS_CLUSTER
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  const uint32_t remote = map_shared(address, rank);
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote) : "memory");
  return v;
#else
  return *local;
#endif
}
__device__ __forceinline__ double load_remote(const double* local, uint32_t rank) {
#ifdef STYLEFORGE_HAS_CLUSTER
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  const uint32_t remote = map_shared(address, rank);
  double v;
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(v) : "r"(remote) : "memory");
  return v;
#else
  return *local;
#endif
}

#ifdef STYLEFORGE_HAS_CLUSTER
// Four at once, from a shared address aligned to 16 bytes.
__device__ __forceinline__ float4 load_remote(uint32_t local, uint32_t rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(map_shared(local, rank))
               : "memory");
  return v;
}
#endif

// Programmatic dependent launch: a kernel may start while its predecessor drains; nothing it reads or writes before
// this call may depend on the predecessor.
__device__ __forceinline__ void wait_for_predecessor() {
#ifdef STYLEFORGE_HAS_CLUSTER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the successor's blocks take up free space on the multiprocessors from now on.
__device__ __forceinline__ void release_successor() {
#ifdef STYLEFORGE_HAS_CLUSTER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace styleforge::cuda
