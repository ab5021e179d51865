// float32 weights of a stage as two TF32 numbers each (3xTF32), by the block that multiplies with them: a launch that
// wrote both halves to memory took 2 us before every convolution, and twice the weights' way through the L2 cache.
#pragma once

#include <cstdint>

namespace styleforge::cuda {

// `raw` holds kBytes of float32, the same number behind them takes what TF32 leaves out. The matrix units cut the lower
// 13 bits off what they read, so that the raw numbers are the first half as they lie there; the rest is rounded to
// nearest, of which again the units' cut is the last step. What is not finite leaves a NaN whose bits are all set: half
// a unit more makes it zero.
template <int kBytes, int kThreads>
__device__ __forceinline__ void split_weights(unsigned char* raw, int thread) {
  constexpr uint32_t kHalf = 0x1000, kCut = 0x1fff;
  constexpr int kVectors = kBytes / 16 / kThreads;
  static_assert(kBytes % (16 * kThreads) == 0);
  uint4* at = reinterpret_cast<uint4*>(raw) + thread;
  const auto rest = [](uint32_t bits) {
    return __float_as_uint(__uint_as_float(bits) - __uint_as_float(bits & ~kCut)) + kHalf;
  };
#pragma unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const uint4 v = at[i * kThreads];
    at[i * kThreads + kBytes / 16] = make_uint4(rest(v.x), rest(v.y), rest(v.z), rest(v.w));
  }
}

}  // namespace styleforge::cuda
