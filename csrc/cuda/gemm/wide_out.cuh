// The way out of wide_sm90.cuh and wide_gradient_sm90.cuh: a warp takes a box of 64 rows of products from shared
// memory, 16-bit ones rounded and with their bias, sends it through activation and residual (or through the
// activation's gradient) and writes whole lines.
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

// Numbers in 16 bytes.
template <typename T>
constexpr int kLineNumbers = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack_line(float* x, const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 f = unpack<T>(words[i]);
      x[2 * i] = f.x;
      x[2 * i + 1] = f.y;
    }
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack_line(const float* x) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  } else {
    return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
  }
}

template <typename T>
__device__ __forceinline__ uint4 halved(const uint4& v) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  uint4 result = v;
  auto* pairs = reinterpret_cast<Pair*>(&result);
  Pair half;
  half.x = half.y = from_acc<T>(0.5f);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __hmul2(pairs[i], half);
  return result;
}

// Where 16 bytes of a row lie in a box of float32 numbers on its way out, from the box's beginning. Writing lanes have
// two numbers each of four rows, reading ones four each of one row: both without two in a bank.
__device__ __forceinline__ uint32_t float_box_place(int row, int sixteen) {
  return row * kBoxRowBytes + (((sixteen >> 1) ^ (row & 3)) << 5) + ((sixteen & 1) << 4);
}

// What happens to a box. Code for all that may happen is long, and what is jumped over in it costs more than what is
// done: instructions come late then. So what is most frequent, in boxes without an edge, has code of its own.
enum class WayOut { kAny, kGelu, kPlain };
template <WayOut kWay>
using WayOutIs = std::integral_constant<WayOut, kWay>;

// A lane's part of a box, kLines x 4 rows at a time: 16 bytes of neighbouring columns of the rows lane / 8 + 4 i.
template <typename T, int kLines>
class LinesOut {
 public:
  static constexpr int kNumbers = kLineNumbers<T>;
  // What an activation's results are rounded to, here or by the next product.
  using Rounded = std::conditional_t<sizeof(T) == 4, TF32, T>;
  static constexpr int kPartRows = 4 * kLines, kParts = 64 / kPartRows;

  __device__ __forceinline__ LinesOut(const GemmParams& p, bool vectors, int lane) : p_(p), vectors_(vectors) {
    row_ = lane / 8;
    column_ = lane % 8 * kNumbers;
    // 128-byte swizzle of 16-bit boxes: in rows 4 further on the half of the line that a lane has changes, no more.
    shared_ = sizeof(T) == 4 ? float_box_place(row_, lane % 8) : row_ * kBoxRowBytes + ((lane % 8 ^ row_) << 4);
  }

  __device__ __forceinline__ void take(uint4 (&v)[kLines], uint32_t box, int part) const {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const uint32_t other_half = sizeof(T) == 2 ? i % 2 << 6 : 0;
      v[i] = load_shared16(((box + shared_) ^ other_half) + (part * kPartRows + 4 * i) * kBoxRowBytes);
    }
  }

  // Of a residual, or of what was activated: of the rows from `row` on, the part's i-th.
  __device__ __forceinline__ uint4 load_line(int i, int row, int column) const {
    const int64_t at = row + row_ + 4 * i;
    if (at >= p_.m || column + column_ >= p_.n) return {};
    const T* from = static_cast<const T*>(p_.residual) + at * p_.residual_stride + column + column_;
    return vectors_ ? __ldg(reinterpret_cast<const uint4*>(from)) : load_words(from);
  }

  __device__ __forceinline__ void load(uint4 (&v)[kLines], int row, int column) const {
#pragma unroll
    for (int i = 0; i < kLines; ++i) v[i] = load_line(i, row, column);
  }

  // Of this lane's columns, where the products come without.
  __device__ __forceinline__ uint4 load_bias(int column) const {
    if (p_.bias == nullptr || column + column_ >= p_.n) return {};
    return load_words(static_cast<const T*>(p_.bias) + column + column_);
  }

  // kGelu and kPlain (no activation): without a residual, and all of the box is there.
  template <WayOut kWay>
  __device__ __forceinline__ void forward(const uint4 (&v)[kLines], const uint4& bias, const uint4 (&residual)[kLines],
                                          int row, int column) const {
    constexpr bool kAny = kWay == WayOut::kAny;
    if (p_.product != nullptr) store<!kAny>(p_.product, v, row, column);
    constexpr bool kSingle = sizeof(T) == 4;
    constexpr int kTogether = 2;  // lines: more take registers that the box needs
    uint4 results[kLines];
#pragma unroll
    for (int first = 0; first < kLines; first += kTogether) {
      float x[kNumbers * kTogether], b[kNumbers];
      if constexpr (kSingle) unpack_line<T>(b, bias);
      if (kWay == WayOut::kGelu || (kAny && p_.activate && p_.activation == FfnActivation::kGelu)) {
        if constexpr (kSingle) {
#pragma unroll
          for (int i = 0; i < kNumbers; ++i) b[i] *= 0.5f;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if constexpr (kSingle) {
            unpack_line<T>(x + kNumbers * i, v[first + i]);
#pragma unroll
            for (int j = 0; j < kNumbers; ++j) x[kNumbers * i + j] = fmaf(0.5f, x[kNumbers * i + j], b[j]);
          } else {
            unpack_line<T>(x + kNumbers * i, halved<T>(v[first + i]));
          }
        }
#pragma unroll
        for (int i = 0; i < kNumbers * kTogether; ++i) x[i] = gelu_of_twice<Rounded>(x[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          unpack_line<T>(x + kNumbers * i, v[first + i]);
#pragma unroll
          for (int j = 0; kSingle && j < kNumbers; ++j) x[kNumbers * i + j] += b[j];
        }
        if (kAny && p_.activate) ffn_activate<true>(x, p_.activation);
      }
      if (kAny && p_.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          float r[kNumbers];
          unpack_line<T>(r, residual[first + i]);
#pragma unroll
          for (int j = 0; j < kNumbers; ++j) x[kNumbers * i + j] += r[j];
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) results[first + i] = pack_line<T>(x + kNumbers * i);
    }
    store<!kAny>(p_.output, results, row, column);
  }

  // v is the gradient of the activation's result, `hidden` what was activated. Out come the gradient of that and the
  // activation's result again (to `product`); `sums` takes the gradient in. Of 16-bit numbers.
  __device__ __forceinline__ void gradient(uint4 (&v)[kLines], const uint4 (&hidden)[kLines], float (&sums)[8], int row,
                                           int column) const {
    if (row + kPartRows > p_.m) {  // rows beyond the last one: an infinite weight made NaN of their zeros
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        if (row + row_ + 4 * i >= p_.m) v[i] = {};
      }
    }
#pragma unroll
    for (int i = 0; i < kLines; i += 2) {
      float h[16], g[16];
      unpack_line<T>(h, hidden[i]);
      unpack_line<T>(h + 8, hidden[i + 1]);
      unpack_line<T>(g, v[i]);
      unpack_line<T>(g + 8, v[i + 1]);
      ffn_activate_backward<true>(h, g, p_.activation);
#pragma unroll
      for (int j = 0; j < 16; ++j) sums[j % 8] += g[j];
      const uint4 results[2] = {pack_line<T>(g), pack_line<T>(g + 8)};
      const uint4 activated[2] = {pack_line<T>(h), pack_line<T>(h + 8)};
      if (p_.product != nullptr) store<false>(p_.product, activated, row + 4 * i, column);
      store<false>(p_.output, results, row + 4 * i, column);
    }
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
  static __device__ __forceinline__ uint4 load_words(const T* from) {
    const auto* words = reinterpret_cast<const uint32_t*>(from);
    return {__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3)};
  }

  // Lines of the rows from `row` on.
  template <bool kWhole, int kCount>
  __device__ __forceinline__ void store(void* matrix, const uint4 (&v)[kCount], int row, int column) const {
    const int64_t stride = int64_t{4} * p_.n;
    T* to = static_cast<T*>(matrix) + static_cast<int64_t>(row + row_) * p_.n + column + column_;
    if (kWhole || (row + 4 * kCount <= p_.m && column + kBoxNumbers<T> <= p_.n)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) store_line(to + i * stride, v[i]);
    } else if (column + column_ < p_.n) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
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
