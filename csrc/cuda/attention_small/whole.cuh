// The whole attention block of a short sequence in one launch, 16-bit numbers on wgmma (sm_90a).
//
//   cluster:  kRows queries of a sample; its blocks are the heads
//   block:    two warpgroups, all tokens of the sample in shared memory
//
// Keys and values are never computed. With queries q, a head's scores and result are products of the tokens themselves:
//
//   q k^T = (q Wk) x^T            (the bias of the keys adds the same to a row's every score: softmax drops it)
//   softmax(.) v = (softmax(.) x) Wv^T + bv
//
// For a few queries at a time that is no more work than a head's keys and values would be, nothing has to be handed
// from block to block before the very end, and so there is no second launch: what such sizes cost is the latency of
// launches, loads and barriers, not their arithmetic. (Rounding: q Wk and softmax(.) x take the places of k and v among
// what is rounded to 16 bits, and errors are those of the usual order of products.)
//
// All products have the same form: transposed, result^T = A B^T. A is 64 rows at a time of what was loaded, the weights
// or the tokens, read along either dimension; B is the block's activations, [rows, columns] in shared memory, which the
// result is written as again. At the end heads tell one another their results through the cluster's shared memory, and
// each block makes its share of the output's columns: sums over heads have the order of the tensor core, always the
// same.
//
// Where the time of 1 x 128 x 128 goes (one H200): of 3.3 us, 0.9 are the start of a launch behind another; of the
// 4,500 cycles of the rest the first load takes 780, queries and their product with the keys' weights 660, scores 440,
// softmax 650, the mean 490 and 250 to put it down, the head's result and its way to the others 830, the output 410.
// Tried and slower: small products cut by queries among both warpgroups, which reads the weights twice (100 to 300
// cycles each); a cluster barrier with release, which waits for memory (600); whether a token is hidden asked of each
// score (700).
#pragma once

#include "whole_tile.cuh"

namespace styleforge::cuda {

template <typename Tile>
__global__ void __launch_bounds__(kWholeThreads, 1)
    small_whole_kernel(const __grid_constant__ SmallAttentionParams p, const __grid_constant__ CUtensorMap queries,
                       const __grid_constant__ CUtensorMap tokens, const __grid_constant__ CUtensorMap qkv_weight,
                       const __grid_constant__ CUtensorMap out_weight) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = typename Tile::T;
  constexpr int kRows = Tile::kRows, kHeadDim = Tile::kHeadDim, kEmbed = Tile::kEmbed, kBoxes = Tile::kBoxes;
  constexpr int kChunks = Tile::kChunks, kValues = Tile::kValues, kHeads = Tile::kHeads, kCount = kRows / 2;
  constexpr bool kHalf = std::is_same_v<T, __half>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t at = shared_address(memory);

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int group = warp / 4, quarter = warp % 4;
  const int head = blockIdx.x, sample = blockIdx.z;
  const int first_row = blockIdx.y * kRows;
  const uint32_t barriers = at + Tile::kBarriersAt;
  const uint32_t queries_here = barriers, key_weight_here = barriers + 8, value_weight_here = barriers + 16,
                 out_weight_here = barriers + 24, heads_here = barriers + 32, chunks_here = barriers + 40;

  if (threadIdx.x == 0) {
    if ((at & 1023) != 0) asm volatile("trap;");
    prefetch_map(&qkv_weight);
    prefetch_map(&queries);
    prefetch_map(&tokens);
    prefetch_map(&out_weight);
    auto* barrier = reinterpret_cast<uint64_t*>(memory + Tile::kBarriersAt);
    for (int i = 0; i < Tile::kBarriers; ++i) mbarrier_init(barrier + i, i == 4 ? 128 + 1 : 1);
    mbarrier_init_fence();
    expect_bytes(heads_here, (kHeads - 1) * kRows * kHeadDim * sizeof(T));  // of the other heads
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();

  // One thread loads, in the order of use, and of the warpgroup that has nothing to do at first.
  const bool loads = threadIdx.x == 128;
  const auto load_values = [&] {
    expect_bytes(value_weight_here, Tile::kWeight);
    load_rows(at + Tile::kValueWeightAt, &qkv_weight, 2 * kEmbed + head * kHeadDim, value_weight_here);
  };
  const auto load_out = [&] {
    expect_bytes(out_weight_here, Tile::kWeight);
    load_rows(at + Tile::kOutWeightAt, &out_weight, head * kHeadDim, out_weight_here);
  };
  if (loads) {
    expect_bytes(queries_here, Tile::kWeight + kBoxes * Tile::kRowBox);
    load_rows(at + Tile::kQueryWeightAt, &qkv_weight, head * kHeadDim, queries_here);
    load_rows(at + Tile::kSecondAt, &queries, first_row, sample, queries_here);
    expect_bytes(key_weight_here, Tile::kWeight);
    load_rows(at + Tile::kKeyWeightAt, &qkv_weight, kEmbed + head * kHeadDim, key_weight_here);
    for (int i = 0; i < kChunks; ++i) {
      expect_bytes(chunks_here + 8 * i, Tile::kChunk);
      load_rows(at + Tile::kTokensAt + i * Tile::kChunk, &tokens, i * 128, sample, chunks_here + 8 * i);
    }
    if constexpr (!Tile::kInPlace) {
      load_values();
      load_out();
    }
  }
  __syncwarp();

  // This thread's rows of a transposed result of the head's columns, which the first warpgroup makes: their biases.
  float query_bias[2] = {}, value_bias[2] = {}, out_bias[2] = {};
  const bool in_head = group == 0 && quarter * 16 < kHeadDim;  // whether the warp has any
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int column = head * kHeadDim + quarter * 16 + lane / 4 + 8 * h;
    if (in_head && p.qkv_bias != nullptr) {
      const T* from = static_cast<const T*>(p.qkv_bias) + column;
      // That of the keys makes no difference, unless it is no number.
      query_bias[h] = to_acc(from[0]) + 0.0f * to_acc(from[kEmbed]);
      value_bias[h] = to_acc(from[2 * kEmbed]);
    }
    if (in_head && p.out_bias != nullptr) out_bias[h] = to_acc(static_cast<const T*>(p.out_bias)[column]);
  }
  // Whether a token takes no part, two bits a chunk: this thread's rows of transposed scores.
  const auto token_of = [&](int i, int h) { return i * 128 + group * 64 + quarter * 16 + lane / 4 + 8 * h; };
  const bool some_hidden = p.hidden != nullptr || p.is_causal || p.length < Tile::kKeys;
  uint32_t hidden = 0;
  if (some_hidden) {
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const int token = token_of(i / 2, i % 2);
      bool hides = token >= p.length;
      if (!hides && p.hidden != nullptr) hides = p.hidden[sample * p.hidden_stride[0] + token * p.hidden_stride[1]];
      hidden |= static_cast<uint32_t>(hides) << i;
    }
  }

  float* const statistics = reinterpret_cast<float*>(memory + Tile::kStatisticsAt);
  float* const highest_of = statistics;             // [warp][query], first of the queries' numbers, then of scores
  float* const total_of = statistics + 8 * kRows;   // [warp][query]
  float* const share_of = statistics + 16 * kRows;  // [query]
  const uint32_t first = at + Tile::kFirstAt, second = at + Tile::kSecondAt;
  // Of products of 64 rows one warpgroup makes all: two would read the same rows twice, which is what takes the time.
  const auto multiply_whole = [&](float (&d)[kCount], uint32_t a_at, uint32_t b_at) {
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const uint64_t a = wgmma_descriptor(a_at + box * Tile::kWeightBox);
      const uint64_t b = wgmma_descriptor(b_at + box * Tile::kRowBox);
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(d, a + 2 * k, b + 2 * k, box > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
  };

  // Queries.
  if (group == 0) {
    float d[kCount];
    mbarrier_wait(queries_here, 0);
    multiply_whole(d, at + Tile::kQueryWeightAt, second);
    if (in_head) {
      const float sign = p.scale < 0 ? -1.0f : 1.0f;
#pragma unroll
      for (int c = 0; c < kCount; ++c) d[c] = (d[c] + query_bias[c / 2 % 2]) * sign;
      store_columns<T>(first, 2 * quarter, d);
      if constexpr (kHalf) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          float most = fmaxf(fabsf(d[j / 2 * 4 + j % 2]), fabsf(d[j / 2 * 4 + j % 2 + 2]));
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
          if (lane < 4) highest_of[quarter * kRows + j / 2 * 8 + lane * 2 + j % 2] = most;
        }
      }
    }
    fence_async_shared();
  }
  __syncthreads();
  if constexpr (Tile::kInPlace) {
    if (loads) load_out();
    __syncwarp();
  }

  // Of a score: what makes it a power of two. Not negative, which is the queries' sign, nor zero: 0 times infinity.
  constexpr float kLog2E = 1.4426950408889634f, kLeast = 1.2e-38f;
  float factor[kHalf ? kValues : 1];
  // Queries times the keys' weights: each warpgroup every other 64 columns.
  {
    float d[kBoxes / 2][kCount];
    mbarrier_wait(key_weight_here, 0);
    wgmma_fence();
    const uint64_t b = wgmma_descriptor(first);
#pragma unroll
    for (int j = 0; j < kBoxes / 2; ++j) {
      const uint64_t a = wgmma_descriptor(at + Tile::kKeyWeightAt + (2 * j + group) * Tile::kWeightBox);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) multiply_boxes<T, true>(d[j], a + 128 * k, b + 2 * k, k > 0);
    }
    wgmma_commit();
    factor[0] = fabsf(p.scale) * kLog2E;
    if constexpr (kHalf) {
      // float16 ends at 65504: a query's numbers are brought below 1/8 for this product, by a power of two.
      float down[kValues];
      const float whole = factor[0];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        float most = 0;
#pragma unroll
        for (int w = 0; w < kHeadDim / 16; ++w) {
          most = fmaxf(most, highest_of[w * kRows + j / 2 * 8 + lane % 4 * 2 + j % 2]);
        }
        const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
        down[j] = __uint_as_float(static_cast<uint32_t>(max(250 - exponent, 1)) << 23);
        factor[j] = __uint_as_float(static_cast<uint32_t>(min(exponent + 4, 254)) << 23) * whole;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < kBoxes / 2; ++j) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) d[j][c] *= down[c / 4 * 2 + c % 2];
      }
    } else {
      wgmma_wait<0>();
    }
#pragma unroll
    for (float& f : factor) f = f < kLeast ? kLeast : f;
#pragma unroll
    for (int j = 0; j < kBoxes / 2; ++j) store_columns<T>(second + (2 * j + group) * Tile::kRowBox, 2 * quarter, d[j]);
    fence_async_shared();
    __syncthreads();
  }
  if constexpr (Tile::kInPlace) {
    if (loads) load_values();
    __syncwarp();
  }

  // Scores and softmax: each warpgroup 64 tokens of every chunk.
  float owned_total = 0;
  {
    float s[kChunks][kCount];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      mbarrier_wait(chunks_here + 8 * i, 0);
      wgmma_fence();
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const uint64_t a =
            wgmma_descriptor(at + Tile::kTokensAt + i * Tile::kChunk + box * Tile::kTokenBox + group * kBoxBytes);
        const uint64_t b = wgmma_descriptor(second + box * Tile::kRowBox);
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(s[i], a + 2 * k, b + 2 * k, box > 0 || k > 0);
      }
      wgmma_commit();
    }
    wgmma_wait<0>();

    if (some_hidden) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // The first query that sees the token, of those of this thread that are columns 0 of eight.
          int from = p.is_causal ? token_of(i, h) : 0;
          from = (hidden >> (2 * i + h) & 1) != 0 ? 1 << 30 : from - first_row - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kValues; ++j) {
            float& score = s[i][j / 2 * 4 + 2 * h + j % 2];
            score = j / 2 * 8 + j % 2 < from ? -INFINITY : score;
          }
        }
      }
    }
    float v[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) v[j] = -INFINITY;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c / 4 * 2 + c % 2] = fmaxf(v[c / 4 * 2 + c % 2], s[i][c]);
    }
    float highest = merge_lanes(v, [](float a, float b) { return fmaxf(a, b); });
    const int query = owned_query<kValues>();
    const bool owns = owns_query<kValues>();
    if (owns) highest_of[warp * kRows + query] = highest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; ++w) highest = fmaxf(highest, highest_of[w * kRows + query]);
    // No token so far: every power is 0, not NaN.
    share_lanes(v, highest == -INFINITY ? 0.0f : highest);
#pragma unroll
    for (int j = 0; j < kValues; ++j) v[j] *= -factor[kHalf ? j : 0];
    float sums[kValues] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const int j = c / 4 * 2 + c % 2;
        s[i][c] = exp2_flushed(fmaf(s[i][c], factor[kHalf ? j : 0], v[j]));
        sums[j] += s[i][c];
      }
      store_columns<T>(second + (2 * i + group) * Tile::kRowBox, 2 * quarter, s[i]);
    }
    fence_async_shared();
    const float total = merge_lanes(sums, [](float a, float b) { return a + b; });
    if (owns) total_of[warp * kRows + query] = total;
    __syncthreads();
  }

  // The tokens' weighted mean: each warpgroup every other 64 columns.
  {
    float d[kBoxes / 2][kCount];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const uint64_t a =
          wgmma_descriptor(at + Tile::kTokensAt + i / 2 * Tile::kChunk + group * Tile::kTokenBox + i % 2 * kBoxBytes);
      const uint64_t b = wgmma_descriptor(second + i * Tile::kRowBox);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kBoxes / 2; ++j) {
          multiply_boxes<T, true>(d[j], a + 128 * k + j * (2 * Tile::kTokenBox / 16), b + 2 * k, i > 0 || k > 0);
        }
      }
    }
    wgmma_commit();
    const int query = owned_query<kValues>();
#pragma unroll
    for (int w = 0; w < 8; ++w) owned_total += total_of[w * kRows + query];
    const float owned_share = owned_total == 0 ? 0.0f : reciprocal_approximate(owned_total);
    if (warp == 0 && owns_query<kValues>()) share_of[query] = owned_share;
    float share[kValues];
    share_lanes(share, owned_share);
    wgmma_wait<0>();
    cluster_arrive_relaxed();  // the tokens here have been read
#pragma unroll
    for (int j = 0; j < kBoxes / 2; ++j) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) d[j][c] *= share[c / 4 * 2 + c % 2];
      store_columns<T>(first + (2 * j + group) * Tile::kRowBox, 2 * quarter, d[j]);
    }
    fence_async_shared();
    __syncthreads();
  }
  if (group != 0) {
    cluster_wait();
    return;
  }

  // A warp's columns of 16 rows of a box: the lane's 16 bytes.
  const auto own_unit = [&](int row, int unit) {
    return static_cast<uint32_t>(row * kBoxRowBytes + (((unit + lane % 2) ^ (row & 7)) << 4));
  };

  // The head's result, to all heads.
  float d[kCount];
  mbarrier_wait(value_weight_here, 0);
  multiply_whole(d, at + Tile::kValueWeightAt, first);
  // A query that sees no token has zeros, without the bias.
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    d[c] += share_of[c / 4 * 8 + lane % 4 * 2 + c % 2] == 0 ? 0.0f : value_bias[c / 2 % 2];
  }
  cluster_wait();
  if (in_head) {
    const uint32_t box = at + Tile::kAllHeadsAt + head * kHeadDim / 64 * Tile::kRowBox;
    const int unit = head * kHeadDim % 64 / 8 + 2 * quarter;
    store_columns<T>(box, unit, d);
    __syncwarp();
#pragma unroll
    for (int row = lane / 2; row < kRows; row += 16) {
      const uint32_t from = box + own_unit(row, unit);
      const uint4 v = load_shared16(from);
#pragma unroll
      for (int i = 1; i < kHeads; ++i) {
        const uint32_t other = (head + i) % kHeads;
        store_remote(map_shared(from, other), v, map_shared(heads_here, other));
      }
    }
  }
  fence_async_shared();
  mbarrier_arrive(heads_here);

  // This block's columns of the output.
  mbarrier_wait(out_weight_here, 0);
  mbarrier_wait_cluster(heads_here, 0);
  fence_async_shared();
  multiply_whole(d, at + Tile::kOutWeightAt, at + Tile::kAllHeadsAt);
  if (!in_head) return;
#pragma unroll
  for (int c = 0; c < kCount; ++c) d[c] += out_bias[c / 2 % 2];
  store_columns<T>(first, 2 * quarter, d);
  __syncwarp();
#pragma unroll
  for (int row = lane / 2; row < kRows; row += 16) {
    const uint4 v = load_shared16(first + own_unit(row, 2 * quarter));
    T* to = static_cast<T*>(p.output) + (int64_t{sample} * p.length + first_row + row) * kEmbed + head * kHeadDim +
            quarter * 16 + lane % 2 * 8;
    if (first_row + row < p.length) *reinterpret_cast<uint4*>(to) = v;
  }
#endif
}

}  // namespace styleforge::cuda
