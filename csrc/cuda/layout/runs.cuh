// A tile of pixels by channels in shared memory, [pixel][channel], seen in runs of pixels: 16 bytes of neighbouring
// pixels of one channel, which is what moves well to and from an NCHW tensor.
//
// Shared memory is read and written in words of 4 bytes: a word is one channel of a pixel, or two neighbouring ones of
// 2 bytes each. A lane moves the words of 16 / kElement pixels, and byte permutations in registers make runs of them
// (two of 8 pixels, or one of 4), so that elements of 2 bytes cost no more instructions than those of 4.
//
// Lanes of a warp that hold neighbouring runs would meet in the same banks: the pitch of a pixel is an odd multiple of
// 16 or 32 bytes, so that after 8 or 4 pixels it comes round to the same bank. Each of them therefore starts at another
// pixel, `turn`, an exclusive or on the pixel's number, which a few selects in registers undo.
#pragma once

#include <cstdint>

namespace styleforge::cuda {

template <int kElement>
struct Runs {
  static_assert(kElement == 2 || kElement == 4);
  static constexpr int kPixels = 16 / kElement;   // of a run
  static constexpr int kChannels = 4 / kElement;  // of a word: a lane has as many runs
  uint4 run[kChannels];

  // kTurns: the bits that `turn` may have. `at`: the word of the run's first pixel; `pitch`: bytes between two pixels.
  template <int kTurns>
  __device__ __forceinline__ void from_tile(const unsigned char* at, int pitch, int turn) {
    uint32_t word[kPixels];
#pragma unroll
    for (int j = 0; j < kPixels; ++j) word[j] = *reinterpret_cast<const uint32_t*>(at + (j ^ turn) * pitch);
    undo<kTurns>(word, turn);
    if constexpr (kElement == 2) {
      run[0] = {__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410),
                __byte_perm(word[4], word[5], 0x5410), __byte_perm(word[6], word[7], 0x5410)};
      run[1] = {__byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632),
                __byte_perm(word[4], word[5], 0x7632), __byte_perm(word[6], word[7], 0x7632)};
    } else {
      run[0] = {word[0], word[1], word[2], word[3]};
    }
  }

  template <int kTurns>
  __device__ __forceinline__ void to_tile(unsigned char* at, int pitch, int turn) const {
    uint32_t word[kPixels];
    if constexpr (kElement == 2) {
      const uint32_t low[4] = {run[0].x, run[0].y, run[0].z, run[0].w};
      const uint32_t high[4] = {run[1].x, run[1].y, run[1].z, run[1].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[2 * i] = __byte_perm(low[i], high[i], 0x5410);
        word[2 * i + 1] = __byte_perm(low[i], high[i], 0x7632);
      }
    } else {
      word[0] = run[0].x, word[1] = run[0].y, word[2] = run[0].z, word[3] = run[0].w;
    }
    undo<kTurns>(word, turn);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) *reinterpret_cast<uint32_t*>(at + (j ^ turn) * pitch) = word[j];
  }

 private:
  // word[j] and word[j ^ turn] change places.
  template <int kTurns>
  static __device__ __forceinline__ void undo(uint32_t (&word)[kPixels], int turn) {
#pragma unroll
    for (int bit = 1; bit < kPixels; bit *= 2) {
      if ((kTurns & bit) == 0) continue;
      const bool swap = (turn & bit) != 0;
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        if ((j & bit) != 0) continue;
        const uint32_t a = word[j], b = word[j | bit];
        word[j] = swap ? b : a;
        word[j | bit] = swap ? a : b;
      }
    }
  }
};

}  // namespace styleforge::cuda
