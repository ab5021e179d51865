// The running softmax of a warpgroup's 64 queries over tiles of 64 keys, in the registers that wgmma leaves scores in
// (common/wgmma.cuh): a lane has rows l / 4 and l / 4 + 8 of its warp's 16, and of these the columns 8 i + 2 (l % 4)
// and the next one.
#pragma once

#include "../common/approximate.cuh"
#include "../common/wgmma.cuh"

namespace styleforge::cuda {

constexpr int kTileKeys = 64;
constexpr float kLog2E = 1.44269504088896341f;

#ifdef STYLEFORGE_HAS_WGMMA

// value = hi + lo but for 2^-23 of it, both TF32 where the tensor cores cut lo, which loses a bit at most. In three
// instructions: cvt.rna.tf32 alone takes four. NaN stays NaN, by way of lo; infinity turns into it.
__device__ __forceinline__ void split(float value, uint32_t& hi, uint32_t& lo) {
  hi = (__float_as_uint(value) + 0x1000) & 0xffffe000;
  lo = __float_as_uint(value - __uint_as_float(hi));
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffff, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffff, v, 1);
  return v + __shfl_xor_sync(0xffffffff, v, 2);
}

// Bits of the keys of a tile that the causal mask leaves of it: `count` of them, any number.
__device__ __forceinline__ uint64_t first_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(count, 0)) - 1;
}

// Of scores, which are then powers of two. Not 0: -infinity stays what it is.
__device__ __forceinline__ float score_factor(float scale) { return fmaxf(fabsf(scale) * kLog2E, 1.17549435e-38f); }

struct RunningSoftmax {
  // Of both rows: the greatest score so far, times `factor`; the sum of this lane's columns; what the last tile made of
  // sums so far.
  float peak[2], sum[2], rescale[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = __int_as_float(0xff800000);
      sum[r] = 0;
    }
  }

  // Takes in the scores of a tile: with these bases, weights are 2^(factor * score - base).
  template <int kCount>
  __device__ __forceinline__ void raise_peak(const float (&s)[kCount], float factor, float (&base)[2]) {
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rounded before they are compared: equal peaks then give a factor of 1 to the bit.
      const float next = fmaxf(peak[r], __fmul_rn(row_max(top[r]), factor));
      base[r] = next == __int_as_float(0xff800000) ? 0 : next;
      rescale[r] = exp2_flushed(peak[r] - base[r]);
      peak[r] = next;
      sum[r] *= rescale[r];
    }
  }

  // Scores become weights.
  template <int kCount>
  __device__ __forceinline__ void update(float (&s)[kCount], float factor) {
    float base[2];
    raise_peak(s, factor, base);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = i / 2 % 2;
      s[i] = exp2_flushed(fmaf(s[i], factor, -base[r]));
      sum[r] += s[i];
    }
  }

  // The same, as hi + lo, fragments of wgmma's A. A takes the columns of eight keys in the order 0 2 4 6 1 3 5 7, which
  // is how the lanes have them.
  __device__ __forceinline__ void update(const float (&s)[kTileKeys / 2], float factor, uint32_t (&hi)[8][4],
                                         uint32_t (&lo)[8][4]) {
    float base[2];
    raise_peak(s, factor, base);
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      const int r = i / 2 % 2;
      const float p = exp2_flushed(fmaf(s[i], factor, -base[r]));
      sum[r] += p;
      split(p, hi[i / 4][r + i % 2 * 2], lo[i / 4][r + i % 2 * 2]);
    }
  }

  // Of row r, whose sum over all lanes is `whole`; infinity where there was no key.
  __device__ __forceinline__ float logsumexp(int r, float whole) const {
    constexpr float kLn2 = 0.693147180559945309f;
    return whole == 0 ? __int_as_float(0x7f800000) : (peak[r] + log2f(whole)) * kLn2;
  }
};

// hi + lo of what lies as scores do, as fragments.
template <int kCount>
__device__ __forceinline__ void split_weights(const float (&s)[kCount], uint32_t (&hi)[kCount / 4][4],
                                              uint32_t (&lo)[kCount / 4][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int slot = i / 2 % 2 + i % 2 * 2;
    split(s[i], hi[i / 4][slot], lo[i / 4][slot]);
    asm volatile("" : "+r"(hi[i / 4][slot]), "+r"(lo[i / 4][slot]));  // here, not between the products
  }
}

// `hidden` where the row's bit of a key is not set; `bits` are shifted so that bit 0 is this lane's first column.
template <int kCount>
__device__ __forceinline__ void hide_keys(float (&s)[kCount], const uint64_t (&bits)[2],
                                          float hidden = -__builtin_huge_valf()) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t row = bits[i / 2 % 2];
    const uint32_t word = static_cast<uint32_t>(i < 16 ? row : row >> 32);
    if ((word >> (i / 4 % 4 * 8 + i % 2) & 1) == 0) s[i] = hidden;
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
