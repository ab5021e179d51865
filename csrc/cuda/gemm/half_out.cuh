// The way out of half_sm90.cu: a warpgroup's tile of 128 x 128 sums, in pieces of 64 x 64, through bias, activation and
// residual, rounded once, by way of shared memory to a TMA store.
#pragma once

#include "../ffn/gelu.cuh"
#include "boxes.cuh"
#include "launch.h"
#include "pack.cuh"

namespace styleforge::cuda {

constexpr int kWayOutBoxes = 2;  // one is filled while the other leaves
constexpr int kWayOutBytes = kWayOutBoxes * kBoxBytes;

#ifdef STYLEFORGE_HAS_WGMMA

// Of one warpgroup.
template <typename T>
class WayOut {
 public:
  // `boxes`: shared memory of all warpgroups.
  __device__ __forceinline__ WayOut(const GemmParams& p, uint32_t boxes, int group, int warp, int lane)
      : p_(p), boxes_(boxes + group * kWayOutBytes), group_(group), leader_(warp == 0 && lane == 0) {
    row_ = warp * 16 + lane / 4;
    column_ = lane % 4 * 2;
    // This lane's row and 16-byte half of a warp's 16 x 16 piece; the next piece is an exclusive or away.
    piece_ = (warp * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
  }

  // What the first piece needs of global memory is on its way from here on.
  __device__ __forceinline__ void begin(int row, int column) {
    tile_row_ = row;
    tile_column_ = column;
    load(0);
  }

  __device__ __forceinline__ void forward(const float (&d)[2][64], const CUtensorMap* output,
                                          const CUtensorMap* product) {
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
        put(pairs, product, q);
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
      put(pairs, output, q);
    }
  }

  __device__ __forceinline__ void end() const {
    if (leader_) store_wait_all();
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

  __device__ __forceinline__ void put(const uint32_t (&pairs)[16], const CUtensorMap* map, int q) {
    if (leader_) store_wait_read<kWayOutBoxes - 1>();
    named_barrier(1 + group_, 128);
    const uint32_t box = boxes_ + next_ * kBoxBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t four[4] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
      store_matrix((box + piece_) ^ (i << 5), four);
    }
    fence_async_shared();
    named_barrier(1 + group_, 128);
    if (leader_) {
      store_box(map, tile_column_ + q % 2 * 64, tile_row_ + q / 2 * 64, box);
      store_commit();
    }
    next_ ^= 1;
  }

  const GemmParams& p_;
  uint32_t boxes_, piece_;
  int group_;
  bool leader_;
  int row_, column_;  // of this lane's first number in a piece
  int tile_row_ = 0, tile_column_ = 0;
  int next_ = 0;  // box
  uint32_t bias_[8];
  uint32_t other_[16];  // of the residual
};

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
