// The way out of half_sm90.cu: a warpgroup's tile of 128 x 128 sums, in pieces of 64 x 64, through bias, activation and
// residual (or through the activation's gradient), rounded once, and by way of shared memory to whole lines. Each warp
// by itself: with stores by TMA, of a warpgroup's rows at a time, the fences and barriers around them took longer than
// all the rest (8192 x 512 -> 2048 with ReLU: 59 us, the first product 36 of them).
#pragma once

#include "../ffn/gelu.cuh"
#include "boxes.cuh"
#include "launch.h"
#include "pack.cuh"

namespace styleforge::cuda {

constexpr int kWayOutBytes = 16 * kBoxRowBytes;  // of shared memory, a warp

#ifdef STYLEFORGE_HAS_WGMMA

// Lanes that are 2 kCount apart share out the first 2 kCount sums between them.
template <int kCount>
__device__ __forceinline__ void halve(float (&v)[32]) {
  const bool upper = (threadIdx.x & (2 * kCount)) != 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float kept = upper ? v[i + kCount] : v[i];
    const float sent = upper ? v[i] : v[i + kCount];
    v[i] = kept + __shfl_xor_sync(0xffffffff, sent, 2 * kCount);
  }
}
// Columns of a 64 x 64 piece summed over a warp's 16 rows, in the layout of wgmma's D: on return v[0], v[1] are those
// of columns 8 (lane / 4) + 2 (lane % 4) and the next.
__device__ __forceinline__ void sum_rows(float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[2 * i] = v[4 * i] + v[4 * i + 2];
    v[2 * i + 1] = v[4 * i + 1] + v[4 * i + 3];
  }
  halve<8>(v);
  halve<4>(v);
  halve<2>(v);
}

// Of one warp, `warp` of its warpgroup.
template <typename T>
class WayOut {
 public:
  // `memory`: kWayOutBytes of shared memory of its own.
  __device__ __forceinline__ WayOut(const GemmParams& p, uint32_t memory, int warp, int lane) : p_(p), memory_(memory) {
    row_ = warp * 16 + lane / 4;
    column_ = lane % 4 * 2;
    line_row_ = warp * 16 + lane / 8;
    // This lane's row and 16-byte half of a 16 x 16 piece; the next piece is an exclusive or away.
    piece_ = memory + lane % 16 * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
  }

  // What the first piece needs of global memory is on its way from here on.
  __device__ __forceinline__ void begin(int row, int column) {
    tile_row_ = row;
    tile_column_ = column;
    load(0);
  }

  __device__ __forceinline__ void forward(const float (&d)[2][64]) {
    // A loop, although the registers have to be named one by one: unrolled, the code does not fit the instruction
    // cache.
#pragma unroll 1
    for (int q = 0; q < 4; q = after(q)) {
      float x[32];
      take(x, d, q);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 b = unpack<T>(bias_[i]);
        x[4 * i] += b.x;
        x[4 * i + 1] += b.y;
        x[4 * i + 2] += b.x;
        x[4 * i + 3] += b.y;
      }
      uint32_t pairs[16];
      if (p_.product != nullptr) {
        pack_all(pairs, x);
        put(pairs, p_.product, q);
      }
      if (p_.activate) ffn_activate<true>(x, p_.activation);
      if (p_.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float2 r = unpack<T>(other_[i]);
          x[2 * i] += r.x;
          x[2 * i + 1] += r.y;
        }
      }
      load(after(q));
      pack_all(pairs, x);
      put(pairs, p_.output, q);
    }
  }

  // d is the gradient of the activation's result, the residual what was activated. Out come the gradient of that, the
  // activation's result again (to `product`), and sums of the gradient over every 16 rows.
  __device__ __forceinline__ void gradient(const float (&d)[2][64]) {
#pragma unroll 1
    for (int q = 0; q < 4; q = after(q)) {
      float x[32];
      take(x, d, q);
      // Eight at a time, and their results in the place of what they came from: registers are short here.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float h[8], slope[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack<T>(other_[4 * j + i]);
          h[2 * i] = v.x;
          h[2 * i + 1] = v.y;
        }
        ffn_activate_with_slope<true>(h, slope, p_.activation);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[8 * j + i] *= slope[i];
#pragma unroll
        for (int i = 0; i < 4; ++i) other_[4 * j + i] = pack<T>(h[2 * i], h[2 * i + 1]);
      }
      if (p_.product != nullptr) put(other_, p_.product, q);
      load(after(q));
      uint32_t pairs[16];
      pack_all(pairs, x);
      put(pairs, p_.output, q);
      if (p_.column_sums != nullptr) {
        sum_rows(x);
        const int lane = threadIdx.x % 32;
        const int column = tile_column_ + q % 2 * 64 + lane / 4 * 8 + column_;
        const int part = (tile_row_ + q / 2 * 64 + row_) / 16;
        if (column < p_.n && part * 16 < p_.m) {
          *reinterpret_cast<float2*>(p_.column_sums + static_cast<int64_t>(part) * p_.n + column) = {x[0], x[1]};
        }
      }
    }
  }

 private:
  // Pieces: upper left, upper right, lower left, lower right; those on the right may be beyond the end.
  __device__ __forceinline__ int after(int q) const { return q % 2 == 0 && tile_column_ + 64 >= p_.n ? q + 2 : q + 1; }

  __device__ __forceinline__ void load(int q) {
    if (q >= 4) return;
    const int row = tile_row_ + q / 2 * 64 + row_, column = tile_column_ + q % 2 * 64 + column_;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p_.bias) + column + 8 * i);
      bias_[i] = p_.bias != nullptr && column + 8 * i < p_.n ? __ldg(from) : 0;
    }
    if (p_.residual == nullptr) return;
    const T* from = static_cast<const T*>(p_.residual) + row * p_.residual_stride + column;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int down = i % 2 * 8, right = i / 2 * 8;
      other_[i] = row + down < p_.m && column + right < p_.n
                      ? __ldg(reinterpret_cast<const uint32_t*>(from + down * p_.residual_stride + right))
                      : 0;
    }
  }

  static __device__ __forceinline__ void take(float (&x)[32], const float (&d)[2][64], int q) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c != q) continue;
#pragma unroll
      for (int i = 0; i < 32; ++i) x[i] = d[c / 2][c % 2 * 32 + i];
    }
  }

  static __device__ __forceinline__ void pack_all(uint32_t (&pairs)[16], const float (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }

  // Rows of 128 bytes by eight lanes each.
  __device__ __forceinline__ void put(const uint32_t (&pairs)[16], void* matrix, int q) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t four[4] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
      store_matrix(piece_ ^ (i << 5), four);
    }
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const int row = tile_row_ + q / 2 * 64 + line_row_, column = tile_column_ + q % 2 * 64 + lane % 8 * 8;
    T* to = static_cast<T*>(matrix) + static_cast<int64_t>(row) * p_.n + column;
    uint4 line[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 8 + 4 * i;
      line[i] = load_shared(memory_ + r * kBoxRowBytes + (((r & 7) ^ (lane % 8)) << 4));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + 4 * i < p_.m && column < p_.n)
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(4 * i) * p_.n) = line[i];
    }
  }

  const GemmParams& p_;
  uint32_t memory_, piece_;
  int row_, column_;  // of this lane's first number in a piece
  int line_row_;      // of the first of the four lines it helps to write
  int tile_row_ = 0, tile_column_ = 0;
  uint32_t bias_[8];
  uint32_t other_[16];  // of the residual
};

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
