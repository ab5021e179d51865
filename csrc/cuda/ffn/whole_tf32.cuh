// Pieces of whole_tf32.cu: how a block's shared memory is laid out, products of 64 of k, the activation, what mends
// numbers that are not finite.
#pragma once

#include "../common/mbarrier.cuh"
#include "../common/mma.cuh"
#include "../common/wgmma.cuh"
#include "gelu.cuh"
#include "launch.h"

namespace styleforge::cuda::small_tf32 {

constexpr int kThreads = 256;
constexpr int kWidth = 128;   // of input and output, at most
constexpr int kHidden = 64;   // columns at a time
constexpr int kMaxParts = 8;  // of a cluster

// Shared memory of a block of kRows rows. Boxes: 32 numbers of k, rows of 128 bytes, swizzled as wgmma reads them.
template <int kRows>
struct Shape {
  static constexpr int kValues = kRows / 4;                                   // hidden numbers that a thread activates
  static constexpr int kSums = kRows / 2;                                     // of a thread
  static constexpr int kPartBytes = kRows * 128, kBoxBytes = 2 * kPartBytes;  // large parts, then small ones
  static constexpr int kInputBytes = kWidth / 32 * kBoxBytes, kActivatedBytes = kHidden / 32 * kBoxBytes;
  static constexpr int kSumBytes = kRows * kWidth * 4, kExchangeBytes = kThreads * kValues * 4;
  static constexpr int kWeightPitch = kHidden * 4 + 32;  // rows that are two apart lie in different halves of the banks
  static constexpr int kWeightBytes = kWidth * kWeightPitch;
  static constexpr int kInput = 0, kActivated = kInputBytes, kSumsAt = kActivated + kActivatedBytes,
                       kExchange = kSumsAt + kSumBytes, kWeights = kExchange + kExchangeBytes,
                       kBytes = kWeights + kWeightBytes;
  static_assert(kPartBytes % 1024 == 0, "what the swizzle repeats after");
};

#ifdef STYLEFORGE_HAS_WGMMA

// d (+)= A[64 x 8] B[N x 8]^T with A in registers, N twice the numbers of d.
// clang-format off
__device__ __forceinline__ void multiply_8(float (&d)[8], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, %12, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void multiply_8(float (&d)[12], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %17, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n24k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, "
      "{%12, %13, %14, %15}, %16, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
// clang-format on
__device__ __forceinline__ void multiply_8(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<MmaKind::kTF32, 32>::run(d, a, b, accumulate);
}

// sum = A X^T over 64 of k, 16 (a granule) at a time. `fetch` gives a granule's rows of A; x: descriptor of the first
// of two boxes. The units cut off what an addition does not fit: so the large term of each step is summed in float32 by
// itself, and the small ones, where that does not matter, in the units, while the large ones before them are added.
// `beside`: what is to be done while a granule is multiplied. (Where two granules' sums were read from the same
// registers before and after a wait that left the small terms running, ptxas 13.0 took the one for the other.)
template <int kRows, typename Fetch, typename Beside>
__device__ __forceinline__ void multiply_64(float (&sum)[kRows / 2], const Fetch& fetch, uint64_t x,
                                            const Beside& beside) {
  constexpr int kCount = kRows / 2;
  float small[kCount], large[2][kCount];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t a[2][4], hi[2][4], lo[2][4];
    fetch(g, a);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) split_fragment(a[r % 2][2 * s + r / 2], hi[s][r], lo[s][r]);
    }
    const uint64_t here = x + g / 2 * (Shape<kRows>::kBoxBytes >> 4) + g % 2 * 4;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 2; ++s) multiply_8(small, lo[s], here + 2 * s, g > 0 || s > 0);
#pragma unroll
    for (int s = 0; s < 2; ++s) multiply_8(small, hi[s], here + (Shape<kRows>::kPartBytes >> 4) + 2 * s, true);
    wgmma_commit();
    if (g > 0) {
      wgmma_wait<1>();
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] = g == 1 && s == 0 ? large[s][i] : sum[i] + large[s][i];
      }
      wgmma_fence();
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) multiply_8(large[s], hi[s], here + 2 * s, false);
    wgmma_commit();
    beside(g);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = (sum[i] + large[0][i]) + (large[1][i] + small[i]);
}

// Where k of a row lies in boxes in shared memory. Of 16 k the fourth ones follow each other: a lane of A's fragments
// has four neighbours.
template <int kRows>
__device__ __forceinline__ int place_in_boxes(int row, int k) {
  return k / 32 * Shape<kRows>::kBoxBytes + row * 128 + (((k / 16 % 2 * 4 + k % 4) ^ (row % 8)) << 4) + k % 16 / 4 * 4;
}

// v of an activation, which is bounded from below. What is finite stays finite.
__device__ __forceinline__ void split_activated(float v, uint32_t& hi, uint32_t& lo) {
  constexpr float kLargest = 3.40116213e38f;  // of TF32: 2^128 - 2^117
  const float within = fminf(v, kLargest);
  hi = (__float_as_uint(within) + 0x1000u) & ~0x1fffu;
  lo = __float_as_uint(v - __uint_as_float(hi));
}

// gelu with gelu.cuh's formulas, put together for fewer instructions: as a sum whose first term is exact,
//   |x| < 1   x / 2 + x^2 p(x^2)
//   else      max(x, 0) - |x| Phi(-|x|), 0 on the left where the exponential is no normal number
// and as accurate (RMS error on normal inputs 2.8e-8 of the result's; gelu.cuh's 3.4e-8, PyTorch's 6.2e-8).
template <int kCount>
__device__ __forceinline__ void gelu_exact(float (&v)[kCount]) {
  constexpr float kScale = -7.213475108e-1f;     // -log2(e) / 2
  constexpr float kScaleLow = -9.629814956e-9f;  // what the float above lacks
  constexpr float kLn2 = 6.931471806e-1f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float z = fminf(fabsf(v[i]), 15.0f);
    const float square = __fmul_rn(z, z);
    const float power = __fmul_rn(square, kScale);
    const float square_low = __fmaf_rn(z, z, -square);
    const float power_low = fmaf(square, kScaleLow, fmaf(square_low, kScale, __fmaf_rn(square, kScale, -power)));
    const float rough = exp2_flushed(power);
    const float exponential = fmaf(rough * power_low, kLn2, rough);
    const float reciprocal = reciprocal_approximate(z + 4.0f);
    const float q = (z - 4.0f) * reciprocal;
    const float half = 0.5f * v[i];
    const float outer =
        fmaf(-z, exponential * (tail_polynomial(q) * reciprocal), half + fabsf(half));  // NaN and infinity stay
    v[i] = z < 1.0f ? fmaf(square, centre_polynomial(square), half) : outer;
  }
}

// Where the parts of a number that is not finite gave NaN: elements in the plain way (see gemm/finish.cuh). Functions
// of their own, which keep that code out of the kernel's way. Of a hidden column: rows `row`, `row` + 1 of each tile.
template <int kRows>
__device__ __noinline__ void mend_hidden(float (&h)[kRows / 4], const WholeFfnParams& p, int row, int column) {
#pragma unroll 1
  for (int i = 0; i < kRows / 4; ++i) {
    const int r = row + i / 2 * 8 + i % 2;
    if (!isnan(h[i]) || r >= p.rows || column >= p.hidden) continue;
    const float* a = static_cast<const float*>(p.input) + r * p.input_stride;
    const float* b = static_cast<const float*>(p.fc1_weight) + column * p.fc1_stride;
    float sum = 0;
    for (int k = 0; k < p.embed && !isnan(sum); ++k) sum = fmaf(a[k], b[k], sum);
    h[i] = sum;
  }
}

// Of two outputs, what the 64 hidden columns in shared memory give them.
template <int kRows>
__device__ __noinline__ void mend_outputs(float (&part)[kRows / 2], const WholeFfnParams& p, const unsigned char* hi,
                                          int first_row, int row, int output, int column) {
#pragma unroll 1
  for (int i = 0; i < kRows / 2; ++i) {
    const int r = row + i / 4 * 8 + i % 2, out = output + i / 2 % 2;
    if (!isnan(part[i]) || first_row + r >= p.rows || out >= p.out) continue;
    const float* b = static_cast<const float*>(p.fc2_weight) + out * p.fc2_stride + column;
    float sum = 0;
    for (int k = 0; k < min(kHidden, p.hidden - column) && !isnan(sum); ++k) {
      const unsigned char* at = hi + place_in_boxes<kRows>(r, k);
      const float high = *reinterpret_cast<const float*>(at);
      const float low = *reinterpret_cast<const float*>(at + Shape<kRows>::kPartBytes);
      sum = fmaf(high + low, b[k], sum);
    }
    part[i] = sum;
  }
}

// What is kept for the backward: before its bias.
template <int kRows>
__device__ __noinline__ void keep_hidden(const float (&h)[kRows / 4], const WholeFfnParams& p, int row, int column) {
#pragma unroll 1
  for (int i = 0; i < kRows / 4; ++i) {
    const int r = row + i / 2 * 8 + i % 2;
    if (r < p.rows && column < p.hidden)
      static_cast<float*>(p.product)[static_cast<int64_t>(r) * p.hidden + column] = h[i];
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda::small_tf32
