// Where a tile and its moments lie; shared by the convolution and the pass that merges the moments.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

// Bytes between two pixels of a tile in shared memory, padded so that a warp's writes of fragments fall into different
// banks.
__host__ __device__ constexpr int stash_pitch(int columns, int element) {
  return columns * element + (element == 2 ? 16 : columns % 32 == 0 ? 32 : 96);
}

// Of conv_sm90.cu's rings.
constexpr int kMaxInputStages = 4, kMaxWeightStages = 8;

// Channels that a block merges at a time where the merge is a step of its own: a sector of 32 bytes of moments.
constexpr int kMergeSlice = 4;

// ConvSchedule::lean: kernels of conv_sm90_lean.cu with moments by the tensor cores, and also with the merge of
// merge_lean.cuh.
constexpr int kLeanMoments = 1, kLeanMerge = 2;

// What the fused kernels take: those that rewrite weights number their threads in 32 bits, the idle ones of a last
// block or plane of blocks included.
constexpr int64_t kMaxWeights = INT32_MAX / 2;
inline int64_t weights_of(const ConvParams& p) {
  return int64_t{p.phases} * p.out_channels * p.kernel_h * p.kernel_w * p.in_channels;
}

// __umulhi(value, rounded_reciprocal(d)) is value / d where value * d < 2^32 and d > 1.
inline unsigned rounded_reciprocal(int d) {
  return static_cast<unsigned>((uint64_t{1} << 32) / static_cast<unsigned>(d) + 1);
}

struct ConvTileAt {
  int phase, y, x;    // first pixel, in pixels of its phase
  int rows, columns;  // valid ones
};

// Tile `entry` of a sample: phases outermost, then rows of tiles.
__device__ __forceinline__ ConvTileAt conv_tile(const ConvParams& p, const ConvSchedule& s, int entry) {
  const int per_phase = s.tiles_x * s.tiles_y;
  ConvTileAt at;
  at.phase = p.phases == 1 ? 0 : entry / per_phase;
  const int tile = entry - at.phase * per_phase;
  const int ty = s.tiles_x == 1 ? tile : static_cast<int>(__umulhi(tile, s.tiles_x_divisor));
  at.y = ty * s.tile_height;
  at.x = (tile - ty * s.tiles_x) * ConvSchedule::kTileWidth;
  const int height = p.phases == 1 ? p.out_height : p.height;
  const int width = p.phases == 1 ? p.out_width : p.width;
  at.rows = height - at.y < s.tile_height ? height - at.y : s.tile_height;
  at.columns = width - at.x < ConvSchedule::kTileWidth ? width - at.x : ConvSchedule::kTileWidth;
  return at;
}

// The same of a plain convolution whose tiles are all full.
__device__ __forceinline__ ConvTileAt full_tile(const ConvSchedule& s, int entry, int rows) {
  const int ty = s.tiles_x == 1 ? entry : static_cast<int>(__umulhi(entry, s.tiles_x_divisor));
  return {0, ty * rows, (entry - ty * s.tiles_x) * ConvSchedule::kTileWidth, rows, ConvSchedule::kTileWidth};
}

// Valid pixels of the tiles from `begin` to before `end`.
__device__ __forceinline__ int pixels_of(const ConvParams& p, const ConvSchedule& s, int begin, int end) {
  int pixels = 0;
  for (int tile = begin; tile < end; ++tile) {
    const ConvTileAt at = conv_tile(p, s, tile);
    pixels += at.rows * at.columns;
  }
  return pixels;
}

// Tiles that share an entry of moments: all of a block where the grid is resident, else one.
__host__ __device__ constexpr int tiles_of_partial(const ConvSchedule& s) { return s.resident ? s.tiles : 1; }
// Entries of moments of a sample.
__host__ __device__ constexpr int partials(const ConvSchedule& s) {
  return tiles_of_partial(s) == 1 ? s.entries : (s.entries + s.tiles - 1) / s.tiles;
}

// Where the merged moments of a sample lie: (mean, rstd times the norm's weight) of each channel.
__device__ __forceinline__ float2* merged(const ConvParams& p, const ConvSchedule& s, int n) {
  return p.moments + (static_cast<int64_t>(p.batch) * s.entries + n) * p.out_channels;
}

}  // namespace styleforge::cuda
