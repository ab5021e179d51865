// How a tile leaves the convolution normalised where the result is NCHW: a channel's 16 pixels of a row are a run of 32
// or 64 bytes there, whole sectors where the picture's width is a multiple of 16.
//
// The tile lies in shared memory as it does for channels_last, so that all before this step is one code.
#pragma once

#include <type_traits>

#include "../layout/runs.cuh"
#include "normalize.cuh"
#include "tiles.h"

namespace styleforge::cuda {

// One warp's row of 16 pixels.
template <typename T, int kColumns>
struct RowOutNchw {
  static constexpr int kElement = static_cast<int>(sizeof(T));
  using Run = Runs<kElement>;
  static constexpr int kPixels = Run::kPixels;
  static constexpr int kRuns = ConvSchedule::kTileWidth / kPixels;  // of a row: neighbouring lanes
  static constexpr int kPitch = stash_pitch(kColumns, kElement);
  static constexpr int kWords = kColumns / Run::kChannels;  // of a pixel
  static constexpr int kStepWords = kWarp / kRuns;
  static constexpr int kSteps = kWords / kStepWords;
  static constexpr int kMost = (kColumns > 64 ? 4 : 2) / Run::kChannels;
  static constexpr int kBatch = kSteps < kMost ? kSteps : kMost;  // steps whose residual is on its way together
  // Two runs of eight pixels, or four of four, would be in the same banks: see Runs.
  static constexpr int kTurn = kPixels / kRuns;
  static constexpr int kTurns = kTurn * (kRuns - 1);
  static_assert(kElement == 2 ? kPitch / 4 % 8 == 4 : kPitch / 4 % 32 == 8, "what the turns are for");
  static_assert(kSteps % kBatch == 0);
  using V = Vec<T, kPixels>;
  using Affine = ChannelAffine<kPixels, kElement == 2>;

  int64_t at;    // of the row's first pixel in channel first_column of the tensor, in elements
  int64_t area;  // elements between two channels
  int pixels;    // of the row
  int columns;   // that the tensor has

  __device__ __forceinline__ RowOutNchw(const ConvParams& p, int n, int first_column, const ConvTileAt& tile, int row) {
    area = static_cast<int64_t>(p.out_height) * p.out_width;
    at = (static_cast<int64_t>(n) * p.out_channels + first_column) * area +
         static_cast<int64_t>(tile.y + row) * p.out_width + tile.x;
    pixels = row < tile.rows ? tile.columns : 0;
    columns = min(kColumns, p.out_channels - first_column);
  }

  // The lane's number, read anew: what follows from it shall not wait in registers since the kernel began.
  static __device__ __forceinline__ int fresh_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  // Where runs of pixels are 16-byte pieces of the tensor. kSmooth: the activation may be of any kind.
  template <bool kSmooth>
  __device__ __forceinline__ void write_runs(const InstanceNormParams& norm, const float2* statistics,
                                             const float* shifts, const unsigned char* row) const {
    const int lane = fresh_lane();
    const int run = lane % kRuns;
    const bool valid = run * kPixels < pixels;
    const auto channel = [&](int step, int k) { return (step * kStepWords + lane / kRuns) * Run::kChannels + k; };
    const auto index = [&](int step, int k) { return at + channel(step, k) * area + run * kPixels; };
#pragma unroll 1
    for (int from = 0; from < kSteps; from += kBatch) {
      V residual[kBatch][Run::kChannels];
      if (norm.residual != nullptr) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
#pragma unroll
          for (int k = 0; k < Run::kChannels; ++k) {
            if (valid && channel(from + u, k) < columns) {
              residual[u][k] = load_const<V>(static_cast<const T*>(norm.residual) + index(from + u, k), 0);
            }
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Run own;
        own.template from_tile<kTurns>(row + run * kPixels * kPitch + channel(from + u, 0) * kElement, kPitch,
                                       run * kTurn);
#pragma unroll
        for (int k = 0; k < Run::kChannels; ++k) {
          const int c = channel(from + u, k);
          if (!valid || c >= columns) continue;
          const Affine affine(statistics[c], shifts[c]);
          const V y = affine.template finish<kSmooth>(norm, *reinterpret_cast<const V*>(&own.run[k]), residual[u][k]);
          *reinterpret_cast<V*>(static_cast<T*>(norm.output) + index(from + u, k)) = y;
        }
      }
    }
  }

  // Raw, to the tensor and back, for who need not hurry (gate.h): a lane has one pixel, and every second channel.
  __device__ __forceinline__ void write(T* output, const unsigned char* row) const {
    for_each([&](int64_t index, int offset) { output[index] = *reinterpret_cast<const T*>(row + offset); });
  }
  // What another block wrote.
  __device__ __forceinline__ void read(const T* output, unsigned char* row) const {
    using Bits = std::conditional_t<kElement == 2, unsigned short, unsigned>;
    for_each([&](int64_t index, int offset) {
      *reinterpret_cast<Bits*>(row + offset) = __ldcg(reinterpret_cast<const Bits*>(output) + index);
    });
  }
  template <typename Body>
  __device__ __forceinline__ void for_each(Body&& body) const {
    const int lane = fresh_lane();
    const int x = lane % ConvSchedule::kTileWidth;
    if (x >= pixels) return;
#pragma unroll 4
    for (int c = lane / ConvSchedule::kTileWidth; c < columns; c += 2) {
      body(at + c * area + x, x * kPitch + c * kElement);
    }
  }

  // Where they are not: a lane has one pixel, and every second channel.
  __device__ __forceinline__ void write_elements(const InstanceNormParams& norm, const float2* statistics,
                                                 const float* shifts, const unsigned char* row) const {
    using One = Vec<T, 1>;
    constexpr int kGroup = 4;  // residuals on their way together
    const int lane = fresh_lane();
    const int x = lane % ConvSchedule::kTileWidth;
    const int first = lane / ConvSchedule::kTileWidth;
    if (x >= pixels) return;
#pragma unroll 1
    for (int from = first; from < columns; from += 2 * kGroup) {
      One residual[kGroup];
      if (norm.residual != nullptr) {
#pragma unroll
        for (int u = 0; u < kGroup; ++u) {
          const int c = from + 2 * u;
          if (c < columns) residual[u].data[0] = static_cast<const T*>(norm.residual)[at + c * area + x];
        }
      }
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        const int c = from + 2 * u;
        if (c >= columns) continue;
        const One value = *reinterpret_cast<const One*>(row + x * kPitch + c * kElement);
        const ChannelAffine<1, kElement == 2> affine(statistics[c], shifts[c]);
        static_cast<T*>(norm.output)[at + c * area + x] =
            affine.template finish<true>(norm, value, residual[u]).data[0];
      }
    }
  }
};

}  // namespace styleforge::cuda
