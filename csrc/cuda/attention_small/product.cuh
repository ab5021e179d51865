// A tile of rows times weights^T by the block: both pass through a ring of stages, 128 bytes of k each, swizzled so
// that neither the copies nor ldmatrix meet in a bank.
//
// The eight warps share the columns, 16 at a time; where there are too few for all of them, they share the four steps
// of 32 bytes of each stage as well, and the caller adds up their sums.
#pragma once

#include "../common/mbarrier.cuh"
#include "mma.cuh"

namespace styleforge::cuda {

constexpr int kSmallThreads = 256;
constexpr int kSmallWarps = kSmallThreads / 32;

template <typename Math, int kRows_, int kColumns_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kGroups = kRows / 16;
  static constexpr int kPairs = kColumns / 16;                          // of tiles of eight columns
  static constexpr int kParts = kPairs >= 6 ? 1 : kPairs >= 4 ? 2 : 4;  // of a stage's steps
  static constexpr int kAcross = kSmallWarps / kParts;
  static constexpr int kOwn = (kPairs + kAcross - 1) / kAcross;  // pairs of a warp
  static constexpr int kLineBytes = 128;
  static constexpr int kStageBytes = (32 + kColumns) * kLineBytes;
  static constexpr int kStages = kStageBytes <= 32 * 1024 ? 5 : 4;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static_assert(kRows % 16 == 0 && kRows <= 32 && kColumns % 32 == 0, "32 lines are copied at a time");

  float sums[kOwn][kGroups][2][4] = {};

  static __device__ __forceinline__ int part() { return threadIdx.x / 32 / kAcross; }
  // Own pair i of this warp; at least kPairs where there is none.
  static __device__ __forceinline__ int pair(int i) { return threadIdx.x / 32 % kAcross + i * kAcross; }
};

// Rows of a in memory: `valid` of the tile's are there.
struct ProductRows {
  const unsigned char* data;
  int64_t stride;  // in bytes
  int valid;
};
// Weights in memory: in parts of kPart columns, of which `valid` are there; parts lie `part_stride` bytes apart.
struct ProductWeights {
  const unsigned char* data;
  int64_t stride, part_stride;
  int valid;
};

#ifdef STYLEFORGE_HAS_MMA

// `wait` is called before the rows are read; with kWeightsFirst after the first weights are on their way.
template <int kPart, bool kWeightsFirst, typename Math, int kRows, int kColumns, typename Wait>
__device__ __forceinline__ void multiply_rows(ProductTile<Math, kRows, kColumns>& tile, uint32_t ring,
                                              const ProductRows& a, const ProductWeights& b, int k_bytes,
                                              const Wait& wait) {
  using Tile = ProductTile<Math, kRows, kColumns>;
  constexpr int kLine = Tile::kLineBytes, kStages = Tile::kStages;
  static_assert(kPart % 32 == 0 && kColumns % kPart == 0);
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x % 8, line = threadIdx.x / 8;  // what this thread copies, of each 32 lines
  const uint32_t to = ring + line * kLine + ((unit ^ (line & 7)) << 4);
  const unsigned char* a_from = a.data + line * a.stride + unit * 16;
  const unsigned char* b_from = b.data + line * b.stride + unit * 16;
  const bool a_there = line < a.valid;
  const int chunks = (k_bytes + kLine - 1) / kLine;

  const auto load_a = [&](int chunk, int stage) {
    const int at = chunk * kLine;
    const bool there = a_there && at + unit * 16 < k_bytes;
    if (kRows == 32 || line < kRows) {
      copy_async(to + stage * Tile::kStageBytes, there ? a_from + at : a.data, there ? 16 : 0);
    }
  };
  const auto load_b = [&](int chunk, int stage) {
    const int at = chunk * kLine;
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) {
      constexpr int kPerPart = kPart / 32;
      const bool there = line + i % kPerPart * 32 < b.valid && at + unit * 16 < k_bytes;
      const unsigned char* from = b_from + i / kPerPart * b.part_stride + i % kPerPart * 32 * b.stride + at;
      copy_async(to + stage * Tile::kStageBytes + (32 + i * 32) * kLine, there ? from : b.data, there ? 16 : 0);
    }
  };

  if constexpr (kWeightsFirst) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < chunks) load_b(i, i);
    }
  }
  wait();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < chunks) {
      load_a(i, i);
      if constexpr (!kWeightsFirst) load_b(i, i);
    }
    commit_copies();
  }

  // Lanes to rows of the four matrices: of a, rows then halves; of b, halves then rows.
  const int a_row = lane % 16, a_half = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_half = lane / 8 % 2;
  const uint32_t a_at = ring + a_row * kLine, b_at = ring + (32 + b_row) * kLine;
  int stage = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<kStages - 2>();
    __syncthreads();
    const int next = chunk + kStages - 1, into = stage == 0 ? kStages - 1 : stage - 1;
    if (next < chunks) {
      load_a(next, into);
      load_b(next, into);
    }
    commit_copies();
    const uint32_t a_stage = a_at + stage * Tile::kStageBytes, b_stage = b_at + stage * Tile::kStageBytes;
#pragma unroll
    for (int s = 0; s < 4 / Tile::kParts; ++s) {
      const int step = Tile::part() * (4 / Tile::kParts) + s;
      Piece<Math, 4> left[Tile::kGroups];
#pragma unroll
      for (int g = 0; g < Tile::kGroups; ++g) {
        load_matrices(left[g].hi, a_stage + g * 16 * kLine + (((2 * step + a_half) ^ (a_row & 7)) << 4));
        round_piece(left[g]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kOwn; ++i) {
        const int pair = Tile::pair(i);
        if (Tile::kOwn * Tile::kAcross != Tile::kPairs && pair >= Tile::kPairs) continue;
        Piece<Math, 4> right;
        load_matrices(right.hi, b_stage + pair * 16 * kLine + (((2 * step + b_half) ^ (b_row & 7)) << 4));
        round_piece(right);
#pragma unroll
        for (int g = 0; g < Tile::kGroups; ++g) {
#pragma unroll
          for (int t = 0; t < 2; ++t) multiply(tile.sums[i][g][t], left[g], right, 2 * t);
        }
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
