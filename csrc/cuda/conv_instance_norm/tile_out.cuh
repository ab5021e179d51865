// How a tile leaves the convolution: the moments of a warp's rows, and its pixels from shared memory to the tensor, raw
// or normalised.
#pragma once

#include "normalize.cuh"
#include "tiles.h"

namespace styleforge::cuda {

// Moments of kColumns / 4 columns over the rows of a warp: every step halves the columns a lane keeps and merges its
// moments with those of the lane that held the other rows (Chan, Golub, LeVeque 1983). Afterwards mean[0 .. kLeft) are
// of the columns `first` .. of the list.
template <int kList>
__device__ __forceinline__ void merge_rows(float (&mean)[kList], float (&m2)[kList], float& count, int& first) {
  const int lane = threadIdx.x % 32;
  first = 0;
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int half = kList >> (step + 1);
    const int mask = 16 >> step;
    const bool upper = (lane & mask) != 0;
    const float other = __shfl_xor_sync(0xffffffffu, count, mask);
    const float total = count + other;
    const float share = total > 0 ? other * __frcp_rn(total) : 0.0f;
#pragma unroll
    for (int i = 0; i < kList / 2; ++i) {
      if (i >= half) continue;
      const float sent_mean = upper ? mean[i] : mean[i + half];
      const float sent_m2 = upper ? m2[i] : m2[i + half];
      const float own_mean = upper ? mean[i + half] : mean[i];
      const float own_m2 = upper ? m2[i + half] : m2[i];
      const float d = __shfl_xor_sync(0xffffffffu, sent_mean, mask) - own_mean;
      mean[i] = own_mean + d * share;
      m2[i] = own_m2 + __shfl_xor_sync(0xffffffffu, sent_m2, mask) + d * d * count * share;
    }
    count = total;
    if (upper) first += half;
  }
}

// One warp's pixels of a tile on their way out: 16 bytes of neighbouring channels each.
template <typename T, int kColumns>
struct RowOut {
  static constexpr int kWidth = kFullWidth<T>;
  static constexpr int kVectors = kColumns / kWidth;
  static constexpr int kPixels = 32 / kVectors > 0 ? 32 / kVectors : 1;  // of a step
  static constexpr int kSteps = ConvSchedule::kTileWidth / kPixels;
  static constexpr int kMost = kColumns > 64 ? 4 : 2;
  static constexpr int kBatch = kSteps < kMost ? kSteps : kMost;  // steps whose residual is on its way together
  using V = Vec<T, kWidth>;
  using Affine = ChannelAffine<kWidth, sizeof(T) == 2>;

  int column;       // of the lane's vector in the tile
  int64_t at;       // of the row's first pixel in the tensor, in elements, with the vector's channel
  int pixel_pitch;  // elements between two pixels of the row
  int pixels;       // that the lane has to write

  __device__ __forceinline__ RowOut(const ConvParams& p, int n, int first_column, const ConvTileAt& tile, int row) {
    const int spread = p.phases == 1 ? 1 : 2;
    const int y = (tile.y + row) * spread + (tile.phase >> 1);
    const int x = tile.x * spread + (tile.phase & 1);
    column = static_cast<int>(threadIdx.x) % 32 % kVectors * kWidth;
    at = ((static_cast<int64_t>(n) * p.out_height + y) * p.out_width + x) * p.out_channels + first_column + column;
    pixel_pitch = spread * p.out_channels;
    pixels = row < tile.rows && first_column + column < p.out_channels ? tile.columns : 0;
  }

  static __device__ __forceinline__ int pixel(int step) {
    return step * kPixels + static_cast<int>(threadIdx.x) % 32 / kVectors;
  }
  __device__ __forceinline__ V held(const unsigned char* row, int step) const {
    return *reinterpret_cast<const V*>(row + pixel(step) * stash_pitch(kColumns, static_cast<int>(sizeof(T))) +
                                       column * static_cast<int>(sizeof(T)));
  }
  __device__ __forceinline__ int64_t index(int step) const {
    return at + static_cast<int64_t>(pixel(step)) * pixel_pitch;
  }

  __device__ __forceinline__ void write(const ConvParams& p, const unsigned char* row) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (pixel(step) < pixels) *reinterpret_cast<V*>(static_cast<T*>(p.output) + index(step)) = held(row, step);
    }
  }

  template <bool kSmooth>
  __device__ __forceinline__ void normalize(const ConvParams& p, const InstanceNormParams& norm, const Affine& affine,
                                            const unsigned char* row) const {
#pragma unroll 1
    for (int from = 0; from < kSteps; from += kBatch) {
      V residual[kBatch];
      if (norm.residual != nullptr) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (pixel(from + u) < pixels) {
            residual[u] = load_const<V>(static_cast<const T*>(norm.residual) + index(from + u), 0);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (pixel(from + u) >= pixels) continue;
        const V y = affine.template finish<kSmooth>(norm, held(row, from + u), residual[u]);
        *reinterpret_cast<V*>(static_cast<T*>(p.output) + index(from + u)) = y;
      }
    }
  }
};

}  // namespace styleforge::cuda
