// The transposition of one tile: 64 pixels x 128 bytes of channels, by a block of 256 threads, each of which moves 32
// bytes in and 32 bytes out. Both sides move in 16-byte pieces, lines of 128 bytes from eight neighbouring lanes, where
// sizes and addresses allow; else single elements, neighbouring lanes neighbouring elements.
//
// All loads of a thread are in flight together, and eight blocks share a multiprocessor: 64 KB on their way there,
// twice what the memory's latency asks for. Larger tiles would leave multiprocessors idle on the tensors of 0.25 to 8
// MB that a network's layers have.
#pragma once

#include "../common/types.cuh"
#include "launch.h"
#include "runs.cuh"

namespace styleforge::cuda {

constexpr int kTransposeThreads = 256;
constexpr int kTransposePixels = 64;
constexpr int kTransposeBytes = 128;                   // of channels
constexpr int kTransposePitch = kTransposeBytes + 16;  // 36 words: four neighbouring words and eight pixels, 32 banks

// How each side moves: in pieces of 16 bytes, or in single elements.
struct TransposePieces {
  bool pixels, channels;
};

__host__ __device__ inline TransposePieces transpose_pieces(const TransposeParams& p) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool both = aligned(p.input) && aligned(p.output);
  return {both && p.pixels % (16 / p.element_size) == 0, both && p.channels % (16 / p.element_size) == 0};
}

template <typename Element>
struct TransposeTile {
  static constexpr int kElement = static_cast<int>(sizeof(Element));
  static constexpr int kSlice = kTransposeBytes / kElement;  // channels
  using Run = Runs<kElement>;
  static constexpr int kLanes = 8;  // runs of a channel that neighbouring lanes have
  static constexpr int kRounds = kTransposePixels / (kLanes * Run::kPixels);
  static constexpr int kWords = kTransposeBytes / 4;  // of a pixel
  static constexpr int kTurns = Run::kPixels - 1;
  static_assert(kWords * kLanes == kTransposeThreads);

  unsigned char* tile;  // shared memory, kTransposePixels * kTransposePitch bytes, 16-byte aligned
  int64_t sample;       // first element
  int first_channel, first_pixel;
  int channels, pixels;  // of the tile
  const TransposeParams& p;

  __device__ __forceinline__ TransposeTile(const TransposeParams& params, unsigned char* memory, int n, int slice,
                                           int part)
      : tile(memory),
        sample(static_cast<int64_t>(n) * params.channels * params.pixels),
        first_channel(slice * kSlice),
        first_pixel(part * kTransposePixels),
        channels(min(kSlice, params.channels - first_channel)),
        pixels(min(kTransposePixels, params.pixels - first_pixel)),
        p(params) {}

  // --- the NCHW side: a lane's runs are those of one word, kLanes lanes have neighbouring runs

  static __device__ __forceinline__ int word() { return static_cast<int>(threadIdx.x) / kLanes; }
  static __device__ __forceinline__ int pixel(int round) {
    return (static_cast<int>(threadIdx.x) % kLanes + round * kLanes) * Run::kPixels;
  }
  static __device__ __forceinline__ int turn() {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    return kElement == 2 ? lane : lane / 2;
  }
  __device__ __forceinline__ unsigned char* run_at(int round) const {
    return tile + pixel(round) * kTransposePitch + word() * 4;
  }
  __device__ __forceinline__ int64_t nchw(int channel, int at) const {
    return sample + static_cast<int64_t>(first_channel + channel) * p.pixels + first_pixel + at;
  }
  __device__ __forceinline__ bool has(int channel, int at) const { return channel < channels && at < pixels; }

  __device__ __forceinline__ void load_nchw(bool pieces) const {
    const auto* from = static_cast<const Element*>(p.input);
    if (pieces) {
      Run run[kRounds] = {};
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
#pragma unroll
        for (int k = 0; k < Run::kChannels; ++k) {
          const int channel = word() * Run::kChannels + k;
          if (has(channel, pixel(r))) run[r].run[k] = load_const<uint4>(from + nchw(channel, pixel(r)), 0);
        }
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) run[r].template to_tile<kTurns>(run_at(r), kTransposePitch, turn());
      return;
    }
    constexpr int kBatch = 8;
    constexpr int kSteps = kTransposePixels * kSlice / kTransposeThreads;
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kBatch) {
      Element value[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = static_cast<int>(threadIdx.x) + (step + u) * kTransposeThreads;
        const int channel = i / kTransposePixels, at = i % kTransposePixels;
        value[u] = has(channel, at) ? from[nchw(channel, at)] : Element{};
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = static_cast<int>(threadIdx.x) + (step + u) * kTransposeThreads;
        element(i % kTransposePixels, i / kTransposePixels) = value[u];
      }
    }
  }

  __device__ __forceinline__ void store_nchw(bool pieces) const {
    auto* to = static_cast<Element*>(p.output);
    if (pieces) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        Run run;
        run.template from_tile<kTurns>(run_at(r), kTransposePitch, turn());
#pragma unroll
        for (int k = 0; k < Run::kChannels; ++k) {
          const int channel = word() * Run::kChannels + k;
          if (has(channel, pixel(r))) *reinterpret_cast<uint4*>(to + nchw(channel, pixel(r))) = run.run[k];
        }
      }
      return;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < kTransposePixels * kSlice; i += kTransposeThreads) {
      const int channel = i / kTransposePixels, at = i % kTransposePixels;
      if (has(channel, at)) to[nchw(channel, at)] = element(at, channel);
    }
  }

  // --- the channels_last side: eight lanes have a pixel's 128 bytes

  __device__ __forceinline__ Element& element(int at, int channel) const {
    return *reinterpret_cast<Element*>(tile + at * kTransposePitch + channel * kElement);
  }
  __device__ __forceinline__ int64_t nhwc(int channel, int at) const {
    return sample + static_cast<int64_t>(first_pixel + at) * p.channels + first_channel + channel;
  }
  static constexpr int kPieces = kTransposeBytes / 16;
  static constexpr int kPixelRounds = kTransposePixels * kPieces / kTransposeThreads;
  static __device__ __forceinline__ int piece_pixel(int round) {
    return static_cast<int>(threadIdx.x) / kPieces + round * (kTransposeThreads / kPieces);
  }
  static __device__ __forceinline__ int piece_channel() {
    return static_cast<int>(threadIdx.x) % kPieces * (16 / kElement);
  }

  __device__ __forceinline__ void load_channels_last(bool pieces) const {
    const auto* from = static_cast<const Element*>(p.input);
    if (pieces) {
      uint4 value[kPixelRounds];
#pragma unroll
      for (int r = 0; r < kPixelRounds; ++r) {
        value[r] = has(piece_channel(), piece_pixel(r))
                       ? load_const<uint4>(from + nhwc(piece_channel(), piece_pixel(r)), 0)
                       : uint4{};
      }
#pragma unroll
      for (int r = 0; r < kPixelRounds; ++r) {
        *reinterpret_cast<uint4*>(&element(piece_pixel(r), piece_channel())) = value[r];
      }
      return;
    }
    constexpr int kBatch = 8;
    constexpr int kSteps = kTransposePixels * kSlice / kTransposeThreads;
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kBatch) {
      Element value[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = static_cast<int>(threadIdx.x) + (step + u) * kTransposeThreads;
        const int channel = i % kSlice, at = i / kSlice;
        value[u] = has(channel, at) ? from[nhwc(channel, at)] : Element{};
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = static_cast<int>(threadIdx.x) + (step + u) * kTransposeThreads;
        element(i / kSlice, i % kSlice) = value[u];
      }
    }
  }

  __device__ __forceinline__ void store_channels_last(bool pieces) const {
    auto* to = static_cast<Element*>(p.output);
    if (pieces) {
#pragma unroll
      for (int r = 0; r < kPixelRounds; ++r) {
        if (has(piece_channel(), piece_pixel(r))) {
          *reinterpret_cast<uint4*>(to + nhwc(piece_channel(), piece_pixel(r))) =
              *reinterpret_cast<const uint4*>(&element(piece_pixel(r), piece_channel()));
        }
      }
      return;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < kTransposePixels * kSlice; i += kTransposeThreads) {
      const int channel = i % kSlice, at = i / kSlice;
      if (has(channel, at)) to[nhwc(channel, at)] = element(at, channel);
    }
  }
};

// Tile `part` of slice `slice` of sample `n`.
template <typename Element, bool kToChannelsLast>
__device__ __forceinline__ void transpose_tile(const TransposeParams& p, TransposePieces pieces, int n, int slice,
                                               int part) {
  __shared__ alignas(16) unsigned char memory[kTransposePixels * kTransposePitch];
  const TransposeTile<Element> tile(p, memory, n, slice, part);
  if constexpr (kToChannelsLast) {
    tile.load_nchw(pieces.pixels);
    __syncthreads();
    tile.store_channels_last(pieces.channels);
  } else {
    tile.load_channels_last(pieces.channels);
    __syncthreads();
    tile.store_nchw(pieces.pixels);
  }
}

// x: parts of the picture, y: slices of channels, z: samples.
inline dim3 transpose_grid(const TransposeParams& p) {
  const int slice = kTransposeBytes / p.element_size;
  return dim3(static_cast<unsigned>((p.pixels + kTransposePixels - 1) / kTransposePixels),
              static_cast<unsigned>((p.channels + slice - 1) / slice), static_cast<unsigned>(p.batch));
}

}  // namespace styleforge::cuda
