// Moments of a tile's channels of 16 bits by the tensor cores, from the tile in shared memory.
//
// Of eight channels X (16 pixels x 8) one mma.sync gives X^T X, whose diagonal are the sums of squares, and beside it,
// by eight rows of ones below X^T, the sums: transposed, ldmatrix brings the same registers for both operands. A warp
// has its channels for all pixels, so that there is nothing to exchange: afterwards one lane has all of a channel.
//
// Sums are taken about the tile's first pixel, so that what cancels is bounded by the number of pixels; of halves of
// the differences, which do not overflow.
#pragma once

#include "../common/mma.cuh"
#include "tile_out.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_MMA

template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
  static constexpr uint32_t kOnes = 0x3c003c00u, kHalves = 0x38003800u;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static constexpr uint32_t kOnes = 0x3f803f80u, kHalves = 0x3f003f00u;
};

// Of full tiles: kRows rows of 16 pixels.
template <typename T, int kColumns, int kRows>
struct MmaMoments {
  using Pair = typename PairOf<T>::Type;
  static constexpr int kPitch = stash_pitch(kColumns, 2);
  static constexpr int kLists = kColumns / 8 > kRows ? 2 : 1;  // eight channels each, of a warp
  static constexpr int kBusy = kColumns / (8 * kLists);        // warps that have channels
  static constexpr int kStepRows = kLists == 2 ? 1 : 2;        // of pixels: four matrices of eight
  static constexpr int kSteps = kRows / kStepRows;
  static_assert(kBusy <= kRows && kBusy * kLists * 8 == kColumns && kRows % kStepRows == 0);

  // Lanes with a channel of each list, which is this one.
  static __device__ __forceinline__ bool owns(int lane) { return lane / 8 == lane % 4; }
  static __device__ __forceinline__ int column(int warp, int lane, int list) {
    return (warp * kLists + list) * 8 + lane / 4;
  }

  // By all lanes of the warps below kBusy; `tile` is its first row's first pixel.
  static __device__ __forceinline__ void find(const unsigned char* tile, int warp, int lane,
                                              float2 (&moments)[kLists]) {
    const unsigned char* own = tile + warp * kLists * 16;
    Pair pilot[kLists];  // its negative half
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
      uint32_t value = *reinterpret_cast<const uint16_t*>(own + list * 16 + lane / 4 * 2);
      value |= value << 16;
      const uint32_t negative_half = PairOf<T>::kHalves | 0x80008000u;
      pilot[list] = __hmul2(*reinterpret_cast<Pair*>(&value), *reinterpret_cast<const Pair*>(&negative_half));
    }
    // Matrices 0 and 1 are of pixels 0 and 8 of a row; 2 and 3 of the next list, or the next row.
    const int matrix = lane / 8;
    const int pixel = matrix % 2 * 8 + lane % 8 + (kLists == 1 ? matrix / 2 * ConvSchedule::kTileWidth : 0);
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(own)) +
                    static_cast<uint32_t>(pixel * kPitch + (kLists == 2 ? matrix / 2 * 16 : 0));
    uint32_t pixels[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_matrices_transposed(pixels[step], from);
      from += kStepRows * ConvSchedule::kTileWidth * kPitch;
    }
    const uint32_t ones = PairOf<T>::kOnes, half = PairOf<T>::kHalves;
    float sums[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t d[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Pair apart = __hfma2(*reinterpret_cast<const Pair*>(&pixels[step][2 * i + k]),
                                     *reinterpret_cast<const Pair*>(&half), pilot[kLists == 2 ? i : 0]);
          d[k] = *reinterpret_cast<const uint32_t*>(&apart);
        }
        const uint32_t a[4] = {d[0], ones, d[1], ones};
        multiply<T>(sums[i], a, d[0], d[1], sums[i]);
      }
    }
    constexpr float kShare = 1.0f / (kRows * ConvSchedule::kTileWidth);
    const bool odd = lane / 4 % 2 != 0;
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
      float squares = odd ? sums[list][1] : sums[list][0];
      float sum = odd ? sums[list][3] : sums[list][2];
      if constexpr (kLists == 1) {
        squares += odd ? sums[1][1] : sums[1][0];
        sum += odd ? sums[1][3] : sums[1][2];
      }
      const float shift = sum * kShare;
      const float m2 = relu_acc(squares - sum * shift);  // NaN stays
      moments[list] = make_float2(2.0f * (shift - to_acc(pilot[list].x)), 4.0f * m2);
    }
  }
};

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
