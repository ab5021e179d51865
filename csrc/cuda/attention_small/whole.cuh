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
// Shared memory is rows of 128 bytes, boxes of 64 columns, with the 128-byte swizzle.
#pragma once

#include "../common/cluster.cuh"
#include "../gemm/boxes.cuh"
#include "../gemm/pack.cuh"
#include "kernels.h"
#include "wgmma_transposed.cuh"

namespace styleforge::cuda {

constexpr int kWholeThreads = 256;

template <typename T_, int kEmbed_, int kHeadDim_, int kRows_, int kChunks_>
struct WholeTile {
  using T = T_;
  static constexpr int kEmbed = kEmbed_, kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;      // queries
  static constexpr int kChunks = kChunks_;  // of 128 tokens, 64 a warpgroup
  static constexpr int kHeads = kEmbed / kHeadDim;
  static constexpr int kBoxes = kEmbed / 64;
  static constexpr int kKeys = 128 * kChunks;
  static constexpr int kHalf = kRows / 2;    // queries of a warpgroup, where they share these
  static constexpr int kValues = kRows / 4;  // queries of a thread in a transposed result
  // The columns of a head fill a row of 64 or half of it; what else lies there is multiplied and left alone.
  static_assert((kHeadDim == 32 || kHeadDim == 64) && kEmbed % 128 == 0 && (kRows == 16 || kRows == 32));

  static constexpr int kTokenBox = kKeys * kBoxRowBytes, kWeightBox = kHeadDim * kBoxRowBytes,
                       kRowBox = kRows * kBoxRowBytes;
  static constexpr int kWeight = kBoxes * kWeightBox;
  // Weights one after the other, or, for want of room, those of values and output in place of keys' and queries'.
  static constexpr bool kInPlace = 4 * kWeight > 64 * 1024;
  static constexpr int kTokensAt = 0;
  static constexpr int kQueryWeightAt = kBoxes * kTokenBox;
  static constexpr int kKeyWeightAt = kQueryWeightAt + kWeight;
  static constexpr int kValueWeightAt = kInPlace ? kKeyWeightAt : kKeyWeightAt + kWeight;
  static constexpr int kOutWeightAt = kInPlace ? kQueryWeightAt : kValueWeightAt + kWeight;
  // Queries, later the tokens' weighted mean, later the output; queries times the keys' weights, later the softmax.
  static constexpr int kFirstAt = kQueryWeightAt + (kInPlace ? 2 : 4) * kWeight;
  static constexpr int kSecondAt = kFirstAt + kBoxes * kRowBox;
  static constexpr int kStatisticsAt = kSecondAt + (kEmbed > kKeys ? kEmbed : kKeys) / 64 * kRowBox;
  static constexpr int kBarriersAt = kStatisticsAt + (2 * 8 + 1) * kRows * static_cast<int>(sizeof(float));
  static constexpr int kBarriers = kChunks + 5;
  static constexpr int kBytes = kBarriersAt + kBarriers * 8;
  static constexpr int kAllHeadsAt = kTokensAt;  // results of all heads, once nobody reads the tokens
};

#ifdef STYLEFORGE_HAS_WGMMA

// Three dimensions, as load_box.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int column, int row, int sample,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(sample), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// As mbarrier_wait, for what other blocks of the cluster wrote.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}
// 16 bytes into the shared memory of a block of the cluster, counted by a barrier there.
__device__ __forceinline__ void store_remote(uint32_t to, const uint4& v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A warp's 16 rows of a transposed result, 2 kCount numbers a row, as 16 columns of 2 kCount rows of a box, from its
// 16-byte unit `unit` on.
template <typename T, int kCount>
__device__ __forceinline__ void store_columns(uint32_t box, int unit, const float (&d)[kCount]) {
  const int lane = threadIdx.x % 32;
  const uint32_t at = box + (lane / 16 * 8 + lane % 8) * kBoxRowBytes + (((unit + lane / 8 % 2) ^ (lane % 8)) << 4);
  if constexpr (kCount == 4) {
    store_matrices_transposed(at, pack<T>(d[0], d[1]), pack<T>(d[2], d[3]));
  } else {
#pragma unroll
    for (int g = 0; g < kCount / 8; ++g) {
      const float* v = d + 8 * g;
      store_matrices_transposed(at + g * 16 * kBoxRowBytes, pack<T>(v[0], v[1]), pack<T>(v[2], v[3]),
                                pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
    }
  }
}

// A thread's numbers of kValues queries, one each, to the queries' totals over the warp's lanes of the same queries.
// The query that a lane ends up with is owned_value.
template <int kValues, typename Merge>
__device__ __forceinline__ float merge_lanes(float (&v)[kValues], const Merge& merge) {
  const int lane = threadIdx.x % 32;
  int mask = 16;
#pragma unroll
  for (int count = kValues / 2; count > 0; count /= 2) {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const bool upper = (lane & mask) != 0;
      const float kept = upper ? v[count + j] : v[j], sent = upper ? v[j] : v[count + j];
      v[j] = merge(kept, __shfl_xor_sync(0xffffffffu, sent, mask));
    }
    mask /= 2;
  }
  float r = v[0];
  if constexpr (kValues == 4) r = merge(r, __shfl_xor_sync(0xffffffffu, r, 4));
  return r;
}
template <int kValues>
__device__ __forceinline__ int owned_query() {
  const int lane = threadIdx.x % 32;
  const int value = kValues == 8 ? lane / 4 : lane / 8;
  return value / 2 * 8 + lane % 4 * 2 + value % 2;
}
// Back to all lanes.
template <int kValues>
__device__ __forceinline__ void share_lanes(float (&v)[kValues], float owned) {
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    v[j] = __shfl_sync(0xffffffffu, owned, j * (32 / kValues) + static_cast<int>(threadIdx.x) % 4);
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

template <typename Tile>
__global__ void __launch_bounds__(kWholeThreads, 1)
    small_whole_kernel(const __grid_constant__ SmallAttentionParams p, const __grid_constant__ CUtensorMap tokens,
                       const __grid_constant__ CUtensorMap qkv_weight, const __grid_constant__ CUtensorMap out_weight) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = typename Tile::T;
  constexpr int kRows = Tile::kRows, kHalf = Tile::kHalf, kHeadDim = Tile::kHeadDim, kEmbed = Tile::kEmbed;
  constexpr int kBoxes = Tile::kBoxes, kChunks = Tile::kChunks, kValues = Tile::kValues, kHeads = Tile::kHeads;
  constexpr bool kHalfs = std::is_same_v<T, __half>;
  constexpr float kLog2E = 1.4426950408889634f;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t at = shared_address(memory);

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int group = warp / 4, quarter = warp % 4;
  const int head = blockIdx.x, sample = blockIdx.z;
  const int first_row = blockIdx.y * kRows;
  const int first_chunk = first_row / 128;  // the one that has the queries; others follow it
  const auto chunk_of = [&](int i) {
    const int chunk = first_chunk + i;
    return chunk < kChunks ? chunk : chunk - kChunks;
  };
  const uint32_t barriers = at + Tile::kBarriersAt;
  const uint32_t query_weight_here = barriers, key_weight_here = barriers + 8, value_weight_here = barriers + 16,
                 out_weight_here = barriers + 24, heads_here = barriers + 32, chunks_here = barriers + 40;

  if (threadIdx.x == 0) {
    if ((at & 1023) != 0) asm volatile("trap;");
    prefetch_map(&qkv_weight);
    prefetch_map(&tokens);
    prefetch_map(&out_weight);
    auto* barrier = reinterpret_cast<uint64_t*>(memory + Tile::kBarriersAt);
    for (int i = 0; i < Tile::kBarriers; ++i) mbarrier_init(barrier + i, i == 4 ? kWholeThreads + 1 : 1);
    mbarrier_init_fence();
    // Each of the other heads' columns.
    expect_bytes(heads_here, (kHeads - 1) * kRows * kHeadDim * sizeof(T));
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();

  // part: queries, keys, values
  const auto load_weight = [&](int part, uint32_t to, uint32_t barrier) {
    expect_bytes(barrier, Tile::kWeight);
    for (int box = 0; box < kBoxes; ++box) {
      load_box(at + to + box * Tile::kWeightBox, &qkv_weight, box * kBoxColumns, part * kEmbed + head * kHeadDim,
               barrier);
    }
  };
  const auto load_out_weight = [&] {
    expect_bytes(out_weight_here, Tile::kWeight);
    for (int box = 0; box < kBoxes; ++box) {
      load_box(at + Tile::kOutWeightAt + box * Tile::kWeightBox, &out_weight, box * kBoxColumns, head * kHeadDim,
               out_weight_here);
    }
  };
  if (threadIdx.x == 0) {
    load_weight(0, Tile::kQueryWeightAt, query_weight_here);
    load_weight(1, Tile::kKeyWeightAt, key_weight_here);
    if constexpr (!Tile::kInPlace) {
      load_weight(2, Tile::kValueWeightAt, value_weight_here);
      load_out_weight();
    }
  } else if (threadIdx.x == 128) {
    for (int i = 0; i < kChunks; ++i) {
      expect_bytes(chunks_here + 8 * i, kBoxes * 128 * kBoxRowBytes);
      for (int box = 0; box < kBoxes; ++box) {
        load_box(at + Tile::kTokensAt + box * Tile::kTokenBox + chunk_of(i) * 128 * kBoxRowBytes, &tokens,
                 box * kBoxColumns, chunk_of(i) * 128, sample, chunks_here + 8 * i);
      }
    }
  }
  __syncwarp();

  // This thread's rows of a transposed result of the head's columns: their biases.
  float query_bias[2] = {}, value_bias[2] = {}, out_bias[2] = {};
  const bool in_head = quarter * 16 < kHeadDim;  // whether the warp has any
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int column = quarter * 16 + lane / 4 + 8 * h;
    if (in_head && p.qkv_bias != nullptr) {
      const T* from = static_cast<const T*>(p.qkv_bias) + head * kHeadDim + column;
      // That of the keys makes no difference, unless it is no number.
      query_bias[h] = to_acc(from[0]) + 0.0f * to_acc(from[kEmbed]);
      value_bias[h] = to_acc(from[2 * kEmbed]);
    }
    if (in_head && p.out_bias != nullptr) {
      out_bias[h] = to_acc(static_cast<const T*>(p.out_bias)[head * kHeadDim + column]);
    }
  }
  // Whether a token takes no part, two bits a chunk: this thread's rows of transposed scores.
  const auto token_of = [&](int i, int h) { return chunk_of(i) * 128 + group * 64 + quarter * 16 + lane / 4 + 8 * h; };
  uint32_t hidden = 0;
#pragma unroll
  for (int i = 0; i < 2 * kChunks; ++i) {
    const int token = token_of(i / 2, i % 2);
    const bool there = token < p.length;
    bool hides = !there;
    if (there && p.hidden != nullptr) hides = p.hidden[sample * p.hidden_stride[0] + token * p.hidden_stride[1]];
    hidden |= static_cast<uint32_t>(hides) << i;
  }

  float* const statistics = reinterpret_cast<float*>(memory + Tile::kStatisticsAt);
  float* const highest_of = statistics;             // [warp][query], first of the queries' numbers, then of scores
  float* const total_of = statistics + 8 * kRows;   // the same
  float* const share_of = statistics + 16 * kRows;  // [query]
  const uint32_t first = at + Tile::kFirstAt, second = at + Tile::kSecondAt;

  // Queries: each warpgroup half of them.
  {
    float d[kHalf / 2];
    mbarrier_wait(query_weight_here, 0);
    mbarrier_wait(chunks_here, 0);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const uint64_t a = wgmma_descriptor(at + Tile::kQueryWeightAt + box * Tile::kWeightBox);
      const uint64_t b =
          wgmma_descriptor(at + Tile::kTokensAt + box * Tile::kTokenBox + (first_row + group * kHalf) * kBoxRowBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(d, a + 2 * k, b + 2 * k, box > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (in_head) {
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) d[i] += query_bias[i / 2 % 2];
      store_columns<T>(first + group * kHalf * kBoxRowBytes, 2 * quarter, d);
      if constexpr (kHalfs) {
#pragma unroll
        for (int j = 0; j < kHalf / 4; ++j) {
          float most = fmaxf(fabsf(d[j / 2 * 4 + j % 2]), fabsf(d[j / 2 * 4 + j % 2 + 2]));
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
          if (lane < 4) highest_of[quarter * kRows + group * kHalf + j / 2 * 8 + lane * 2 + j % 2] = most;
        }
      }
    }
    fence_async_shared();
    __syncthreads();
  }
  if constexpr (Tile::kInPlace) {
    if (threadIdx.x == 0) load_out_weight();
    __syncwarp();
  }

  // Of a score, to be a power of two.
  float factor[kHalfs ? kValues : 1];
  // Queries times the keys' weights: each warpgroup every other 64 columns.
  {
    float d[kBoxes / 2][kRows / 2];
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
    if constexpr (kHalfs) {
      // float16 ends at 65504: a query's numbers are brought below 1/8 for this product, by a power of two.
      float down[kValues];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        float most = 0;
#pragma unroll
        for (int w = 0; w < kHeadDim / 16; ++w) {
          most = fmaxf(most, highest_of[w * kRows + j / 2 * 8 + lane % 4 * 2 + j % 2]);
        }
        const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
        down[j] = __uint_as_float(static_cast<uint32_t>(max(250 - exponent, 1)) << 23);
        factor[j] = __uint_as_float(static_cast<uint32_t>(min(exponent + 4, 254)) << 23) * (p.scale * kLog2E);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < kBoxes / 2; ++j) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) d[j][i] *= down[i / 4 * 2 + i % 2];
      }
    } else {
      factor[0] = p.scale * kLog2E;
      wgmma_wait<0>();
    }
#pragma unroll
    for (int j = 0; j < kBoxes / 2; ++j) store_columns<T>(second + (2 * j + group) * Tile::kRowBox, 2 * quarter, d[j]);
    fence_async_shared();
    __syncthreads();
  }
  if constexpr (Tile::kInPlace) {
    if (threadIdx.x == 0) load_weight(2, Tile::kValueWeightAt, value_weight_here);
    __syncwarp();
  }

  // Scores and softmax: each warpgroup 64 tokens of every chunk.
  float owned_total;
  {
    float s[kChunks][kRows / 2];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i > 0) mbarrier_wait(chunks_here + 8 * i, 0);
      wgmma_fence();
      const uint32_t from = at + Tile::kTokensAt + (chunk_of(i) * 128 + group * 64) * kBoxRowBytes;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const uint64_t a = wgmma_descriptor(from + box * Tile::kTokenBox);
        const uint64_t b = wgmma_descriptor(second + box * Tile::kRowBox);
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(s[i], a + 2 * k, b + 2 * k, box > 0 || k > 0);
      }
      wgmma_commit();
    }
    wgmma_wait<0>();

    float v[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) v[j] = -INFINITY;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < kRows / 2; ++c) {
        const int value = c / 4 * 2 + c % 2, h = c / 2 % 2;
        float& score = s[i][c];
        score *= factor[kHalfs ? value : 0];
        const int row = first_row + c / 4 * 8 + lane % 4 * 2 + c % 2;
        if ((hidden >> (2 * i + h) & 1) != 0 || (p.is_causal && token_of(i, h) > row)) score = -INFINITY;
        v[value] = fmaxf(v[value], score);
      }
    }
    float highest = merge_lanes(v, [](float a, float b) { return fmaxf(a, b); });
    const int query = owned_query<kValues>();
    const bool owns = kValues == 8 || lane % 8 < 4;  // of two lanes with the same query, one
    if (owns) highest_of[warp * kRows + query] = highest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; ++w) highest = fmaxf(highest, highest_of[w * kRows + query]);
    // No token so far: every power is 0, not NaN.
    share_lanes(v, highest == -INFINITY ? 0.0f : highest);
    float sums[kValues] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < kRows / 2; ++c) {
        const int value = c / 4 * 2 + c % 2;
        s[i][c] = exp2_fast(s[i][c] - v[value]);
        sums[value] += s[i][c];
      }
      store_columns<T>(second + (2 * chunk_of(i) + group) * Tile::kRowBox, 2 * quarter, s[i]);
    }
    const float total = merge_lanes(sums, [](float a, float b) { return a + b; });
    if (owns) total_of[warp * kRows + query] = total;
    fence_async_shared();
    __syncthreads();
    owned_total = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) owned_total += total_of[w * kRows + query];
  }

  // The tokens' weighted mean: each warpgroup every other 64 columns.
  {
    float d[kBoxes / 2][kRows / 2];
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < 2 * kChunks; ++box) {
      const uint64_t b = wgmma_descriptor(second + box * Tile::kRowBox);
      const uint64_t a = wgmma_descriptor(at + Tile::kTokensAt + group * Tile::kTokenBox + box * kBoxBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kBoxes / 2; ++j) {
          multiply_boxes<T, true>(d[j], a + 128 * k + j * (2 * Tile::kTokenBox / 16), b + 2 * k, box > 0 || k > 0);
        }
      }
    }
    wgmma_commit();
    const float owned_share = owned_total == 0 ? 0.0f : __frcp_rn(owned_total);
    if (warp == 0 && (kValues == 8 || lane % 8 < 4)) share_of[owned_query<kValues>()] = owned_share;
    float share[kValues];
    share_lanes(share, owned_share);
    wgmma_wait<0>();
    cluster_arrive();  // the tokens here have been read
#pragma unroll
    for (int j = 0; j < kBoxes / 2; ++j) {
#pragma unroll
      for (int c = 0; c < kRows / 2; ++c) d[j][c] *= share[c / 4 * 2 + c % 2];
      store_columns<T>(first + (2 * j + group) * Tile::kRowBox, 2 * quarter, d[j]);
    }
    fence_async_shared();
    __syncthreads();
  }

  // Of a box that holds results of this warp: row lane / 2 of its half, of 16 columns the eight of lane % 2.
  const int own_row = group * kHalf + lane / 2;
  const auto own_unit = [&](int unit) {
    return static_cast<uint32_t>(own_row * kBoxRowBytes + (((unit + lane % 2) ^ (own_row & 7)) << 4));
  };

  // The head's result: each warpgroup half of the queries. To all heads.
  {
    float d[kHalf / 2];
    mbarrier_wait(value_weight_here, 0);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const uint64_t a = wgmma_descriptor(at + Tile::kValueWeightAt + box * Tile::kWeightBox);
      const uint64_t b = wgmma_descriptor(first + box * Tile::kRowBox + group * kHalf * kBoxRowBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(d, a + 2 * k, b + 2 * k, box > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    // A query that sees no token has zeros, without the bias.
#pragma unroll
    for (int c = 0; c < kHalf / 2; ++c) {
      const float share = share_of[group * kHalf + c / 4 * 8 + lane % 4 * 2 + c % 2];
      d[c] += share == 0 ? 0.0f : value_bias[c / 2 % 2];
    }
    cluster_wait();
    const uint32_t box = at + Tile::kAllHeadsAt + head * kHeadDim / 64 * Tile::kRowBox;
    const int unit = head * kHeadDim % 64 / 8 + 2 * quarter;
    if (in_head) {
      store_columns<T>(box + group * kHalf * kBoxRowBytes, unit, d);
      __syncwarp();
      if (lane < 2 * kHalf) {
        const uint32_t from = box + own_unit(unit);
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
  }

  // This block's columns of the output: each warpgroup half of the queries.
  {
    float d[kHalf / 2];
    mbarrier_wait(out_weight_here, 0);
    mbarrier_wait_cluster(heads_here, 0);
    fence_async_shared();
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const uint64_t a = wgmma_descriptor(at + Tile::kOutWeightAt + box * Tile::kWeightBox);
      const uint64_t b = wgmma_descriptor(at + Tile::kAllHeadsAt + box * Tile::kRowBox + group * kHalf * kBoxRowBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_boxes<T, false>(d, a + 2 * k, b + 2 * k, box > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (in_head) {
#pragma unroll
      for (int c = 0; c < kHalf / 2; ++c) d[c] += out_bias[c / 2 % 2];
      store_columns<T>(first + group * kHalf * kBoxRowBytes, 2 * quarter, d);
      __syncwarp();
      const int row = first_row + own_row;
      if (lane < 2 * kHalf && row < p.length) {
        const uint4 v = load_shared16(first + own_unit(2 * quarter));
        T* to = static_cast<T*>(p.output) + (int64_t{sample} * p.length + row) * kEmbed + head * kHeadDim +
                quarter * 16 + lane % 2 * 8;
        *reinterpret_cast<uint4*>(to) = v;
      }
    }
  }
#endif
}

}  // namespace styleforge::cuda
