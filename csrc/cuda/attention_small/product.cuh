// A tile of rows times weights^T by the block: both pass through a ring of stages, 256 bytes of k each, swizzled so
// that neither the copies nor ldmatrix meet in a bank.
//
// The eight warps share the columns and the steps of 32 bytes of k in a stage; add_parts adds up what the latter share.
// More steps apart rather than more columns: a warp that has many columns uses its piece of the rows (and in float32
// the splitting of it) as often, and its products do not wait for one another.
//
// Loops over stages are not unrolled, and loads stand in one place each: the block runs through its code once, so that
// the length of the code is time.
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
  static constexpr int kPairs = kColumns / 16;           // of tiles of eight columns
  static constexpr int kParts = kColumns > 256 ? 1 : 4;  // of a stage's steps
  static constexpr int kAcross = kSmallWarps / kParts;   // warps next to one another
  static constexpr int kOwn = kPairs / kAcross;          // pairs of a warp
  static constexpr int kAtOnce =
      Math::kSplit && kOwn * kGroups > 6 ? kOwn / 2 : kOwn;  // of these, for want of registers
  static constexpr int kLineBytes = 128;                     // a stage has two lines of each row
  static constexpr int kHalfBytes = (32 + kColumns) * kLineBytes;
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kStages = kColumns > 256 ? 2 : 3;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumPitch = kColumns + 8;  // rows of pairs of numbers fall into different banks
  static_assert(kRows % 16 == 0 && kRows <= 32 && kColumns % 32 == 0, "32 lines are copied at a time");
  static_assert(kOwn * kAcross == kPairs);
  static_assert(kParts * kRows * kSumPitch * static_cast<int>(sizeof(float)) <= kRingBytes);

  float sums[kOwn][kGroups][2][4] = {};

  static __device__ __forceinline__ int part() { return threadIdx.x / 32 / kAcross; }
  static __device__ __forceinline__ int first_pair() { return threadIdx.x / 32 % kAcross * kOwn; }
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
  constexpr int kLine = Tile::kLineBytes, kStages = Tile::kStages, kPerPart = kPart / 32;
  static_assert(kPart % 32 == 0 && kColumns % kPart == 0);
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x % 8, line = threadIdx.x / 8;  // what this thread copies, of each 32 lines
  const uint32_t to = ring + line * kLine + ((unit ^ (line & 7)) << 4);
  // Where nothing is to be read, the addresses are those of the first row or its first bytes: none lies outside.
  const int unit_at = unit * 16 < k_bytes ? unit * 16 : 0;
  const unsigned char* a_from = a.data + (line < a.valid ? line : 0) * a.stride + unit_at;
  const unsigned char* b_from = b.data + unit_at;
  int64_t row_at[kPerPart];
#pragma unroll
  for (int j = 0; j < kPerPart; ++j) row_at[j] = (line + j * 32 < b.valid ? line + j * 32 : 0) * b.stride;
  const int a_left = line < a.valid ? k_bytes - unit * 16 : 0;  // bytes of k that this thread has something of
  const int b_left = k_bytes - unit * 16;
  const int chunks = (k_bytes + 2 * kLine - 1) / (2 * kLine);

  const auto load_a = [&](int chunk, int stage) {
    if (kRows == 32 || line < kRows) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (2 * chunk + half) * kLine;
        const bool there = at < a_left;
        copy_async(to + stage * Tile::kStageBytes + half * Tile::kHalfBytes, a_from + (there ? at : 0), there ? 16 : 0);
      }
    }
  };
  const auto load_b = [&](int chunk, int stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = (2 * chunk + half) * kLine;
      const bool there = at < b_left;
      const uint32_t into = to + stage * Tile::kStageBytes + half * Tile::kHalfBytes + 32 * kLine;
      const unsigned char* from = b_from + (there ? at : 0);
#pragma unroll
      for (int i = 0; i < kColumns / 32; ++i) {
        copy_async(into + i * 32 * kLine, from + i / kPerPart * b.part_stride + row_at[i % kPerPart],
                   there && line + i % kPerPart * 32 < b.valid ? 16 : 0);
      }
    }
  };

  if constexpr (kWeightsFirst) {
#pragma unroll 1
    for (int i = 0; i < min(kStages - 1, chunks); ++i) load_b(i, i);
  }
  wait();

  // Lanes to rows of the four matrices: of a, rows then halves; of b, halves then rows. The steps of a line differ in
  // two bits of the address.
  constexpr int kSteps = 8 / Tile::kParts;
  const int a_row = lane % 16, b_row = lane % 8 + lane / 16 * 8;
  const int first_step = Tile::part() * kSteps;
  const uint32_t at_first = first_step / 4 * Tile::kHalfBytes, bits = first_step % 4 << 5;
  const uint32_t a_at = ring + at_first + (a_row * kLine | (((lane / 16 ^ (a_row & 7)) << 4) ^ bits));
  const uint32_t b_at = ring + at_first + (32 + Tile::first_pair() * 16) * kLine +
                        (b_row * kLine | (((lane / 8 % 2 ^ (b_row & 7)) << 4) ^ bits));
  int stage = 0, into = 0;
#pragma unroll 1
  for (int i = 0; i < chunks + kStages - 1; ++i) {
    const bool multiplies = i >= kStages - 1;
    if (multiplies) {
      copy_wait<kStages - 2>();
      __syncthreads();
    }
    if (i < chunks) {
      load_a(i, into);
      if (!kWeightsFirst || multiplies) load_b(i, into);
      into = into == kStages - 1 ? 0 : into + 1;
    }
    copy_commit();
    if (!multiplies) continue;
    const uint32_t at = stage * Tile::kStageBytes;
#pragma unroll(Tile::kAtOnce == Tile::kOwn ? 2 : 1)
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t a_stage = ((a_at + at) ^ (s % 4 << 5)) + s / 4 * Tile::kHalfBytes;
      const uint32_t b_stage = ((b_at + at) ^ (s % 4 << 5)) + s / 4 * Tile::kHalfBytes;
      Piece<Math, 4> left[Tile::kGroups];
#pragma unroll
      for (int g = 0; g < Tile::kGroups; ++g) load_matrices(left[g].hi, a_stage + g * 16 * kLine);
#pragma unroll
      for (int first = 0; first < Tile::kOwn; first += Tile::kAtOnce) {
        Piece<Math, 4> right[Tile::kAtOnce];
#pragma unroll
        for (int j = 0; j < Tile::kAtOnce; ++j) load_matrices(right[j].hi, b_stage + (first + j) * 16 * kLine);
        if (first == 0) {
#pragma unroll
          for (int g = 0; g < Tile::kGroups; ++g) round_piece(left[g]);
        }
#pragma unroll
        for (int j = 0; j < Tile::kAtOnce; ++j) {
          round_piece(right[j]);
#pragma unroll
          for (int g = 0; g < Tile::kGroups; ++g) {
#pragma unroll
            for (int t = 0; t < 2; ++t) multiply(tile.sums[first + j][g][t], left[g], right[j], 2 * t);
          }
        }
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

// Puts down the sums of this warp where add_parts finds them: outside of the stages, or wherever `between`, called once
// nobody in the block reads them any more.
template <typename Math, int kRows, int kColumns, typename Between>
__device__ __forceinline__ void write_parts(const ProductTile<Math, kRows, kColumns>& tile, unsigned char* memory,
                                            const Between& between) {
  using Tile = ProductTile<Math, kRows, kColumns>;
  const int lane = threadIdx.x % 32;
  float* sums = reinterpret_cast<float*>(memory);
  __syncthreads();
  between();
#pragma unroll
  for (int j = 0; j < Tile::kOwn; ++j) {
#pragma unroll
    for (int g = 0; g < 2 * Tile::kGroups; ++g) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float* v = tile.sums[j][g / 2][t] + g % 2 * 2;
        *reinterpret_cast<float2*>(sums + (Tile::part() * kRows + g * 8 + lane / 4) * Tile::kSumPitch +
                                   (Tile::first_pair() + j) * 16 + t * 8 + lane % 4 * 2) = make_float2(v[0], v[1]);
      }
    }
  }
}

// After a barrier: the sums of all parts in their order, four columns at a time, to store(row, column, values).
template <typename Tile, typename Store>
__device__ __forceinline__ void add_parts(const unsigned char* memory, const Store& store) {
  constexpr int kVectors = Tile::kColumns / 4;
  const float* sums = reinterpret_cast<const float*>(memory);
  for (int i = threadIdx.x; i < Tile::kRows * kVectors; i += kSmallThreads) {
    const int row = i / kVectors, column = i % kVectors * 4;
    float v[4] = {};
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const float4 more =
          *reinterpret_cast<const float4*>(sums + (part * Tile::kRows + row) * Tile::kSumPitch + column);
      v[0] += more.x;
      v[1] += more.y;
      v[2] += more.z;
      v[3] += more.w;
    }
    store(row, column, v);
  }
}

// Both, in place of the stages.
template <typename Math, int kRows, int kColumns, typename Store>
__device__ __forceinline__ void add_parts(const ProductTile<Math, kRows, kColumns>& tile, unsigned char* memory,
                                          const Store& store) {
  write_parts(tile, memory, [] {});
  __syncthreads();
  add_parts<ProductTile<Math, kRows, kColumns>>(memory, store);
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
