// The way out of half_sm90.cu: a warp takes a box of 64 x 64 products, rounded and with their bias, from shared memory,
// sends it through activation and residual (or through the activation's gradient) and writes whole lines.
#pragma once

#include "../ffn/gelu.cuh"
#include "boxes.cuh"
#include "launch.h"
#include "pack.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_WGMMA

// In one instruction: left to itself the compiler takes four.
__device__ __forceinline__ void store_line(void* to, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

template <typename T>
__device__ __forceinline__ void unpack_eight(float* x, const uint4& v) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack<T>(pairs[i]);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack_eight(const float* x) {
  return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

// A lane's part of a box, a quarter of 16 rows at a time: eight neighbouring columns of the rows lane / 8 + 4 i.
constexpr int kLines = 4;     // i
constexpr int kQuarters = 4;  // of a box

template <typename T>
class LinesOut {
 public:
  __device__ __forceinline__ LinesOut(const GemmParams& p, bool vectors, int lane) : p_(p), vectors_(vectors) {
    row_ = lane / 8;
    column_ = lane % 8 * 8;
    // Swizzled: in rows 4 further on the half of the line that a lane has changes, and nothing else.
    shared_ = row_ * kBoxRowBytes + ((lane % 8 ^ row_) << 4);
  }

  __device__ __forceinline__ void take(uint4 (&v)[kLines], uint32_t box, int quarter) const {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      v[i] = load_shared16(((box + shared_) ^ (i % 2 << 6)) + (quarter * 16 + 4 * i) * kBoxRowBytes);
    }
  }

  // Residual, or what was activated, of the rows from `row` on.
  __device__ __forceinline__ void load(uint4 (&v)[kLines], int row, int column) const {
    const int64_t stride = p_.residual_stride;
    const T* from = static_cast<const T*>(p_.residual) + (row + row_) * stride + column + column_;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      v[i] = {};
      if (row + row_ + 4 * i >= p_.m || column + column_ >= p_.n) continue;
      if (vectors_) {
        v[i] = __ldg(reinterpret_cast<const uint4*>(from + 4 * i * stride));
      } else {
        const auto* pairs = reinterpret_cast<const uint32_t*>(from + 4 * i * stride);
        v[i] = {__ldg(pairs), __ldg(pairs + 1), __ldg(pairs + 2), __ldg(pairs + 3)};
      }
    }
  }

  __device__ __forceinline__ void forward(const uint4 (&v)[kLines], const uint4 (&residual)[kLines], int row,
                                          int column) const {
    if (p_.product != nullptr) store(p_.product, v, row, column);
    float x[8 * kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) unpack_eight<T>(x + 8 * i, v[i]);
    if (p_.activate) ffn_activate_as<T>(x, p_.activation);
    if (p_.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        float r[8];
        unpack_eight<T>(r, residual[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[8 * i + j] += r[j];
      }
    }
    uint4 results[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) results[i] = pack_eight<T>(x + 8 * i);
    store(p_.output, results, row, column);
  }

  // v is the gradient of the activation's result, `hidden` what was activated. Out come the gradient of that and the
  // activation's result again (to `product`); `sums` takes the gradient in.
  __device__ __forceinline__ void gradient(const uint4 (&v)[kLines], const uint4 (&hidden)[kLines], float (&sums)[8],
                                           int row, int column) const {
    uint4 results[kLines], activated[kLines];
#pragma unroll
    for (int i = 0; i < kLines; i += 2) {
      float h[16], slope[16], g[16];
      unpack_eight<T>(h, hidden[i]);
      unpack_eight<T>(h + 8, hidden[i + 1]);
      unpack_eight<T>(g, v[i]);
      unpack_eight<T>(g + 8, v[i + 1]);
      ffn_activate_with_slope<true>(h, slope, p_.activation);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        g[j] *= slope[j];
        sums[j % 8] += g[j];
      }
      results[i] = pack_eight<T>(g);
      results[i + 1] = pack_eight<T>(g + 8);
      activated[i] = pack_eight<T>(h);
      activated[i + 1] = pack_eight<T>(h + 8);
    }
    if (p_.product != nullptr) store(p_.product, activated, row, column);
    store(p_.output, results, row, column);
  }

  // What gradient() summed up over a box, whose rows begin at `row`.
  __device__ __forceinline__ void sum_out(float (&sums)[8], int row, int column) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[j] += __shfl_xor_sync(0xffffffff, sums[j], 8);
      sums[j] += __shfl_xor_sync(0xffffffff, sums[j], 16);
    }
    if (row_ != 0 || column + column_ >= p_.n || row >= p_.m) return;
    auto* to = reinterpret_cast<float4*>(p_.column_sums + static_cast<int64_t>(row / 64) * p_.n + column + column_);
    to[0] = {sums[0], sums[1], sums[2], sums[3]};
    to[1] = {sums[4], sums[5], sums[6], sums[7]};
  }

 private:
  __device__ __forceinline__ void store(void* matrix, const uint4 (&v)[kLines], int row, int column) const {
    const int64_t stride = int64_t{4} * p_.n;
    T* to = static_cast<T*>(matrix) + static_cast<int64_t>(row + row_) * p_.n + column + column_;
    if (row + 16 <= p_.m && column + kBoxColumns <= p_.n) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) store_line(to + i * stride, v[i]);
    } else if (column + column_ < p_.n) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        if (row + row_ + 4 * i < p_.m) store_line(to + i * stride, v[i]);
      }
    }
  }

  const GemmParams& p_;
  bool vectors_;  // the residual's rows begin at multiples of 16 bytes
  int row_, column_;
  uint32_t shared_;
};

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
