// The consumers of attention_sm90.cu: a warpgroup's 64 queries against tile after tile.
#pragma once

#include "../common/cluster.cuh"
#include "tiles.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_WGMMA

template <int kHead, bool kWhole>
struct AttentionConsumer {
  using T = AttentionTile<kHead>;
  static constexpr int kSets = T::kQueriesInRegisters ? T::kChunks : 2;

  const TiledAttentionParams& p;
  const AttentionPlace& at;
  AttentionBarriers& barriers;
  const uint32_t ring, queries;
  const int group, lane;
  const uint32_t query_row;  // of this lane, for ldmatrix
  const float factor;        // scores are powers of two of this
  Turns turns;

  Fragments q[kSets];
  float small[kTileKeys / 2], scores[kTileKeys / 2];
  float d[kHead / 2], total[kHead / 2];
  uint32_t p_hi[8][4], p_lo[8][4];
  RunningSoftmax softmax;
  Turnover<T::kStages> k_at, v_at;
  uint64_t seen;

  __device__ __forceinline__ void load_queries(int chunk, Fragments& f) {
    const uint32_t from =
        queries + chunk * T::kQueryChunk + query_row * kChunkBytes + (((query_row & 7) ^ (lane / 16)) << 4);
    load_split(f, from);
  }

  __device__ __forceinline__ void wait_keys() {
    mbarrier_wait(&barriers.full_k[k_at.stage], k_at.parity);
    seen = barriers.seen[k_at.stage];
  }
  __device__ __forceinline__ void release_keys() {
    mbarrier_arrive(&barriers.empty_k[k_at.stage]);
    k_at.next();
  }
  __device__ __forceinline__ void wait_values() { mbarrier_wait(&barriers.full_v[v_at.stage], v_at.parity); }
  __device__ __forceinline__ void release_values() {
    mbarrier_arrive(&barriers.empty_v[v_at.stage]);
    v_at.next();
  }

  // Issues the scores of the tile at k_at: `small` + `scores`.
  __device__ __forceinline__ void multiply_keys() {
    using Mma = Wgmma<MmaKind::kTF32, kTileKeys>;
    const uint64_t hi = wgmma_descriptor(ring + k_at.stage * T::kStage);
    const uint64_t lo = hi + (T::kPart >> 4);
    constexpr int kStep = kTileKeys * kChunkBytes >> 4;
#pragma unroll
    for (int c = 0; c < T::kChunks; ++c) {
      const Fragments& f = q[c % kSets];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Mma::run(small, f.rest[k], hi + c * kStep + 2 * k, c > 0 || k > 0);
#pragma unroll
      for (int k = 0; k < 4; ++k) Mma::run(small, f.hi[k], lo + c * kStep + 2 * k, true);
#pragma unroll
      for (int k = 0; k < 4; ++k) Mma::run(scores, f.hi[k], hi + c * kStep + 2 * k, c > 0 || k > 0);
      wgmma_commit();
      if (!T::kQueriesInRegisters && c + 1 < T::kChunks) {
        if (c > 0) wgmma_wait<1>();  // the set's last use
        load_queries(c + 1, q[(c + 1) % kSets]);
      }
    }
  }

  // Issues the weights' product with the tile at v_at.
  __device__ __forceinline__ void multiply_values() {
    using Mma = Wgmma<MmaKind::kTF32, kHead>;
    const uint64_t hi = wgmma_descriptor(ring + v_at.stage * T::kStage + 2 * T::kPart);
    const uint64_t lo = hi + (T::kPart >> 4);
    constexpr int kStep = kHead * kChunkBytes >> 4;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, p_lo[k], hi + k / 4 * kStep + k % 4 * 2, k > 0);
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, p_hi[k], lo + k / 4 * kStep + k % 4 * 2, true);
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, p_hi[k], hi + k / 4 * kStep + k % 4 * 2, true);
    wgmma_commit();
  }

  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int i = 0; i < kHead / 2; ++i) total[i] = fmaf(total[i], softmax.rescale[i / 2 % 2], d[i]);
  }

  __device__ __forceinline__ void weigh(int step) {
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) scores[i] += small[i];
    const int key = step * kTileKeys, row = at.row + 64 * group;
    if (seen != ~uint64_t{0} || (p.is_causal && key + kTileKeys - 1 > row)) {
      const int own = row + threadIdx.x / 32 % 4 * 16 + lane / 4;
      uint64_t bits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bits[r] = (p.is_causal ? seen & first_bits(own + 8 * r - key + 1) : seen) >> (2 * (lane % 4));
      }
      hide_keys(scores, bits);
    }
    softmax.update(scores, factor, p_hi, p_lo);
  }

  // One tile of this warpgroup's; with both products in a turn, its scores are there already.
  template <bool kMore>
  __device__ __forceinline__ void tile(int step) {
    if constexpr (T::kBothProducts) {
      weigh(step);
      wait_values();
      if constexpr (kMore) wait_keys();
      turns.take();
      multiply_values();
      wgmma_wait<0>();
      release_values();
      if constexpr (kMore) multiply_keys();
      turns.pass();
      add_up();
      if constexpr (kMore) {
        wgmma_wait<0>();
        release_keys();
      }
    } else {
      wait_keys();
      load_queries(0, q[0]);
      turns.take();
      multiply_keys();
      turns.pass();
      wgmma_wait<0>();
      release_keys();
      weigh(step);
      wait_values();
      turns.take();
      multiply_values();
      turns.pass();
      wgmma_wait<0>();
      release_values();
      add_up();
    }
  }

  // Tiles that the other warpgroup needs and this one does not.
  __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(&barriers.full_k[k_at.stage], k_at.parity);
      release_keys();
      wait_values();
      release_values();
#pragma unroll
      for (int j = 0; j < (T::kBothProducts ? 1 : 2); ++j) {
        turns.take();
        turns.pass();
      }
    }
  }

  __device__ __forceinline__ void write() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]);
      const float factor = sum == 0 ? 0 : 1 / sum;
      const int row = at.row + 64 * group + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * r;
      if (row >= p.length) continue;
      if (p.logsumexp != nullptr && lane % 4 == 0) {
        p.logsumexp[(static_cast<int64_t>(at.batch) * p.heads + at.head) * p.length + row] = softmax.logsumexp(r, sum);
      }
      float* to = p.output + ((static_cast<int64_t>(at.batch) * p.length + row) * p.heads + at.head) * p.head_dim;
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
        const float a = total[4 * i + 2 * r] * factor, b = total[4 * i + 2 * r + 1] * factor;
        if constexpr (kWhole) {
          if (column < p.head_dim) *reinterpret_cast<float2*>(to + column) = make_float2(a, b);
        } else {
          if (column < p.head_dim) to[column] = a;
          if (column + 1 < p.head_dim) to[column + 1] = b;
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    // Queries as they are, in the swizzle of the fragments; a negative scale is theirs.
    const int t = threadIdx.x % 128;
    const float sign = p.scale < 0 ? -1.0f : 1.0f;
#pragma unroll 4
    for (int i = 0; i < 64 * T::kVectors / 128; ++i) {
      const int row = (t + 128 * i) / T::kVectors, vector = (t + 128 * i) % T::kVectors;
      const int token = at.row + 64 * group + row;
      float x[4];
      load_row<kWhole>(x, p.q + at.first + token * p.row_stride + vector * 4,
                       token < p.length ? p.head_dim - vector * 4 : 0);
      const uint32_t bits[4] = {__float_as_uint(x[0] * sign), __float_as_uint(x[1] * sign),
                                __float_as_uint(x[2] * sign), __float_as_uint(x[3] * sign)};
      store_shared(
          queries + vector / 8 * T::kQueryChunk + (64 * group + row) * kChunkBytes + ((vector % 8 ^ (row & 7)) << 4),
          bits);
    }
    named_barrier(3 + group, 128);
    if constexpr (T::kQueriesInRegisters) {
#pragma unroll
      for (int c = 0; c < T::kChunks; ++c) load_queries(c, q[c]);
    }
    softmax.reset();
#pragma unroll
    for (int i = 0; i < kHead / 2; ++i) total[i] = 0;

    const int last = min(p.length, at.row + 64 * (group + 1));  // the first row behind this warpgroup's
    const int rows = last - at.row - 64 * group;
    const int needed = p.is_causal ? min(at.steps, (last + kTileKeys - 1) / kTileKeys) : at.steps;
    const int steps = rows > 0 ? needed : 0;
    turns.start(T::kBothProducts ? at.steps + 1 : 2 * at.steps);
    if (T::kBothProducts) {
      if (steps > 0) {
        wait_keys();
        turns.take();
        multiply_keys();
        turns.pass();
        wgmma_wait<0>();
        release_keys();
      } else {
        turns.take();
        turns.pass();
      }
    }
    if (steps > 0) {
#pragma unroll 1
      for (int step = 0; step + 1 < steps; ++step) tile<true>(step);
      tile<false>(steps - 1);
    }
    skip(at.steps - steps);
    release_successor();
    write();
  }
};

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
