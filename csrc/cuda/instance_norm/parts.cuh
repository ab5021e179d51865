// The moments of tiles, handed from block to block through global memory; for readers that wait, without a counter or a
// fence: a part says by itself whether it is there. M2 is never negative, so the sign of its word is free: set, the
// part is there. Memory starts as zeros.
#pragma once

#include <cstdint>

#include "moments.cuh"

namespace styleforge::cuda {

template <typename Acc>
struct alignas(2 * sizeof(Acc)) Part {
  Acc mean, m2;
};

// For a reader in a later kernel, or behind a fence: a pair in one access, by way of the L2 cache.
__device__ __forceinline__ void store_part(Part<float>* at, float mean, float m2) {
  __stcg(reinterpret_cast<float2*>(at), make_float2(mean, m2));
}
__device__ __forceinline__ void store_part(Part<double>* at, double mean, double m2) {
  __stcg(reinterpret_cast<double2*>(at), make_double2(mean, m2));
}
__device__ __forceinline__ Part<float> load_part(const Part<float>* at) {
  const float2 both = __ldcg(reinterpret_cast<const float2*>(at));
  return {both.x, both.y};
}
__device__ __forceinline__ Part<double> load_part(const Part<double>* at) {
  const double2 both = __ldcg(reinterpret_cast<const double2*>(at));
  return {both.x, both.y};
}

// Below: for readers that wait. float: both words in one access.
__device__ __forceinline__ void publish(Part<float>* at, float mean, float m2) {
  const uint64_t low = __float_as_uint(mean);
  const uint64_t high = __float_as_uint(m2) | 0x80000000u;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(high << 32 | low) : "memory");
}
__device__ __forceinline__ uint64_t fetch(const Part<float>* at) {
  uint64_t both;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(at) : "memory");
  return both;
}
__device__ __forceinline__ bool is_there(uint64_t both) { return (both >> 63) != 0; }
__device__ __forceinline__ void unpack(uint64_t both, Moments<float>& part) {
  part.mean = __uint_as_float(static_cast<uint32_t>(both));
  part.m2 = __uint_as_float(static_cast<uint32_t>(both >> 32) & 0x7fffffffu);
}
__device__ __forceinline__ bool look(const Part<float>* at, Moments<float>& part) {
  const uint64_t both = fetch(at);
  unpack(both, part);
  return is_there(both);
}

// double: the mean first, then M2 with the sign, and looked at the other way round.
__device__ __forceinline__ void publish(Part<double>* at, double mean, double m2) {
  const uint64_t word = static_cast<uint64_t>(__double_as_longlong(m2)) | (uint64_t(1) << 63);
  asm volatile("st.relaxed.gpu.global.f64 [%0], %1;" ::"l"(&at->mean), "d"(mean) : "memory");
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(&at->m2), "l"(word) : "memory");
}
__device__ __forceinline__ bool look(const Part<double>* at, Moments<double>& part) {
  uint64_t word;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(&at->m2) : "memory");
  asm volatile("ld.relaxed.gpu.global.f64 %0, [%1];" : "=d"(part.mean) : "l"(&at->mean) : "memory");
  part.m2 = __longlong_as_double(static_cast<long long>(word & ~(uint64_t(1) << 63)));
  return (word >> 63) != 0;
}

}  // namespace styleforge::cuda
