// How channels_last tensors are cut in the two-pass kernels, forward and backward: tile = `share` pixels of one sample
// by `lanes` vectors of channels, one block of kTileThreads each.
#pragma once

#include "../../instance_norm_params.h"

namespace styleforge::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileBlocks = 2;  // backward: of a multiprocessor, at the same time
constexpr int kMergeWarps = 32;

template <int kWidth>
struct ChannelTile {
  int64_t n;
  int tile, vector, row, rows, count, vectors;
  bool active;
  int64_t begin;  // the tile's first pixel
  int64_t first;  // index of the thread's vector in it

  // of the thread's vector in the tile's i-th pixel
  __device__ __forceinline__ int64_t index(int i) const { return first + static_cast<int64_t>(i) * vectors; }
};

// Blocks are numbered slices fastest: the slices of one tile are neighbours in memory and run at the same time.
template <int kWidth>
__device__ __forceinline__ ChannelTile<kWidth> channel_tile(const InstanceNormParams& p, int lanes, int tiles,
                                                            int share, unsigned block) {
  ChannelTile<kWidth> at;
  at.vectors = static_cast<int>(p.channels / kWidth);
  // 32-bit: a division of 64-bit numbers is a hundred instructions, one after the other.
  const auto slices = static_cast<unsigned>((at.vectors + lanes - 1) / lanes);
  const unsigned tile = block / slices;
  const unsigned n = tile / static_cast<unsigned>(tiles);
  at.vector = static_cast<int>(block - tile * slices) * lanes + static_cast<int>(threadIdx.x) % lanes;
  at.active = at.vector < at.vectors;
  at.tile = static_cast<int>(tile - n * tiles);
  at.n = n;
  at.row = static_cast<int>(threadIdx.x) / lanes;
  at.rows = kTileThreads / lanes;
  at.begin = static_cast<int64_t>(at.tile) * share;
  at.count = static_cast<int>(max(min(static_cast<int64_t>(share), p.pixels - at.begin), int64_t(0)));
  at.first = (at.n * p.pixels + at.begin) * at.vectors + at.vector;
  return at;
}

}  // namespace styleforge::cuda
