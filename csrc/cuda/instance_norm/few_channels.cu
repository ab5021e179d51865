// channels_last with 2 or 3 channels (pictures): a pixel is no whole vector, but kWidth pixels of C channels are C
// whole vectors, of which every element's channel is known when this is compiled. So a thread takes such groups, and
// has the moments of all channels in its registers.
//
//   C = 3, float:  | r g b r | g b r g | b r g b |    a group: 3 vectors, 4 pixels
//
// Two launches, as in split_nchw.cu: tiles of a sample, then merge and normalise; the second has its tile in registers
// before it waits for the first.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "kernels.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "parts.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = kFewThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = kFewGroups;
constexpr int kPartsHeld = 8;  // that a lane has on their way at a time

// A thread's groups of a tile.
template <typename T, int kChannels>
struct GroupTile {
  static constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  int64_t n, first;  // the sample; the thread's first vector
  int part, present;
  uint4 x[kGroups][kChannels];

  __device__ __forceinline__ GroupTile(const InstanceNormParams& p, unsigned block, int parts, int share) {
    const unsigned sample = block / static_cast<unsigned>(parts);
    n = sample;
    part = static_cast<int>(block - sample * parts);
    const int groups = static_cast<int>(p.pixels / kWidth);
    const int begin = part * share + static_cast<int>(threadIdx.x);
    const int end = min((part + 1) * share, groups);
    first = (static_cast<int64_t>(n) * groups + begin) * kChannels;
    present = 0;
#pragma unroll
    for (int u = 0; u < kGroups; ++u) present += begin + u * kThreads < end;
  }
  __device__ __forceinline__ int64_t at(int u, int v) const { return first + u * kThreads * kChannels + v; }
  __device__ __forceinline__ void load(const void* from) {
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      if (u >= present) continue;
#pragma unroll
      for (int v = 0; v < kChannels; ++v) x[u][v] = __ldg(reinterpret_cast<const uint4*>(from) + at(u, v));
    }
  }
  __device__ __forceinline__ float element(int u, int e) const {
    return to_acc(reinterpret_cast<const V*>(&x[u][e / kWidth])->data[e % kWidth]);
  }
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads)
    few_moments_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, Part<float>* partials) {
  constexpr int kWidth = kFullWidth<T>;
  __shared__ Moments<float> of_warp[kChannels][kWarps];
  GroupTile<T, kChannels> tile(p, blockIdx.x, parts, share);
  wait_for_predecessor();
  release_successor();
  tile.load(p.input);
  float sum[kChannels] = {}, m2[kChannels] = {}, mean[kChannels];
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    if (u >= tile.present) continue;
#pragma unroll
    for (int e = 0; e < kWidth * kChannels; ++e) sum[e % kChannels] += tile.element(u, e);
  }
  const float own = static_cast<float>(tile.present * kWidth);
  const float inverse = tile.present > 0 ? reciprocal(own) : 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) mean[c] = sum[c] * inverse;
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    if (u >= tile.present) continue;
#pragma unroll
    for (int e = 0; e < kWidth * kChannels; ++e) {
      const float d = tile.element(u, e) - mean[e % kChannels];
      m2[e % kChannels] += d * d;
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float total = warp_sum(own);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const auto merged = merge_lanes(total, Moments<float>{own, mean[c], m2[c]});
    if (lane == 0) of_warp[c][warp] = merged;
  }
  __syncthreads();
  if (warp >= kChannels) return;
  Moments<float> part;
  if (lane < kWarps) part = of_warp[warp][lane];
  const auto whole = merge_lanes(warp_sum(part.count), part);
  if (lane == 0) store_part(partials + (tile.n * kChannels + warp) * parts + tile.part, whole.mean, whole.m2);
}

// Element k of vector v of a group.
template <int kChannels, int kWidth>
struct GroupAffine {
  float mean[kChannels], scale[kChannels], shift[kChannels];
  int v;
  __device__ __forceinline__ float operator()(float x, int k) const {
    const int c = (v * kWidth + k) % kChannels;
    return (x - mean[c]) * scale[c] + shift[c];
  }
};

// One warp: the moments of a channel from its tiles' parts.
template <int kWidth>
__device__ __forceinline__ Moments<float> merge_parts(const InstanceNormParams& p, const Part<float>* own, int parts,
                                                      int share) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int groups = static_cast<int>(p.pixels / kWidth);
  Moments<float> whole;
  for (int from = 0; from < parts; from += kPartsHeld * kWarp) {
    Moments<float> part[kPartsHeld];
    float count = 0;
#pragma unroll
    for (int u = 0; u < kPartsHeld; ++u) {
      const int j = from + u * kWarp + lane;
      if (j >= parts) continue;
      const auto both = load_part(own + j);
      part[u] = {static_cast<float>(min(share, groups - j * share) * kWidth), both.mean, both.m2};
      count += part[u].count;
    }
    whole.add(merge_moments(
        warp_sum(count),
        [&](auto visit) {
#pragma unroll
          for (int u = 0; u < kPartsHeld; ++u) visit(part[u]);
        },
        [](float v) { return warp_sum(v); }));
  }
  return whole;
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads)
    few_apply_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, const Part<float>* partials) {
  constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  __shared__ float facts[3][kChannels];
  GroupTile<T, kChannels> tile(p, gridDim.x - 1 - blockIdx.x, parts, share);
  tile.load(p.input);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float weight = 1, bias = 0;
  if (warp < kChannels) {
    const int64_t param = tile.n * p.param_batch_stride + warp;
    weight = load_param(p.weight, p.param_dtype, param, 1.0f);
    bias = load_param(p.bias, p.param_dtype, param, 0.0f);
  }
  wait_for_predecessor();
  release_successor();
  if (warp < kChannels) {
    const int64_t plane = tile.n * kChannels + warp;
    const auto whole = merge_parts<kWidth>(p, partials + plane * parts, parts, share);
    if (threadIdx.x % kWarp == 0) {
      const float rstd = whole.rstd(p.eps);
      facts[0][warp] = whole.mean;
      facts[1][warp] = rstd * weight;
      facts[2][warp] = bias;
      if (tile.part == 0) store_statistics(p, plane, whole.mean, rstd);
    }
  }
  __syncthreads();
  GroupAffine<kChannels, kWidth> affine;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    affine.mean[c] = facts[0][c];
    affine.scale[c] = facts[1][c];
    affine.shift[c] = facts[2][c];
  }
  switch_finish(p, [&]<Finish kFinish>() {
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      if (u >= tile.present) continue;
      uint4 r[kChannels] = {};
      if (has_residual<kFinish>(p)) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) r[v] = __ldg(reinterpret_cast<const uint4*>(p.residual) + tile.at(u, v));
      }
#pragma unroll
      for (int v = 0; v < kChannels; ++v) {
        affine.v = v;
        store(p.output, tile.at(u, v),
              normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&tile.x[u][v]),
                                 *reinterpret_cast<const V*>(&r[v])));
      }
    }
  });
}

template <typename T, int kChannels>
cudaError_t launch_few(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                       const DeviceFacts& facts, cudaStream_t stream) {
  const auto grid = dim3(static_cast<unsigned>(params.batch * schedule.parts));
  const int parts = static_cast<int>(schedule.parts);
  const int share = static_cast<int>(schedule.share);
  auto* partials = static_cast<Part<float>*>(workspace);
  if (const auto error = launch(few_moments_kernel<T, kChannels>, grid, dim3(kThreads), 0, 1, facts, stream, params,
                                parts, share, partials))
    return error;
  return launch(few_apply_kernel<T, kChannels>, grid, dim3(kThreads), 0, 1, facts, stream, params, parts, share,
                partials);
}

}  // namespace

cudaError_t launch_few_channels(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                                cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return switch_dtype(params.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) <= 4) {
      switch (params.channels) {
        case 2:
          return launch_few<T, 2>(params, schedule, workspace, facts, stream);
        case 3:
          return launch_few<T, 3>(params, schedule, workspace, facts, stream);
        default:
          break;
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace styleforge::cuda
