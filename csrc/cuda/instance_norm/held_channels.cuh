// channels_last tensors whose share of a block is in its threads' registers: cut as in resident.cuh. One warp, the
// steward, fetches what the block must know of its channels, marks the block's pairs as absent, and later adds what the
// warps found and publishes it. It has no data, so that no thread with data has anything to do before its loads but to
// compute where they lie; where threads have so much that a seventeenth warp would leave too few registers, it is the
// first of the others.
//
// The grid is (samples, parts of a unit, slices), so that nothing has to be divided.
#pragma once

#include <bit>

#include "../common/cluster.cuh"
#include "../common/grid.cuh"
#include "../common/mma.cuh"
#include "../common/reduce.cuh"
#include "../common/types.cuh"
#include "kernels.h"

namespace styleforge::cuda {

struct HeldCut {
  int lanes_log2, share, parts;
  float2* pairs;  // [samples, slices, parts, channels of a slice]
};

// Zeros where there is nothing. Without a branch, so that all that a thread loads is asked for at once; what is read
// once leaves no trace in the L1 cache.
__device__ __forceinline__ void load_if(uint4& to, const uint4* from, bool present) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  to = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<int>(present))
      : "memory");
#endif
}

#ifdef STYLEFORGE_HAS_CLUSTER

// Until all of the thread's groups of copies but the last `pending` are there; a number that the compiler knows.
__device__ __forceinline__ void copy_wait_but(int pending) {
  switch (pending) {
    case 0:
      return copy_wait<0>();
    case 1:
      return copy_wait<1>();
    case 2:
      return copy_wait<2>();
    default:
      return copy_wait<3>();
  }
}

struct AddPairs {
  __device__ __forceinline__ void step(int) const {}
  __device__ __forceinline__ void operator()(float& a, float& b, float other_a, float other_b) const {
    a += other_a;
    b += other_b;
  }
};

template <int kWidth, bool kApart>
struct HeldPlace {
  static constexpr int kMaxChannels = kResidentLanes * kWidth;

  int threads;  // with data
  int thread;   // of those, negative in a steward without
  int lanes, lane, row, rows;
  int part, slice;
  int channels, channels_log2;  // of a slice, those beyond the tensor's included
  int vectors;                  // of a pixel
  int count;                    // pixels of this thread's lane in the block
  int64_t n, block;             // sample, and the block's first vector
  int first, step;              // of the thread's vectors from there
  float2* pairs;                // the unit's

  __device__ __forceinline__ HeldPlace(const InstanceNormParams& p, const HeldCut& cut) {
    threads = static_cast<int>(blockDim.x) - (kApart ? kWarp : 0);
    thread = static_cast<int>(threadIdx.x) - (kApart ? kWarp : 0);
    lanes = 1 << cut.lanes_log2;
    lane = thread & (lanes - 1);
    row = thread >> cut.lanes_log2;
    rows = threads >> cut.lanes_log2;
    part = static_cast<int>(blockIdx.y);
    slice = static_cast<int>(blockIdx.z);
    n = blockIdx.x;
    channels_log2 = cut.lanes_log2 + std::countr_zero(static_cast<unsigned>(kWidth));
    channels = 1 << channels_log2;
    vectors = static_cast<int>(p.channels) / kWidth;
    const int vector = slice * lanes + lane;
    const int begin = part * cut.share;
    count = vector < vectors ? min(cut.share, static_cast<int>(p.pixels) - begin) : 0;
    block = (n * p.pixels + begin) * vectors;
    first = row * vectors + vector;
    step = rows * vectors;
    pairs = cut.pairs + (n * gridDim.z + slice) * cut.parts * channels;
  }

  __device__ __forceinline__ bool has_data() const { return !kApart || thread >= 0; }
  __device__ __forceinline__ bool is_steward() const { return threadIdx.x < kWarp; }
  // Of the thread's u-th vector.
  __device__ __forceinline__ bool present(int u) const { return row + u * rows < count; }
  __device__ __forceinline__ int64_t index(int u) const { return block + (first + u * step); }
  __device__ __forceinline__ const uint4* at(const void* tensor, int u) const {
    return static_cast<const uint4*>(tensor) + index(u);
  }

  // Two numbers of each of a thread's channels, merged over the rows of its warp. Threads hand over half of what they
  // have at every step, so that a step costs half of the one before; in the end each has one channel. To
  // [warp][channel].
  template <typename Merge>
  __device__ __forceinline__ void merge_in_warp(float (&a)[kWidth], float (&b)[kWidth], Merge merge, float2* to) const {
    const int in_warp = thread & (kWarp - 1);
    int channel = lane * kWidth;
    int left = kWidth;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      if (left > 1) {  // known to the compiler
        left /= 2;
        const bool upper = (in_warp & offset) != 0;
        merge.step(offset);
#pragma unroll
        for (int k = 0; k < kWidth / 2; ++k) {
          if (k >= left) break;
          const float give_a = upper ? a[k] : a[k + left];
          const float give_b = upper ? b[k] : b[k + left];
          a[k] = upper ? a[k + left] : a[k];
          b[k] = upper ? b[k + left] : b[k];
          merge(a[k], b[k], __shfl_xor_sync(0xffffffffu, give_a, offset), __shfl_xor_sync(0xffffffffu, give_b, offset));
        }
        channel += upper ? left : 0;
      } else if (offset >= lanes) {
        merge.step(offset);
        merge(a[0], b[0], __shfl_xor_sync(0xffffffffu, a[0], offset), __shfl_xor_sync(0xffffffffu, b[0], offset));
      }
    }
    if ((in_warp & (kWarp / kWidth - 1) & ~(lanes - 1)) == 0) {
      to[thread / kWarp * channels + channel] = make_float2(a[0], b[0]);
    }
  }

  // Calls visit(pair, warp) with what the warps left of channel `channel`, in their order; zeros of warps that the
  // block does not have. Several are asked for at a time, without a branch.
  template <typename Visit>
  __device__ __forceinline__ void each_warp(const float2* from, int channel, Visit&& visit) const {
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int base = 0; base < kHeldChannelThreads / kWarp; base += kAtOnce) {
      float2 pair[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const float2 other = from[(base + u) * channels + channel];
        pair[u] = (base + u) * kWarp < threads ? other : make_float2(0.0f, 0.0f);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) visit(pair[u], base + u);
    }
  }

  // By all threads: the pairs of the unit's blocks, groups of threads taking parts by turns, for channel threadIdx.x %
  // channels: visit(pair, part). `lead` is part 0's, if wanted.
  template <bool kLead, typename Visit>
  __device__ __forceinline__ float2 gather(int parts, Visit&& visit) const {
    constexpr int kAtOnce = 4;
    const int groups = static_cast<int>(blockDim.x) >> channels_log2;
    const int group = static_cast<int>(threadIdx.x) >> channels_log2;
    const float2* of_channel = pairs + (static_cast<int>(threadIdx.x) - group * channels);
    Awaited lead;
    if constexpr (!kLead) lead.bits = 0;
#pragma unroll 1
    for (int base = group; base < parts; base += kAtOnce * groups) {
      Awaited part[kAtOnce];
#pragma unroll
      for (int u = 1; u < kAtOnce; ++u) {
        if (base + u * groups >= parts) part[u].bits = 0;  // nothing to ask for
      }
      bool there;
      do {
        if constexpr (kLead) lead.look(of_channel);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) part[u].look(of_channel + (base + u * groups) * channels);
        there = lead.there();
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) there = there && part[u].there();
      } while (!there);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (base + u * groups < parts) visit(part[u].first(), part[u].second(), lead.first(), base + u * groups);
      }
    }
    return make_float2(lead.first(), lead.second());
  }
  // By the steward, behind a barrier: the sum of what the threads of channel `channel` left.
  __device__ __forceinline__ float2 sum_of_groups(const float2* from, int channel) const {
    constexpr int kAtOnce = 8;
    const int groups = static_cast<int>(blockDim.x) >> channels_log2;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (int base = 0; base < groups; base += kAtOnce) {
      float2 other[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        other[u] = base + u < groups ? from[(base + u) * channels + channel] : make_float2(0.0f, 0.0f);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        sum.x += other[u].x;
        sum.y += other[u].y;
      }
    }
    return sum;
  }
};

#endif  // STYLEFORGE_HAS_CLUSTER

// Calls `go` with the dtype and the vectors that a thread has at most, on the grid and with the cut of the schedule.
template <typename Params, typename Go>
cudaError_t launch_held(const Params& params, const InstanceNormSchedule& schedule, void* workspace, const Go& go) {
  const HeldCut cut{std::countr_zero(static_cast<unsigned>(schedule.lanes)), static_cast<int>(schedule.share),
                    static_cast<int>(schedule.parts), static_cast<float2*>(workspace)};
  const auto with = [&]<typename T>() {
    const auto slices = static_cast<unsigned>(ceil_div(params.channels / kFullWidth<T>, schedule.lanes));
    const auto grid = dim3(static_cast<unsigned>(params.batch), static_cast<unsigned>(schedule.parts), slices);
    if (schedule.held <= 4) return go.template operator()<T, 4>(grid, cut);
    if (schedule.held <= 8) return go.template operator()<T, 8>(grid, cut);
    return go.template operator()<T, 16>(grid, cut);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with.template operator()<float>();
    case DType::kFloat16:
      return with.template operator()<__half>();
    case DType::kBFloat16:
      return with.template operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
