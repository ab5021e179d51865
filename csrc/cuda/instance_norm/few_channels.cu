// channels_last with 2, 3 or 4 channels (pictures): a pixel is no whole vector, but a row of threads takes vectors one
// after the other, and where the step from one of a thread's vectors to its next is a multiple of C vectors, element k
// of all of them has the same channel: (k + shift) % C, with a shift that only depends on the thread.
//
//   C = 3, float:  | r g b r | g b r g | b r g b | r g b r | ...      shift 0, 1, 2, 0, ...
//
// So a thread has the moments of "its" channels k % C in registers, and rotates them when it meets the others.
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
constexpr int kHeld = kFewVectors;
constexpr int kPartsHeld = 8;  // that a lane has on their way at a time

// A thread's vectors of a tile.
template <typename T, int kChannels>
struct FewTile {
  static constexpr int kWidth = kFullWidth<T>;
  static_assert(kThreads % kChannels == 0);
  using V = Vec<T, kWidth>;
  int64_t n, first;  // the sample; the thread's first vector
  int part, present, shift;
  uint4 x[kHeld];

  // `share` is a multiple of kThreads, or a whole sample.
  __device__ __forceinline__ FewTile(const InstanceNormParams& p, unsigned block, int parts, int share) {
    const unsigned sample = block / static_cast<unsigned>(parts);
    n = sample;
    part = static_cast<int>(block - sample * parts);
    const int vectors = static_cast<int>(p.pixels) / kWidth * kChannels;
    const int begin = part * share + static_cast<int>(threadIdx.x);
    const int end = min((part + 1) * share, vectors);
    first = static_cast<int64_t>(n) * vectors + begin;
    shift = static_cast<int>(threadIdx.x) * kWidth % kChannels;
    present = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) present += begin + u * kThreads < end;
  }
  __device__ __forceinline__ int64_t at(int u) const { return first + u * kThreads; }
  __device__ __forceinline__ void load(const void* from) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u < present) x[u] = __ldg(reinterpret_cast<const uint4*>(from) + at(u));
    }
  }
  __device__ __forceinline__ const V& vector(int u) const { return *reinterpret_cast<const V*>(&x[u]); }
  // What the thread has at `own`, by channel, or the other way round.
  __device__ __forceinline__ float by_channel(const float (&own)[kChannels], int channel) const {
    return pick(own, channel - shift);
  }
  __device__ __forceinline__ float by_element(const float (&facts)[kChannels], int k) const {
    return pick(facts, k + shift);
  }

 private:
  static __device__ __forceinline__ float pick(const float (&from)[kChannels], int i) {
    i = i < 0 ? i + kChannels : i >= kChannels ? i - kChannels : i;
    float v = from[0];
#pragma unroll
    for (int c = 1; c < kChannels; ++c) v = i == c ? from[c] : v;
    return v;
  }
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads)
    few_moments_kernel(const __grid_constant__ InstanceNormParams p, int parts, int share, Part<float>* partials) {
  constexpr int kWidth = kFullWidth<T>;
  __shared__ Moments<float> of_warp[kChannels][kWarps];
  FewTile<T, kChannels> tile(p, blockIdx.x, parts, share);
  wait_for_predecessor();
  release_successor();
  tile.load(p.input);
  float sum[kChannels] = {}, m2[kChannels] = {}, mean[kChannels], count[kChannels];
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (u >= tile.present) continue;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k % kChannels] += to_acc(tile.vector(u).data[k]);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    count[c] = static_cast<float>(tile.present * (kWidth / kChannels + (c < kWidth % kChannels ? 1 : 0)));
    mean[c] = sum[c] / max(count[c], 1.0f);
  }
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    if (u >= tile.present) continue;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float d = to_acc(tile.vector(u).data[k]) - mean[k % kChannels];
      m2[k % kChannels] += d * d;
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const Moments<float> own{tile.by_channel(count, c), tile.by_channel(mean, c), tile.by_channel(m2, c)};
    const auto merged = merge_lanes(warp_sum(own.count), own);
    if (lane == 0) of_warp[c][warp] = merged;
  }
  __syncthreads();
  if (warp >= kChannels) return;
  Moments<float> part;
  if (lane < kWarps) part = of_warp[warp][lane];
  const auto whole = merge_lanes(warp_sum(part.count), part);
  if (lane == 0) store_part(partials + (tile.n * kChannels + warp) * parts + tile.part, whole.mean, whole.m2);
}

// Element k of a thread's vectors.
template <int kChannels>
struct FewAffine {
  float mean[kChannels], scale[kChannels], shift[kChannels];
  __device__ __forceinline__ float operator()(float x, int k) const {
    return (x - mean[k % kChannels]) * scale[k % kChannels] + shift[k % kChannels];
  }
};

// One warp: the moments of a channel from its tiles' parts.
template <int kWidth, int kChannels>
__device__ __forceinline__ Moments<float> merge_parts(const InstanceNormParams& p, const Part<float>* own, int parts,
                                                      int share, int channel) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int vectors = static_cast<int>(p.pixels) / kWidth * kChannels;
  Moments<float> whole;
  for (int from = 0; from < parts; from += kPartsHeld * kWarp) {
    Moments<float> part[kPartsHeld];
    float count = 0;
#pragma unroll
    for (int u = 0; u < kPartsHeld; ++u) {
      const int j = from + u * kWarp + lane;
      if (j >= parts) continue;
      const auto both = load_part(own + j);
      const int first = j * share * kWidth;  // elements before the tile, and before its end
      const int last = min((j + 1) * share, vectors) * kWidth;
      const int pixels = (last - channel + kChannels - 1) / kChannels - (first - channel + kChannels - 1) / kChannels;
      part[u] = {static_cast<float>(pixels), both.mean, both.m2};
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
  FewTile<T, kChannels> tile(p, gridDim.x - 1 - blockIdx.x, parts, share);
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
    const auto whole = merge_parts<kWidth, kChannels>(p, partials + plane * parts, parts, share, warp);
    if (threadIdx.x % kWarp == 0) {
      const float rstd = whole.rstd(p.eps);
      facts[0][warp] = whole.mean;
      facts[1][warp] = rstd * weight;
      facts[2][warp] = bias;
      if (tile.part == 0) store_statistics(p, plane, whole.mean, rstd);
    }
  }
  __syncthreads();
  float known[3][kChannels];
#pragma unroll
  for (int i = 0; i < 3 * kChannels; ++i) known[i / kChannels][i % kChannels] = facts[i / kChannels][i % kChannels];
  FewAffine<kChannels> affine;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    affine.mean[k] = tile.by_element(known[0], k);
    affine.scale[k] = tile.by_element(known[1], k);
    affine.shift[k] = tile.by_element(known[2], k);
  }
  switch_finish(p, [&]<Finish kFinish>() {
    uint4 r[kHeld];
    if (has_residual<kFinish>(p)) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        if (u < tile.present) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + tile.at(u));
      }
    }
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u >= tile.present) continue;
      store(p.output, tile.at(u),
            normalize<kFinish>(p, affine, tile.vector(u), *reinterpret_cast<const V*>(&r[u])));
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
        case 4:
          return launch_few<T, 4>(params, schedule, workspace, facts, stream);
        default:
          break;
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace styleforge::cuda
