// Where a tile lies; shared by the convolution and the pass that merges the tiles' moments.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

struct ConvTileAt {
  int phase, y, x;    // first pixel, in pixels of its phase
  int rows, columns;  // valid ones
};

// Tile `entry` of a sample: phases outermost, then rows of tiles.
__host__ __device__ __forceinline__ ConvTileAt conv_tile(const ConvParams& p, const ConvSchedule& s, int entry) {
  const int per_phase = s.tiles_x * s.tiles_y;
  ConvTileAt at;
  at.phase = p.phases == 1 ? 0 : entry / per_phase;
  const int tile = entry - at.phase * per_phase;
  const int ty = tile / s.tiles_x;
  at.y = ty * s.tile_height;
  at.x = (tile - ty * s.tiles_x) * ConvSchedule::kTileWidth;
  const int height = p.phases == 1 ? p.out_height : p.height;
  const int width = p.phases == 1 ? p.out_width : p.width;
  at.rows = height - at.y < s.tile_height ? height - at.y : s.tile_height;
  at.columns = width - at.x < ConvSchedule::kTileWidth ? width - at.x : ConvSchedule::kTileWidth;
  return at;
}

}  // namespace styleforge::cuda
