// channels_last with 2 or 3 channels (pictures): a pixel is no whole vector. But vectors of 16 bytes are taken in turn
// by a multiple of the channels of threads, so that element k of all vectors of a thread has the same channel:
//
//   C = 3, float:  | r g b r | g b r g | b r g b |    `phase`: the channel of a thread's element 0
//
// Two launches, as in split_nchw.cu: tiles of a sample, then merge and normalise; the second has its tile in registers
// before it waits for the first.
//
// Measured (H200) against threads that took whole groups of `channels` vectors, whose loads of 16 bytes lie 48 apart
// and whose code is three times as long: 1x3x512x512 in half 5.4 -> 4.7 us, in float 6.7 -> 5.6; 1x3x256x256 in
// half 4.2 -> 3.5. Blocks must all run at once: with two for each multiprocessor 6.3 where one takes 4.7. Tried and no
// better: one launch whose blocks exchange their moments as in held_channels.cu, 5.9 in half and 6.7 in float.
#include "../common/awaited_param.cuh"
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
constexpr int kPartsHeld = 8;  // that a lane has on their way at a time

// A thread's vectors of a tile.
template <typename T, int kChannels, int kEach>
struct FewTile {
  static constexpr int kWidth = kFullWidth<T>;
  static constexpr int kShare = kEach * kThreads;
  using V = Vec<T, kWidth>;
  int64_t n, first;  // the sample; the thread's first vector
  int part, own;     // vectors of the tile
  int phase;
  uint4 x[kEach];

  __device__ __forceinline__ FewTile(const InstanceNormParams& p, unsigned block, int parts) {
    const unsigned sample = block / static_cast<unsigned>(parts);
    n = sample;
    part = static_cast<int>(block - sample * parts);
    const int vectors = static_cast<int>(p.pixels / kWidth) * kChannels;
    own = min(vectors - part * kShare, kShare);
    first = n * vectors + part * kShare + static_cast<int>(threadIdx.x);
    phase = kWidth % kChannels == 0 ? 0 : static_cast<int>(threadIdx.x) * (kWidth % kChannels) % kChannels;
  }
  __device__ __forceinline__ bool present(int u) const { return static_cast<int>(threadIdx.x) + u * kThreads < own; }
  __device__ __forceinline__ int64_t at(int u) const { return first + u * kThreads; }
  __device__ __forceinline__ void load(const void* from) {
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      x[u] = make_uint4(0, 0, 0, 0);
      if (present(u)) x[u] = __ldg(reinterpret_cast<const uint4*>(from) + at(u));
    }
  }
  __device__ __forceinline__ float element(int u, int k) const {
    return to_acc(reinterpret_cast<const V*>(&x[u])->data[k]);
  }
  // Channel of element `k`, and the first element that has channel `c`.
  __device__ __forceinline__ int channel_of(int k) const {
    const int c = phase + k;
    return c >= kChannels ? c - kChannels : c;
  }
  __device__ __forceinline__ int element_of(int c) const { return c >= phase ? c - phase : c - phase + kChannels; }
};

// v[i], by comparisons.
template <int kChannels>
__device__ __forceinline__ float pick(const float (&v)[kChannels], int i) {
  float chosen = v[0];
#pragma unroll
  for (int c = 1; c < kChannels; ++c) chosen = i == c ? v[c] : chosen;
  return chosen;
}

template <typename T, int kChannels, int kEach>
__global__ void __launch_bounds__(kThreads)
    few_moments_kernel(const __grid_constant__ InstanceNormParams p, int parts, Part<float>* partials) {
  using Tile = FewTile<T, kChannels, kEach>;
  constexpr int kWidth = Tile::kWidth;
  // A warp's elements of a channel, packed.
  constexpr int kBits = kChannels == 2 ? 16 : 10, kMask = (1 << kBits) - 1;
  static_assert(kEach * kWarp * ((kWidth + kChannels - 1) / kChannels) <= kMask);
  __shared__ Moments<float> of_warp[kChannels][kWarps];
  Tile tile(p, blockIdx.x, parts);
  wait_for_predecessor();
  release_successor();
  tile.load(p.input);
  float sum[kChannels] = {}, mean[kChannels], count[kChannels];
  int number = 0;
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    number += tile.present(u) ? 1 : 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k % kChannels] += tile.element(u, k);
  }
  int packed = 0;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    packed += number * ((kWidth - tile.element_of(c) + kChannels - 1) / kChannels) << (kBits * c);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) packed += __shfl_xor_sync(0xffffffffu, packed, offset);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    count[c] = static_cast<float>(packed >> (kBits * c) & kMask);
    mean[c] = warp_sum(pick(sum, tile.element_of(c))) / fmaxf(count[c], 1.0f);
  }
  float m2[kChannels] = {};
#pragma unroll
  for (int j = 0; j < kChannels; ++j) sum[j] = pick(mean, tile.channel_of(j));
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    if (!tile.present(u)) continue;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float d = tile.element(u, k) - sum[k % kChannels];
      m2[k % kChannels] += d * d;
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float whole = warp_sum(pick(m2, tile.element_of(c)));
    if (lane == 0) of_warp[c][warp] = {count[c], mean[c], whole};
  }
  __syncthreads();
  if (warp >= kChannels) return;
  Moments<float> part;
  if (lane < kWarps) part = of_warp[warp][lane];
  const auto whole = merge_lanes(static_cast<float>(tile.own * kWidth / kChannels), part);
  if (lane == 0) store_part(partials + (tile.n * kChannels + warp) * parts + tile.part, whole.mean, whole.m2);
}

template <int kChannels>
struct FewAffine {
  float mean[kChannels], scale[kChannels], shift[kChannels];
  __device__ __forceinline__ float operator()(float x, int k) const {
    return (x - mean[k % kChannels]) * scale[k % kChannels] + shift[k % kChannels];
  }
};

// One warp: the moments of a channel from its tiles' parts.
__device__ __forceinline__ Moments<float> merge_parts(const Part<float>* own, int parts, int pixels, int share) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Moments<float> whole;
  for (int from = 0; from < parts; from += kPartsHeld * kWarp) {
    Moments<float> part[kPartsHeld];
    float count = 0;
#pragma unroll
    for (int u = 0; u < kPartsHeld; ++u) {
      const int j = from + u * kWarp + lane;
      if (j >= parts) continue;
      const auto both = load_part(own + j);
      part[u] = {static_cast<float>(min(share, pixels - j * share)), both.mean, both.m2};
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

template <typename T, int kChannels, int kEach>
__global__ void __launch_bounds__(kThreads)
    few_apply_kernel(const __grid_constant__ InstanceNormParams p, int parts, const Part<float>* partials) {
  using Tile = FewTile<T, kChannels, kEach>;
  using V = typename Tile::V;
  __shared__ float facts[3][kChannels];
  Tile tile(p, gridDim.x - 1 - blockIdx.x, parts);
  tile.load(p.input);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  AwaitedParam<float> weight, bias;
  if (warp < kChannels) {
    const int64_t param = tile.n * p.param_batch_stride + warp;
    weight = {p.weight, p.param_dtype, param};
    bias = {p.bias, p.param_dtype, param};
  }
  wait_for_predecessor();
  release_successor();
  if (warp < kChannels) {
    const int64_t plane = tile.n * kChannels + warp;
    const auto whole = merge_parts(partials + plane * parts, parts, static_cast<int>(p.pixels),
                                   Tile::kShare / kChannels * Tile::kWidth);
    if (threadIdx.x % kWarp == 0) {
      const float rstd = whole.rstd(p.eps);
      facts[0][warp] = whole.mean;
      facts[1][warp] = rstd * weight.value(1.0f);
      facts[2][warp] = bias.value(0.0f);
      if (tile.part == 0) store_statistics(p, plane, whole.mean, rstd);
    }
  }
  __syncthreads();
  FewAffine<kChannels> affine;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    const int c = tile.channel_of(j);
    affine.mean[j] = facts[0][c];
    affine.scale[j] = facts[1][c];
    affine.shift[j] = facts[2][c];
  }
  switch_finish(p, [&]<Finish kFinish>() {
    uint4 r[kEach] = {};
    if (has_residual<kFinish>(p)) {
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        if (tile.present(u)) r[u] = __ldg(reinterpret_cast<const uint4*>(p.residual) + tile.at(u));
      }
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (!tile.present(u)) continue;
      store(p.output, tile.at(u),
            normalize<kFinish>(p, affine, *reinterpret_cast<const V*>(&tile.x[u]), *reinterpret_cast<const V*>(&r[u])));
    }
  });
}

template <typename T, int kChannels, int kEach>
cudaError_t launch_few(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                       const DeviceFacts& facts, cudaStream_t stream) {
  const auto grid = dim3(static_cast<unsigned>(params.batch * schedule.parts));
  const int parts = static_cast<int>(schedule.parts);
  auto* partials = static_cast<Part<float>*>(workspace);
  if (const auto error = launch(few_moments_kernel<T, kChannels, kEach>, grid, dim3(kThreads), 0, 1, facts, stream,
                                params, parts, partials))
    return error;
  return launch(few_apply_kernel<T, kChannels, kEach>, grid, dim3(kThreads), 0, 1, facts, stream, params, parts,
                partials);
}

template <typename T, int kChannels>
cudaError_t launch_few(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                       const DeviceFacts& facts, cudaStream_t stream) {
  switch (schedule.held) {
    case 1:
      return launch_few<T, kChannels, 1>(params, schedule, workspace, facts, stream);
    case 2:
      return launch_few<T, kChannels, 2>(params, schedule, workspace, facts, stream);
    default:
      return launch_few<T, kChannels, kFewVectors>(params, schedule, workspace, facts, stream);
  }
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
