// NCHW, small planes: as in plane.cu, but what a block has of its plane is in its threads' registers, a few vectors
// each. Nothing is bound by memory here, it is the chain of dependent steps that takes the time: one batch of loads,
// moments in registers, one exchange, stores.
//
//   thread   up to 8 vectors -> moments
//   warp     butterfly -> one part, which goes straight to all blocks of the cluster (lane r to block r)
//   block    waits until the parts of all warps of the cluster are there, and every warp merges all of them for itself
//
// What counts is how often threads wait for each other, and how much code they fetch. There is no merge of a block's
// warps before the exchange: 128 parts or 256 are merged as fast as 16. A part is stored together with its arrival at
// the receiver's barrier (st.async), so the exchange is one way and not three (store, cluster barrier there and back).
// The receivers' barriers must be ready before that; the cluster barrier for it is behind the loads.
//
// Two copies: planes too few for the device have two clusters each, which both take the moments of the whole plane, and
// store one half of it, since what a multiprocessor loads and stores is what is left. Not in place, as neither waits
// for the other.
//
// H200, 1x3x512x512 in half, of what two passes take in the same run (4.0 to 4.3 us): warps merged by their block,
// stores and a cluster barrier 0.99; parts of warps 0.91; by st.async 0.81; two copies 0.71, so measured on a kernel
// that could nothing else (even planes, ReLU, half). This one takes 0.78. Planes of 32x32 in half: 2.4 us where threads
// ask what they have, 1.54 where all have as much and the compiler knows it.
#include <bit>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/reduce.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kMaxCluster = 16;
constexpr int kAnyVectors = 0;
constexpr int kMaxParts = kMaxCluster * kHeldThreads / kWarp;

struct alignas(16) HeldPart {
  float mean, m2, count, unused;
};

#ifdef STYLEFORGE_HAS_CLUSTER
// Into the place of `local` in the shared memory of block `rank`, whose `barrier` counts the bytes.
__device__ __forceinline__ void send(HeldPart* local, uint64_t* barrier, uint32_t rank, const Moments<float>& v) {
  store_remote(map_shared(shared_address(local), rank), make_float4(v.mean, v.m2, v.count, v.count),
               map_shared(shared_address(barrier), rank));
}
#endif

// weight[index] or bias[index] as it lies in memory, in two halves: a conversion waits for the load, and with it all
// that follows, and so does what chooses between loads.
template <typename T>
struct RawParam {
  bool present, is_float;
  uint16_t low, high;

  // Where there is none, `other` is read.
  __device__ __forceinline__ RawParam(const void* base, DType dtype, int64_t index, const void* other)
      : present(base != nullptr), is_float(sizeof(T) == 4 || dtype == DType::kFloat32) {
    const auto* at = static_cast<const uint16_t*>(present ? base : other) + (present ? index << int(is_float) : 0);
    low = __ldg(at);
    high = __ldg(at + int(is_float));
  }
  __device__ __forceinline__ float value(float absent) const {
    if (!present) return absent;
    if (is_float) return __uint_as_float(static_cast<uint32_t>(high) << 16 | low);
    return to_acc(*reinterpret_cast<const T*>(&low));
  }
};

// Sets of as many elements each, in `width` neighbouring lanes (a power of two).
__device__ __forceinline__ Moments<float> merge_even(Moments<float> own, int width) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    if (offset >= width) break;
    const float mean = __shfl_xor_sync(0xffffffffu, own.mean, offset);
    const float m2 = __shfl_xor_sync(0xffffffffu, own.m2, offset);
    const float d = mean - own.mean;
    own.m2 = own.m2 + m2 + d * d * (0.5f * own.count);
    own.mean = 0.5f * (own.mean + mean);
    own.count *= 2;
  }
  return own;
}

// All parts, by one warp. About the first one's mean, so that the plane's is rounded once. kEven: of as many elements
// each, which is kElements.
template <bool kEven, int kElements>
__device__ __forceinline__ Moments<float> merge_parts(const HeldPart* parts, int number, float total, float inverse) {
  constexpr int kRows = kMaxParts / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int width = kEven ? min(number, kWarp) : kWarp;
  const float base = parts[0].mean;
  Moments<float> part[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int i = j * kWarp + (lane & (width - 1));
    if (i >= number) continue;
    const auto raw = *reinterpret_cast<const float4*>(parts + i);
    part[j] = {raw.z, raw.x - base, raw.y};
  }
  Moments<float> whole;
  if constexpr (kEven) {
    whole = part[0];
    if (number > kWarp) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kRows; ++j) sum += part[j].mean;  // zeros where there are none
      whole.count = total * (1.0f / kWarp);
      whole.mean = sum * (kElements * kWarp * inverse);  // one over the rows: powers of two
      whole.m2 = 0;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float d = part[j].mean - whole.mean;
        whole.m2 += part[j].m2 + part[j].count * d * d;
      }
    }
    whole = merge_even(whole, width);
  } else {
    whole = merge_moments(
        total,
        [&](auto visit) {
#pragma unroll
          for (int j = 0; j < kRows; ++j) visit(part[j]);
        },
        [](float v) { return warp_sum(v); });
  }
  whole.mean += base;
  return whole;
}

// kEach: every thread has as many vectors, and the plane's elements are a power of two; kAnyVectors: up to
// kHeldVectors. Of their own, since what a short kernel fetches of its code counts.
template <typename T, int kEach>
__global__ void __launch_bounds__(kHeldThreads)
    held_plane_kernel(const __grid_constant__ InstanceNormParams p, int share, int copies_log2) {
  constexpr int kWidth = kFullWidth<T>;
  constexpr bool kEven = kEach != kAnyVectors;
  constexpr int kMost = kEven ? kEach : kHeldVectors;
  using V = Vec<T, kWidth>;
  __shared__ HeldPart parts[kMaxParts];
#ifdef STYLEFORGE_HAS_CLUSTER
  __shared__ uint64_t arrived;
#endif

  const int blocks = static_cast<int>(cluster_size());
  const int rank = static_cast<int>(cluster_rank());
  const unsigned plane = cluster_id() >> copies_log2;
  const int copies = 1 << copies_log2;
  const int copy = static_cast<int>(cluster_id()) & (copies - 1);
  const int vectors = static_cast<int>(p.pixels / kWidth);
  const int begin = kEven ? rank * share : min(rank * share, vectors);
  const int count = kEven ? share : min(share, vectors - begin);
  const int stride = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warps = stride / kWarp;
  const int number = blocks * warps;
  const int64_t first = static_cast<int64_t>(plane) * vectors + begin + thread;
#ifdef STYLEFORGE_HAS_CLUSTER
  if (blocks > 1) {
    if (thread == 0) {
      mbarrier_init(&arrived, 1);
      mbarrier_init_fence();
    }
    __syncwarp();
    cluster_arrive_relaxed();  // the fence is all that has to be seen; a release would hold up the loads
  }
#endif

  wait_for_predecessor();
  uint4 x[kMost];  // as words: elements of two bytes would take a register each
  int present = 0;
#pragma unroll
  for (int u = 0; u < kMost; ++u) {
    if (!kEven && thread + u * stride >= count) continue;
    x[u] = __ldg(reinterpret_cast<const uint4*>(p.input) + first + u * stride);
    ++present;
  }
  const int64_t param = param_of(p, plane);
  const RawParam<T> weight(p.weight, p.param_dtype, param, p.input);
  const RawParam<T> bias(p.bias, p.param_dtype, param, p.input);
  release_successor();

  Moments<float> own;
  const auto& vectors_held = reinterpret_cast<const V(&)[kMost]>(x);
  if (kEven || present == kMost) {
    own.add(vectors_held, kMost);  // a number that the compiler knows
  } else {
    own.add(vectors_held, present);
  }
  // Converted again in the end: all vectors converted at a time are more registers than a thread has.
  if constexpr (kEven) {
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      asm volatile("" : "+r"(x[u].x), "+r"(x[u].y), "+r"(x[u].z), "+r"(x[u].w));
    }
  }
  own = kEven ? merge_even(own, kWarp) : merge_lanes(warp_sum(own.count), own);
  const float pixels = static_cast<float>(p.pixels);
  const float inverse = reciprocal(pixels);
  HeldPart* place = &parts[rank * warps + thread / kWarp];
  if (blocks > 1) {
#ifdef STYLEFORGE_HAS_CLUSTER
    cluster_wait();
    if (thread == 0) mbarrier_arrive_expect(&arrived, static_cast<uint32_t>(number * sizeof(HeldPart)));
    __syncwarp();
    if (lane < blocks) send(place, &arrived, static_cast<uint32_t>(lane), own);
    mbarrier_wait(&arrived, 0);  // and after that nobody writes into this block's memory: it may leave
#endif
  } else {
    if (lane == 0) *reinterpret_cast<float4*>(place) = make_float4(own.mean, own.m2, own.count, 0);
    __syncthreads();
  }
  const Moments<float> whole = merge_parts<kEven, kMost * kWidth * kWarp>(parts, number, pixels, inverse);
  const float rstd = __frsqrt_rn(whole.m2 * inverse + static_cast<float>(p.eps));
  if (rank == 0 && copy == 0 && thread == 0) store_statistics(p, plane, whole.mean, rstd);
  const PlaneAffine<float> affine{whole.mean, rstd * weight.value(1.0f), bias.value(0.0f)};
  switch_finish(p, [&]<Finish kFinish>() {
    uint4 r[kMost];
    if (has_residual<kFinish>(p)) {
#pragma unroll
      for (int u = 0; u < kMost; ++u) {
        if ((kEven || u < present) && (u & (copies - 1)) == copy) {
          r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + first + u * stride);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      if ((!kEven && u >= present) || (u & (copies - 1)) != copy) continue;
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
  const int64_t threads = int64_t{schedule.cluster} * schedule.threads;
  const auto go = [&]<typename T>() {
    const bool even =
        params.pixels % (threads * kFullWidth<T>) == 0 && std::has_single_bit(static_cast<uint64_t>(params.pixels));
    const int64_t each = even ? params.pixels / (threads * kFullWidth<T>) : kAnyVectors;
    auto* kernel = held_plane_kernel<T, kAnyVectors>;
    if (each == 1) kernel = held_plane_kernel<T, 1>;
    if (each == 2) kernel = held_plane_kernel<T, 2>;
    if (each == 4) kernel = held_plane_kernel<T, 4>;
    if (each == 8) kernel = held_plane_kernel<T, 8>;
    const auto grid =
        dim3(static_cast<unsigned>(params.batch * params.channels * schedule.cluster) << schedule.copies_log2);
    return launch(kernel, grid, dim3(schedule.threads), schedule.shared_bytes, schedule.cluster, facts, stream, params,
                  static_cast<int>(schedule.share), schedule.copies_log2);
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
