// The first two launches of launch.h: a head's queries, keys and values, which go through memory (that is, the L2
// cache), and its attention.
//
//   grid:  blocks of queries, heads, samples
//
// Both in one launch, with the blocks of a head as a cluster, was tried: handing keys and values on through each
// other's shared memory is slower than through the L2 cache (some 14 bytes a cycle and multiprocessor), and a barrier
// of the cluster behind stores to memory waits for these as long as a dependent launch does. What did help in 16 bits
// is not to have keys and values at all: whole.cuh.
#pragma once

#include <algorithm>

#include "../common/cluster.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

inline int padded_length(int length) { return (length + 127) / 128 * 128; }

template <typename Math, int kHeadDim_, int kRows_>
struct HeadBlock {
  using T = typename Math::T;
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_;
  using Tile = HeadTile<Math, kHeadDim, kRows>;
  using Product = ProductTile<Math, kRows, 3 * kHeadDim>;
  static constexpr int64_t kSize = sizeof(T);

  const SmallAttentionParams& p;
  const int head, sample, first_row;
  const int rows = p.length - first_row < kRows ? p.length - first_row : kRows;
  const int64_t first_token = int64_t{sample} * p.length;

#ifdef STYLEFORGE_HAS_MMA
  // A byte a key, not 0 where it takes no part; past the last one as well.
  __device__ __forceinline__ void fill_hidden(unsigned char* hidden, int padded) const {
    for (int key = threadIdx.x; key < padded; key += kSmallThreads) {
      hidden[key] =
          key >= p.length || (p.hidden != nullptr && p.hidden[sample * p.hidden_stride[0] + key * p.hidden_stride[1]]);
    }
  }

  // The head's queries, keys and values of the block's rows.
  __device__ __forceinline__ void multiply(Product& product, uint32_t ring) const {
    const ProductRows a{static_cast<const unsigned char*>(p.input) +
                            (sample * p.input_stride[0] + first_row * p.input_stride[1]) * kSize,
                        p.input_stride[1] * kSize, rows};
    const ProductWeights b{
        static_cast<const unsigned char*>(p.qkv_weight) + int64_t{head} * p.head_dim * p.embed * kSize, p.embed * kSize,
        p.embed * kSize * p.embed, p.head_dim};
    multiply_rows<kHeadDim, false>(product, ring, a, b, p.embed * static_cast<int>(kSize), [] {});
  }

  // The bias of queries, keys and values on its way to shared memory, zeros where there is none.
  __device__ __forceinline__ void load_bias(T (&bias)[3 * kHeadDim]) const {
    constexpr int kWidth = 16 / sizeof(T), kUnits = kHeadDim / kWidth;
    if (threadIdx.x >= 3 * kUnits) return;
    const int part = threadIdx.x / kUnits, d = threadIdx.x % kUnits * kWidth;
    const bool there = p.qkv_bias != nullptr && d < p.head_dim;
    const T* from = static_cast<const T*>(there ? p.qkv_bias : p.qkv_weight);
    copy_async(shared_address(bias + part * kHeadDim + d), there ? from + part * p.embed + head * p.head_dim + d : from,
               there ? 16 : 0);
  }
  // Four of the product, with it. part: queries, keys, values; d, row: inside of the head and the block.
  static __device__ __forceinline__ Vec<T, 4> with_bias(float (&v)[4], const T* bias) {
    const auto more = *reinterpret_cast<const Vec<T, 4>*>(bias);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] += to_acc(more.data[c]);
    return rounded<T, 4>(v);
  }
  __device__ __forceinline__ void store(const Vec<T, 4>& v, int row, int part, int d) const {
    *reinterpret_cast<Vec<T, 4>*>(static_cast<T*>(p.qkv) + ((first_token + first_row + row) * 3 + part) * p.embed +
                                  head * p.head_dim + d) = v;
  }

  // One past the last key that any of the rows sees.
  __device__ __forceinline__ int end_of_keys() const { return p.is_causal ? first_row + rows : p.length; }

  // One chunk; `keys` and `values` begin with it.
  __device__ __forceinline__ void attend(RunningSoftmax<Tile>& softmax, uint32_t queries, const unsigned char* keys,
                                         const unsigned char* values, const unsigned char* hidden, int chunk) const {
    const int lane = threadIdx.x % 32;
    const int group = threadIdx.x / 32 / Tile::kParts, part = threadIdx.x / 32 % Tile::kParts;
    const int in_chunk = part * Tile::kOwn * 8;
    const int first_key = chunk * Tile::kKeys + in_chunk + lane % 4 * 2;
    const int row = first_row + group * 16 + lane / 4;
    const bool all_seen = p.hidden == nullptr && (chunk + 1) * Tile::kKeys <= (p.is_causal ? first_row : p.length);
    attend_chunk<Math>(softmax, queries + group * 16 * Tile::kPitch, shared_address(keys) + in_chunk * Tile::kPitch,
                       values + in_chunk * Tile::kPitch, p.scale * kLog2E, [&](float (&s)[Tile::kOwn][4]) {
                         if (all_seen) return;
#pragma unroll
                         for (int j = 0; j < Tile::kOwn; ++j) {
#pragma unroll
                           for (int c = 0; c < 4; ++c) {
                             const int key = first_key + 8 * j + c % 2;
                             if (hidden[key] != 0 || (p.is_causal && key > row + c / 2 * 8)) s[j][c] = -INFINITY;
                           }
                         }
                       });
  }

  // After a barrier: nobody reads `memory` any more.
  __device__ __forceinline__ void finish(RunningSoftmax<Tile>& softmax, unsigned char* memory) const {
    __shared__ float most[kSmallWarps * 16], sum[kSmallWarps * 16];
    T* out = static_cast<T*>(p.attended) + (first_token + first_row) * p.embed + head * p.head_dim;
    finish_rows<Tile>(
        softmax, memory, most, sum,
        [&](int row, int column, const float (&v)[4]) {
          if (row < rows && column < p.head_dim) {
            *reinterpret_cast<Vec<T, 4>*>(out + int64_t{row} * p.embed + column) = rounded<T, 4>(v);
          }
        },
        [&](int row, float highest, float total) {
          if (p.logsumexp == nullptr || row >= rows) return;
          // Infinite where nothing is seen: e^(score - logsumexp) is 0 for the backward, whatever the score.
          p.logsumexp[(int64_t{sample} * p.heads + head) * p.length + first_row + row] =
              total == 0 ? INFINITY : (highest + log2f(total)) * kLn2;
        });
  }
#endif
};

#ifdef STYLEFORGE_HAS_MMA

template <typename Block>
__device__ __forceinline__ void project_rows(const Block& block, unsigned char* memory) {
  __shared__ __align__(16) typename Block::T bias[3 * Block::kHeadDim];
  block.load_bias(bias);
  typename Block::Product product;
  block.multiply(product, shared_address(memory));
  add_parts(product, memory, [&](int row, int column, float (&v)[4]) {
    const int part = column / Block::kHeadDim, d = column % Block::kHeadDim;
    if (row < block.rows && d < block.p.head_dim) block.store(Block::with_bias(v, bias + column), row, part, d);
  });
}

template <typename Block>
__device__ __forceinline__ void attend_rows(const Block& block, unsigned char* dynamic, int padded) {
  using Tile = typename Block::Tile;
  constexpr int kStages = Tile::kMostStages;
  const SmallAttentionParams& p = block.p;
  unsigned char* memory = dynamic + padded;  // queries, then the stages
  const auto size = static_cast<int>(Block::kSize);
  const HeadPlace place{
      static_cast<const unsigned char*>(p.qkv) + (block.first_token * 3 * p.embed + block.head * p.head_dim) * size,
      int64_t{3} * p.embed * size, int64_t{p.embed} * size, p.head_dim * size, p.length};
  unsigned char* stages = memory + Tile::kQueryBytes;
  load_tokens<Tile, Tile::kRows>(shared_address(memory), place, 0, block.first_row);

  RunningSoftmax<Tile> softmax;
  const int chunks = (block.end_of_keys() + Tile::kKeys - 1) / Tile::kKeys;
  int stage = 0, into = 0;
#pragma unroll 1
  for (int i = 0; i < chunks + kStages - 1; ++i) {
    const int chunk = i - (kStages - 1);
    if (chunk >= 0) {
      copy_wait<kStages - 2>();
      __syncthreads();
    }
    if (i < chunks) {
      const uint32_t to = shared_address(stages) + into * Tile::kStageBytes;
      load_tokens<Tile, Tile::kKeys>(to, place, 1, i * Tile::kKeys);
      load_tokens<Tile, Tile::kKeys>(to + Tile::kKeys * Tile::kPitch, place, 2, i * Tile::kKeys);
      into = into == kStages - 1 ? 0 : into + 1;
    }
    copy_commit();
    if (i == 0) block.fill_hidden(dynamic, padded);
    if (chunk < 0) continue;
    const unsigned char* keys = stages + stage * Tile::kStageBytes;
    block.attend(softmax, shared_address(memory), keys, keys + Tile::kKeys * Tile::kPitch, dynamic, chunk);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  __syncthreads();
  block.finish(softmax, memory);
}

#endif  // STYLEFORGE_HAS_MMA

template <typename Math, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_project_kernel(const __grid_constant__ SmallAttentionParams p) {
#ifdef STYLEFORGE_HAS_MMA
  using Block = HeadBlock<Math, kHeadDim, kRows>;
  extern __shared__ __align__(128) unsigned char memory[];
  const Block block{p, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                    static_cast<int>(blockIdx.x) * kRows};
  wait_for_predecessor();
  release_successor();
  project_rows(block, memory);
#endif
}

template <typename Math, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_attend_kernel(const __grid_constant__ SmallAttentionParams p, int padded) {
#ifdef STYLEFORGE_HAS_MMA
  using Block = HeadBlock<Math, kHeadDim, kRows>;
  extern __shared__ __align__(128) unsigned char memory[];
  const Block block{p, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                    static_cast<int>(blockIdx.x) * kRows};
  wait_for_predecessor();
  release_successor();
  attend_rows(block, memory, padded);
#endif
}

}  // namespace styleforge::cuda
