// The producers of attention_sm90.cu: keys and values of a tile, split for 3xTF32, into shared memory.
#pragma once

#include "tiles.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_WGMMA

template <int kHead, bool kWhole>
__device__ __forceinline__ void produce(const TiledAttentionParams& p, const AttentionPlace& at,
                                        AttentionBarriers& barriers, uint32_t ring) {
  using T = AttentionTile<kHead>;
  const int t = threadIdx.x - kAttentionConsumers, warp = t / 32, lane = t % 32;
  // Keys: rows in whole lines.
  const int k_row = t / T::kVectors, k_vector = t % T::kVectors;
  constexpr int kRowStep = 128 / T::kVectors;
  // Values: a warp has 16 columns of half of the keys at a time. A lane has four columns of four keys, those that are
  // neighbours in a row of the transposed tile; eight lanes have eight of its 16 bytes, in different banks.
  constexpr int kSlices = kHead / 16;
  const int chunk = lane % 8;
  const int v_half = kSlices >= 4 ? 0 : warp / kSlices;
  const int v_row = 32 * v_half + chunk / 2 * 8 + chunk % 2;
  const int v_column = (kSlices >= 4 ? warp : warp % kSlices) * 16 + lane / 8 * 4;
  const auto half_of = [](int unit) { return 4 * unit / kSlices; };
  const auto column_of = [](int unit) { return 4 * unit % kSlices * 16; };

  // Where they go, in the swizzle.
  const int k_to = k_vector / 8 * (kTileKeys * kChunkBytes) + k_row * kChunkBytes + ((k_vector % 8 ^ (k_row & 7)) << 4);
  const int v_to = v_half * (kHead * kChunkBytes) + v_column * kChunkBytes + ((chunk ^ (v_column & 7)) << 4);

  // Where the next rows are read: pointers that go along, since sixteen of them do not fit the registers.
  const float* k = p.k + at.first + k_row * p.row_stride + k_vector * 4;
  const float* v = p.v + at.first + v_row * p.row_stride + v_column;
  const int64_t k_step = kRowStep * p.row_stride, v_step = 2 * p.row_stride;
  const auto* mask = reinterpret_cast<const unsigned char*>(p.key_padding_mask);
  if (mask != nullptr) mask += at.batch * p.mask_stride[0];
  float x[2][16];
  uint32_t hidden[2] = {0, 0};

  const auto load = [&](int step, int unit, float (&to)[16]) {
    const int key = step * kTileKeys;
    if (unit < T::kUnits) {
      const int valid = p.head_dim - k_vector * 4, left = p.length - key - k_row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<kWhole>(to + 4 * i, k, kRowStep * (4 * unit + i) < left ? valid : 0);
        k += k_step;
      }
      if (unit == 0 && warp == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = key + 32 * h + lane;
          hidden[h] = i >= p.length;
          if (mask != nullptr && i < p.length) hidden[h] = mask[i * p.mask_stride[1]];
        }
      }
    } else {
      const int u = unit - T::kUnits;
      const int valid = p.head_dim - v_column - column_of(u), left = p.length - key - v_row - 32 * half_of(u);
      const float* from = v + half_of(u) * 16 * v_step + column_of(u);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<kWhole>(to + 4 * i, from, 2 * i < left ? valid : 0);
        from += v_step;
      }
      if (u == T::kUnits - 1) v += 32 * v_step;
    }
  };

  load(0, 0, x[0]);
  load(0, 1, x[1]);
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    const int stage = step % T::kStages;
    const uint32_t empty_parity = step / T::kStages % 2 ^ 1;
    const uint32_t base = ring + stage * T::kStage;
#pragma unroll
    for (int unit = 0; unit < 2 * T::kUnits; ++unit) {
      float (&now)[16] = x[unit % 2];
      if (unit < T::kUnits) {
        if (unit == 0) {
          mbarrier_wait(&barriers.empty_k[stage], empty_parity);
          const uint32_t low = __ballot_sync(0xffffffff, hidden[0] == 0);
          const uint32_t high = __ballot_sync(0xffffffff, hidden[1] == 0);
          if (t == 0) barriers.seen[stage] = static_cast<uint64_t>(high) << 32 | low;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 4 * unit + i;  // rows of four threads: every other one is in the other half of eight
          const float four[4] = {now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3]};
          store_split(base + (k_to ^ (kRowStep == 4 ? n % 2 * 64 : 0)) + n * kRowStep * kChunkBytes, T::kPart, four);
        }
        if (unit == T::kUnits - 1) publish(&barriers.full_k[stage]);
      } else {
        if (unit == T::kUnits) mbarrier_wait(&barriers.empty_v[stage], empty_parity);
        const int u = unit - T::kUnits;
        const int to = 2 * T::kPart + half_of(u) * (kHead * kChunkBytes) + column_of(u) * kChunkBytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float four[4] = {now[i], now[4 + i], now[8 + i], now[12 + i]};
          store_split(base + (v_to ^ (i << 4)) + i * kChunkBytes + to, T::kPart, four);
        }
        if (unit == 2 * T::kUnits - 1) publish(&barriers.full_v[stage]);
      }
      __syncwarp();  // or the compiler mixes these loads with the stores, and has no registers for both
      if (unit + 2 < 2 * T::kUnits) {
        load(step, unit + 2, now);
      } else if (step + 1 < at.steps) {
        load(step + 1, unit + 2 - 2 * T::kUnits, now);
      }
    }
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
