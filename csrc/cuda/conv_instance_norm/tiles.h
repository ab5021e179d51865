// Where a tile and its moments lie; shared by the convolution and the pass that merges the moments.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

// Bytes between two pixels of a tile in shared memory, padded so that a warp's writes of fragments fall into different
// banks.
__host__ __device__ constexpr int stash_pitch(int columns, int element) {
  return columns * element + (element == 2 ? 16 : 32);
}

// Channels that a block merges at a time where the merge is a step of its own: a sector of 32 bytes of moments.
constexpr int kMergeSlice = 4;

// How often a resident grid waits for itself.
__host__ __device__ constexpr int grid_waits(const ConvSchedule& s) { return s.merge_apart ? 2 : 1; }

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

// Where the merged moments of a sample lie: (mean, rstd times the norm's weight) of each channel.
__device__ __forceinline__ float2* merged(const ConvParams& p, const ConvSchedule& s, int n) {
  return p.moments + (static_cast<int64_t>(p.batch) * s.entries + n) * p.out_channels;
}

}  // namespace styleforge::cuda
