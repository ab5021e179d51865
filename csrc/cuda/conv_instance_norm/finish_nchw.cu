// What follows the convolution where the result is NCHW: as finish.cu, from the raw channels_last tensor to another
// one. 128 pixels x 128 bytes of channels at a time pass through shared memory, raw, and are normalised on the way out,
// where a lane has neighbouring pixels of a channel and the residual's beside them. The next tile is on its way
// meanwhile.
//
// The tile's accesses and its turns are those of csrc/cuda/layout/transpose.cuh.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../layout/transpose.cuh"
#include "kernels.h"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTilePixels = 128;
constexpr int kPitch = kTransposePitch;

template <typename T>
struct FinishTile {
  static constexpr int kElement = static_cast<int>(sizeof(T));
  using Run = Runs<kElement>;
  static constexpr int kWidth = 16 / kElement;
  static constexpr int kSlice = 128 / kElement;  // channels
  // In: eight lanes have a pixel's 128 bytes.
  static constexpr int kPieces = 8;
  static constexpr int kStepPixels = kThreads / kPieces;
  static constexpr int kSteps = kTilePixels / kStepPixels;
  // Out: eight lanes have neighbouring runs of a channel.
  static constexpr int kLanes = 8;
  static constexpr int kRounds = kTilePixels / (kLanes * Run::kPixels);
  static constexpr int kTurns = Run::kPixels - 1;
  static_assert(kThreads / kLanes * 4 == 128);
  using V = Vec<T, Run::kPixels>;
};

template <typename T, bool kMerge, bool kSmooth>
__global__ void __launch_bounds__(kThreads, 2)
    finish_nchw_kernel(const __grid_constant__ ConvParams c, const __grid_constant__ ConvSchedule s,
                       const __grid_constant__ InstanceNormParams p, const __grid_constant__ TransposePieces pieces,
                       int range) {
  using Tile = FinishTile<T>;
  using Run = typename Tile::Run;
  using V = typename Tile::V;
  constexpr int kSlice = Tile::kSlice;
  __shared__ alignas(16) unsigned char tile[kTilePixels * kPitch];
  __shared__ float2 sums[kThreads];
  __shared__ float2 statistics[kSlice];  // mean, rstd * weight
  __shared__ float shifts[kSlice];

  const int thread = static_cast<int>(threadIdx.x);
  const int n = blockIdx.z;
  const int first_channel = blockIdx.y * kSlice;
  const int channels = min(kSlice, static_cast<int>(p.channels) - first_channel);
  const int pixels = static_cast<int>(p.pixels);
  const int begin = blockIdx.x * range;
  const int end = min(begin + range, pixels);
  const T* input = static_cast<const T*>(c.output) + static_cast<int64_t>(n) * pixels * p.channels + first_channel;
  const int64_t plane = (n * p.channels + first_channel) * pixels;
  const T* residual = static_cast<const T*>(p.residual) + plane;
  T* output = static_cast<T*>(p.output) + plane;

  const int piece = thread % Tile::kPieces * Tile::kWidth;
  uint4 x[Tile::kSteps];
  const auto load = [&](int from) {
#pragma unroll
    for (int u = 0; u < Tile::kSteps; ++u) {
      const int pixel = from + thread / Tile::kPieces + u * Tile::kStepPixels;
      if (piece < channels && pixel < end) {
        x[u] = *reinterpret_cast<const uint4*>(input + pixel * p.channels + piece);
      }
    }
  };
  const bool has_own = thread < channels;
  if constexpr (kMerge) {
    wait_for_predecessor();
    release_successor();
    if (pieces.channels) load(begin);
    merge_tiles<kSlice, kThreads>(c, s, p, n, first_channel, norm_weight(p, n, first_channel + thread % kSlice), sums,
                                  statistics, [] { __syncthreads(); });
  } else {
    if (pieces.channels) load(begin);  // `merge` has waited for the convolution
    wait_for_predecessor();
    release_successor();
    if (has_own) statistics[thread] = __ldcg(merged(c, s, n) + first_channel + thread);
  }
  if (has_own) {
    shifts[thread] = load_param(p.bias, p.param_dtype, n * p.param_batch_stride + first_channel + thread, 0.0f);
  }

  const int word = thread / Tile::kLanes;
  const int lane = thread % Tile::kLanes;
  const int turn = Tile::kElement == 2 ? lane : lane / 2;
#pragma unroll 1
  for (int at = begin; at < end; at += kTilePixels) {
    V r[Tile::kRounds][Run::kChannels];
    if (pieces.pixels && p.residual != nullptr) {
#pragma unroll
      for (int round = 0; round < Tile::kRounds; ++round) {
        const int pixel = at + (lane + round * Tile::kLanes) * Run::kPixels;
#pragma unroll
        for (int k = 0; k < Run::kChannels; ++k) {
          const int channel = word * Run::kChannels + k;
          if (channel < channels && pixel < end) {
            r[round][k] = load_const<V>(residual + static_cast<int64_t>(channel) * pixels + pixel, 0);
          }
        }
      }
    }
    if (pieces.channels) {
#pragma unroll
      for (int u = 0; u < Tile::kSteps; ++u) {
        *reinterpret_cast<uint4*>(tile + (thread / Tile::kPieces + u * Tile::kStepPixels) * kPitch +
                                  thread % Tile::kPieces * 16) = x[u];
      }
    } else {
#pragma unroll 4
      for (int i = thread; i < kTilePixels * kSlice; i += kThreads) {
        const int channel = i % kSlice, pixel = i / kSlice;
        if (channel < channels && at + pixel < end) {
          *reinterpret_cast<T*>(tile + pixel * kPitch + channel * Tile::kElement) =
              input[(at + pixel) * p.channels + channel];
        }
      }
    }
    __syncthreads();
    if (pieces.channels && at + kTilePixels < end) load(at + kTilePixels);
    if (pieces.pixels) {
#pragma unroll
      for (int round = 0; round < Tile::kRounds; ++round) {
        const int first = (lane + round * Tile::kLanes) * Run::kPixels;
        Run own;
        own.template from_tile<Tile::kTurns>(tile + first * kPitch + word * 4, kPitch, turn);
#pragma unroll
        for (int k = 0; k < Run::kChannels; ++k) {
          const int channel = word * Run::kChannels + k;
          if (channel >= channels || at + first >= end) continue;
          const ChannelAffine<Run::kPixels, Tile::kElement == 2> affine(statistics[channel], shifts[channel]);
          *reinterpret_cast<V*>(output + static_cast<int64_t>(channel) * pixels + at + first) =
              affine.template finish<kSmooth>(p, *reinterpret_cast<const V*>(&own.run[k]), r[round][k]);
        }
      }
    } else {
#pragma unroll 4
      for (int i = thread; i < kTilePixels * channels; i += kThreads) {
        const int channel = i / kTilePixels, pixel = i % kTilePixels;
        if (at + pixel >= end) continue;
        const int64_t index = static_cast<int64_t>(channel) * pixels + at + pixel;
        const auto value = *reinterpret_cast<const Vec<T, 1>*>(tile + pixel * kPitch + channel * Tile::kElement);
        Vec<T, 1> own;
        if (p.residual != nullptr) own.data[0] = residual[index];
        const ChannelAffine<1, Tile::kElement == 2> affine(statistics[channel], shifts[channel]);
        output[index] = affine.template finish<kSmooth>(p, value, own).data[0];
      }
    }
    __syncthreads();
  }
}

template <typename T, bool kMerge>
cudaError_t launch_as(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                      const DeviceFacts& facts, cudaStream_t stream) {
  const int64_t slices = ceil_div(norm.channels, FinishTile<T>::kSlice);
  // As many blocks as are resident at the same time.
  const int64_t wanted = std::max<int64_t>(1, 2 * facts.multiprocessors / (slices * norm.batch));
  const int64_t range = std::max<int64_t>(1, ceil_div(ceil_div(norm.pixels, wanted), kTilePixels)) * kTilePixels;
  const auto grid = dim3(static_cast<unsigned>(ceil_div(norm.pixels, range)), static_cast<unsigned>(slices),
                         static_cast<unsigned>(norm.batch));
  constexpr int kWidth = FinishTile<T>::kWidth;
  const TransposePieces pieces{norm.pixels % kWidth == 0 && aligned16(norm.output) && aligned16(norm.residual),
                               norm.channels % kWidth == 0 && aligned16(params.output)};
  auto* kernel =
      is_piecewise(norm.activation) ? finish_nchw_kernel<T, kMerge, false> : finish_nchw_kernel<T, kMerge, true>;
  return launch(kernel, grid, dim3(kThreads), 0, 1, facts, stream, params, schedule, norm, pieces,
                static_cast<int>(range));
}

}  // namespace

cudaError_t launch_conv_finish_nchw(const ConvParams& params, const ConvSchedule& schedule,
                                    const InstanceNormParams& norm, bool merged, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return switch_dtype(norm.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      return merged ? launch_as<T, false>(params, schedule, norm, facts, stream)
                    : launch_as<T, true>(params, schedule, norm, facts, stream);
    }
  });
}

}  // namespace styleforge::cuda
