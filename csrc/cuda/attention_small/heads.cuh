// The first kernel of launch.h: a head's queries, keys and values, and its attention.
//
//   grid:     blocks of queries, heads, samples
//   cluster:  the blocks of a head
//   block:    projects its rows to the head's queries, keys and values, waits for the others of the cluster, reads
//   their
//             keys and values from memory (they lie in the L2 cache) and attends
//
// Or one half of that in each of two launches, where more blocks than a cluster holds are wanted.
#pragma once

#include <algorithm>

#include "../common/cluster.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <typename Math, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kSmallThreads, kHeadDim == 32 && !(Math::kSplit && kRows == 32) ? 2 : 1)
    small_heads_kernel(const __grid_constant__ SmallAttentionParams p, int stages, int cluster) {
#ifdef STYLEFORGE_HAS_MMA
  using T = typename Math::T;
  using Tile = HeadTile<Math, kHeadDim, kRows>;
  using Product = ProductTile<Math, kRows, 3 * kHeadDim>;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ float most[kSmallWarps * 16], sum[kSmallWarps * 16];
  const int padded_length = (p.length + 127) / 128 * 128;
  unsigned char* hidden = dynamic;  // a byte a key
  unsigned char* memory = dynamic + padded_length;
  const uint32_t ring = shared_address(memory);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.y, sample = blockIdx.z;
  const int first_row = blockIdx.x * kRows;
  const int rows = min(kRows, p.length - first_row);  // not above 0 in the blocks that fill up a cluster
  const int64_t first_token = int64_t{sample} * p.length;
  constexpr int64_t kSize = sizeof(T);

  wait_for_predecessor();
  release_successor();

  for (int key = threadIdx.x; key < padded_length; key += kSmallThreads) {
    hidden[key] =
        key >= p.length || (p.hidden != nullptr && p.hidden[sample * p.hidden_stride[0] + key * p.hidden_stride[1]]);
  }

  if (stages & kProjectHeads) {
    Product product;
    const ProductRows a{static_cast<const unsigned char*>(p.input) +
                            (sample * p.input_stride[0] + first_row * p.input_stride[1]) * kSize,
                        p.input_stride[1] * kSize, rows};
    const ProductWeights b{static_cast<const unsigned char*>(p.qkv_weight) + head * p.head_dim * p.embed * kSize,
                           p.embed * kSize, p.embed * kSize * p.embed, p.head_dim};
    if (rows > 0) {
      multiply_rows<kHeadDim, false>(product, ring, a, b, p.embed * static_cast<int>(kSize), [] {});
    }
    T* out = static_cast<T*>(p.qkv) + (first_token + first_row) * 3 * p.embed + head * p.head_dim;
    const T* bias = static_cast<const T*>(p.qkv_bias) + head * p.head_dim;
    add_parts(product, memory, [&](int row, int column, float (&v)[4]) {
      const int part = column / kHeadDim, d = column % kHeadDim;
      if (row >= rows || d >= p.head_dim) return;
      if (p.qkv_bias != nullptr) {
        const auto more = *reinterpret_cast<const Vec<T, 4>*>(bias + part * p.embed + d);
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] += to_acc(more.data[c]);
      }
      *reinterpret_cast<Vec<T, 4>*>(out + (int64_t{row} * 3 + part) * p.embed + d) = rounded<T, 4>(v);
    });
    if (!(stages & kAttendHeads)) return;
    if (cluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  if (rows <= 0) return;

  const HeadPlace place{
      static_cast<const unsigned char*>(p.qkv) + (first_token * 3 * p.embed + head * p.head_dim) * kSize,
      3 * p.embed * kSize,
      p.embed * kSize,
      p.head_dim * static_cast<int>(kSize),
      p.length,
      first_row};
  const int last_key = p.is_causal ? first_row + rows : p.length;  // and no further
  const int chunks = (last_key + Tile::kKeys - 1) / Tile::kKeys;
  const uint32_t keys = ring + Tile::kQueryBytes;
  constexpr int kStages = Tile::kMostStages;
  load_tokens<Tile, kRows>(ring, place, 0, first_row);

  RunningSoftmax<Tile> softmax;
  softmax.most[0] = softmax.most[1] = -INFINITY;
  const int group = warp / Tile::kParts, part = warp % Tile::kParts;
  const uint32_t queries = ring + group * 16 * Tile::kPitch;
  const float scale = p.scale * kLog2E;
  const int own_row = first_row + group * 16 + lane / 4;
  int stage = 0, into = 0;
#pragma unroll 1
  for (int i = 0; i < chunks + kStages - 1; ++i) {
    const int chunk = i - (kStages - 1);
    if (chunk >= 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
    }
    if (i < chunks) {
      const uint32_t to = keys + into * Tile::kStageBytes;
      load_tokens<Tile, Tile::kKeys>(to, place, 1, i * Tile::kKeys);
      load_tokens<Tile, Tile::kKeys>(to + Tile::kKeys * Tile::kPitch, place, 2, i * Tile::kKeys);
      into = into == kStages - 1 ? 0 : into + 1;
    }
    commit_copies();
    if (chunk < 0) continue;
    const int in_chunk = part * Tile::kOwn * 8;
    const int first_key = chunk * Tile::kKeys + in_chunk;
    const uint32_t at = stage * Tile::kStageBytes + in_chunk * Tile::kPitch;
    const bool all_seen = p.hidden == nullptr && (chunk + 1) * Tile::kKeys <= (p.is_causal ? first_row : p.length);
    attend_chunk<Math, Tile>(softmax, queries, keys + at, memory + Tile::kQueryBytes + at + Tile::kKeys * Tile::kPitch,
                             scale, [&](float (&s)[Tile::kOwn][4]) {
                               if (all_seen) return;
#pragma unroll
                               for (int j = 0; j < Tile::kOwn; ++j) {
#pragma unroll
                                 for (int c = 0; c < 4; ++c) {
                                   const int key = first_key + 8 * j + lane % 4 * 2 + c % 2;
                                   if (hidden[key] != 0 || (p.is_causal && key > own_row + c / 2 * 8)) {
                                     s[j][c] = -INFINITY;
                                   }
                                 }
                               }
                             });
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  __syncthreads();  // nobody reads the stages any more

  T* out = static_cast<T*>(p.attended) + (first_token + first_row) * p.embed + head * p.head_dim;
  finish_rows<Tile>(
      softmax, memory, most, sum,
      [&](int row, int column, const float (&v)[4]) {
        if (row < rows && column < p.head_dim) {
          *reinterpret_cast<Vec<T, 4>*>(out + int64_t{row} * p.embed + column) = rounded<T, 4>(v);
        }
      },
      [&](int row, float logarithm) {
        if (p.logsumexp != nullptr && row < rows) {
          p.logsumexp[(int64_t{sample} * p.heads + head) * p.length + first_row + row] = logarithm * kLn2;
        }
      });
#endif
}

template <typename Math, int kHeadDim, int kRows>
cudaError_t launch_small_heads(const SmallAttentionParams& p, const SmallAttentionSchedule& s, int stages,
                               cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int padded_length = (p.length + 127) / 128 * 128;
  const int product = stages & kProjectHeads ? ProductTile<Math, kRows, 3 * kHeadDim>::kRingBytes : 0;
  const int attend = stages & kAttendHeads ? HeadTile<Math, kHeadDim, kRows>::bytes(p.length) : 0;
  const int together = stages == (kProjectHeads | kAttendHeads) ? s.cluster : 1;
  const int64_t blocks = ceil_div(ceil_div(p.length, kRows), together) * together;
  return launch(small_heads_kernel<Math, kHeadDim, kRows>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch)),
                dim3(kSmallThreads), static_cast<size_t>(padded_length + std::max(product, attend)), together, facts,
                stream, p, stages, together);
}

template <typename Math>
cudaError_t launch_small_heads(const SmallAttentionParams& p, const SmallAttentionSchedule& s, int stages,
                               cudaStream_t stream) {
  const auto with_rows = [&]<int kHeadDim>() {
    return s.rows == 16 ? launch_small_heads<Math, kHeadDim, 16>(p, s, stages, stream)
                        : launch_small_heads<Math, kHeadDim, 32>(p, s, stages, stream);
  };
  switch (s.head_dim) {
    case 32:
      return with_rows.template operator()<32>();
#ifndef STYLEFORGE_QUICK
    case 64:
      return with_rows.template operator()<64>();
    case 128:
      // Sixteen rows of float32 leave a warp fewer keys of a chunk than the tiles come in.
      if constexpr (sizeof(typename Math::T) == 2) return with_rows.template operator()<128>();
      return launch_small_heads<Math, 128, 32>(p, s, stages, stream);
#endif
  }
  return cudaErrorInvalidValue;
}

}  // namespace styleforge::cuda
