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

// Moments of a tile's channels, from the tile in shared memory: a thread has a word of channels, and neighbouring rows
// or half of one. Each takes its sums about the mean of its first row, so that little cancels.
//
// From the accumulators, with exchanges between a warp's lanes that halve what each has to do (merge_rows), 128
// channels of 16 bits took 2.2 us instead of 1.5; with loops over eight pixels instead of sixteen it is 1.8.
template <typename T, int kColumns, int kRows>
struct TileMoments {
  static constexpr int kWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int kWords = kColumns / kWord;
  static constexpr int kTeams = kRows * kWarp / kWords;
  static constexpr int kAcross = kTeams > kRows ? kTeams / kRows : 1;  // teams that share a row, in one warp
  static constexpr int kParts = kTeams / kAcross;
  static constexpr int kPartRows = kRows / kParts;
  static constexpr int kPixels = ConvSchedule::kTileWidth / kAcross;
  static constexpr int kPitch = stash_pitch(kColumns, static_cast<int>(sizeof(T)));
  static_assert(kAcross == 1 || (kAcross == 2 && 2 * kWords == kWarp));

  // By all kRows * kWarp threads; `parts` takes kParts lists of kColumns.
  static __device__ __forceinline__ void write_parts(const unsigned char* tile, const ConvTileAt& at, float2* parts) {
    const int word = static_cast<int>(threadIdx.x) % kWords;
    const int team = static_cast<int>(threadIdx.x) / kWords;
    const int part = team / kAcross;
    const int first = team % kAcross * kPixels;
    const int rows = min(at.rows - part * kPartRows, kPartRows);
    const int columns = at.columns - first;  // valid ones of the kPixels, if not more
    const unsigned char* from = tile + (part * kPartRows * ConvSchedule::kTileWidth + first) * kPitch +
                                word * static_cast<int>(sizeof(uint32_t));
    Vec<T, kWord> row[kPixels];
    const auto load_row = [&](int r) {
#pragma unroll
      for (int x = 0; x < kPixels; ++x) {
        row[x] = *reinterpret_cast<const Vec<T, kWord>*>(from + (r * ConvSchedule::kTileWidth + x) * kPitch);
      }
    };
    load_row(0);
    float pilot[kWord] = {}, sum[kWord] = {}, squares[kWord] = {};
#pragma unroll
    for (int x = 0; x < kPixels; ++x) {
#pragma unroll
      for (int k = 0; k < kWord; ++k) pilot[k] += x < columns ? to_acc(row[x].data[k]) : 0.0f;
    }
    const float first_share = __frcp_rn(static_cast<float>(at.columns));
#pragma unroll
    for (int k = 0; k < kWord; ++k) pilot[k] = across(pilot[k]) * first_share;
#pragma unroll 1
    for (int r = 0; r < rows;) {
#pragma unroll
      for (int x = 0; x < kPixels; ++x) {
#pragma unroll
        for (int k = 0; k < kWord; ++k) {
          const float d = x < columns ? to_acc(row[x].data[k]) - pilot[k] : 0.0f;
          sum[k] += d;
          squares[k] += d * d;
        }
      }
      ++r;
      if (kPartRows > 1 && r < rows) load_row(r);
    }
    const float share = __frcp_rn(static_cast<float>(max(rows, 1) * at.columns));
#pragma unroll
    for (int k = 0; k < kWord; ++k) {
      sum[k] = across(sum[k]);
      squares[k] = across(squares[k]);
      const float shift = sum[k] * share;
      if (first == 0) {
        parts[part * kColumns + word * kWord + k] =
            make_float2(pilot[k] + shift, fmaxf(squares[k] - sum[k] * shift, 0.0f));
      }
    }
  }

  // Of one channel, whose part of the first list `parts` points at.
  static __device__ __forceinline__ float2 merge(const float2* parts, const ConvTileAt& at) {
    float2 part[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) part[i] = parts[i * kColumns];
    const float pixels = static_cast<float>(kPartRows * at.columns);
    if (at.rows == kRows) {  // in pairs: short, and without a division
#pragma unroll
      for (int width = 1; width < kParts; width *= 2) {
#pragma unroll
        for (int i = 0; i < kParts; i += 2 * width) {
          const float d = part[i + width].x - part[i].x;
          part[i].x += 0.5f * d;
          part[i].y += part[i + width].y + d * d * (0.5f * static_cast<float>(width) * pixels);
        }
      }
      return part[0];
    }
    float2 whole = part[0];
    int before = min(at.rows, kPartRows);
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      const int rows = min(at.rows - i * kPartRows, kPartRows);
      if (rows <= 0) continue;
      const float d = part[i].x - whole.x;
      const float share = static_cast<float>(rows) * __frcp_rn(static_cast<float>(before + rows));
      whole.x += d * share;
      whole.y += part[i].y + d * d * (static_cast<float>(before * at.columns) * share);
      before += rows;
    }
    return whole;
  }

 private:
  static __device__ __forceinline__ float across(float v) {
    return kAcross == 1 ? v : v + __shfl_xor_sync(0xffffffffu, v, kWords);
  }
};

// Two numbers of 16 bits, the first in the lower half: relu and rounding are one instruction. NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t rounded_relu(float first, float second) {
  uint32_t pair = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
#endif
  return pair;
}

// One warp's pixels of a tile on their way out: 16 bytes of neighbouring channels each.
template <typename T, int kColumns>
struct RowOut {
  static constexpr int kWidth = kFullWidth<T>;
  static constexpr int kVectors = kColumns / kWidth;
  static constexpr int kPixels = 32 / kVectors > 0 ? 32 / kVectors : 1;  // of a step
  static constexpr int kSteps = ConvSchedule::kTileWidth / kPixels;
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

  // The other way round, what another block wrote.
  __device__ __forceinline__ void read(const ConvParams& p, unsigned char* row) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (pixel(step) >= pixels) continue;
      const auto from = static_cast<const T*>(p.output) + index(step);
      *reinterpret_cast<uint4*>(row + pixel(step) * stash_pitch(kColumns, static_cast<int>(sizeof(T))) +
                                column * static_cast<int>(sizeof(T))) = __ldcg(reinterpret_cast<const uint4*>(from));
    }
  }

  // The same as normalize, of a full tile of 16 bits with relu and without a residual: the rounding does the relu, and
  // there is nothing to ask in between.
  __device__ __forceinline__ void normalize_relu(const ConvParams& p, const Affine& affine,
                                                 const unsigned char* row) const {
    T* to = static_cast<T*>(p.output) + index(0);
    const int pitch = kPixels * pixel_pitch;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const V x = held(row, step);
      uint32_t y[kWidth / 2];
#pragma unroll
      for (int k = 0; k < kWidth / 2; ++k) {
        y[k] = rounded_relu<T>(affine.apply(2 * k, to_acc(x.data[2 * k])),
                               affine.apply(2 * k + 1, to_acc(x.data[2 * k + 1])));
      }
      // The compiler would store some of them word by word.
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3])
                   : "memory");
      to += pitch;
    }
  }

  // kSmooth: the activations with transcendental functions, one vector at a time: they are long code.
  template <bool kSmooth>
  __device__ __forceinline__ void normalize(const ConvParams& p, const InstanceNormParams& norm, const Affine& affine,
                                            const unsigned char* row) const {
    constexpr int kTogether = kSmooth ? 1 : kSteps < 4 ? kSteps : 4;
#pragma unroll 1
    for (int from = 0; from < kSteps; from += kTogether) {
      normalize_steps<kTogether, kSmooth>(p, norm, affine, row, from);
    }
  }

 private:
  template <int kCount, bool kSmooth>
  __device__ __forceinline__ void normalize_steps(const ConvParams& p, const InstanceNormParams& norm,
                                                  const Affine& affine, const unsigned char* row, int from) const {
    V residual[kCount];
    if (norm.residual != nullptr) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (pixel(from + u) < pixels) {
          residual[u] = load_const<V>(static_cast<const T*>(norm.residual) + index(from + u), 0);
        }
      }
    }
    float y[kCount * kWidth];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const V x = held(row, from + u);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y[u * kWidth + k] = affine.apply(k, to_acc(x.data[k]));
    }
    if (norm.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount * kWidth; ++i) y[i] += to_acc(residual[i / kWidth].data[i % kWidth]);
    }
    if constexpr (kSmooth) {
      activate(y, norm.activation, norm.negative_slope);
    } else {
      activate_piecewise(y, norm.activation, static_cast<float>(norm.negative_slope));
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float own[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) own[k] = y[u * kWidth + k];
      if (pixel(from + u) < pixels) {
        *reinterpret_cast<V*>(static_cast<T*>(p.output) + index(from + u)) = rounded<T>(own);
      }
    }
  }
};

}  // namespace styleforge::cuda
