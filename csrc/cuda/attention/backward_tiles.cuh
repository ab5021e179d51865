// What a block of backward_sm90.cu keeps in shared memory, and its producers.
#pragma once

#include "tiles.cuh"

namespace styleforge::cuda {

struct BackwardTile {
  static constexpr int kHead = kTiledAttentionBackwardHead;
  static constexpr int kChunks = kHead / 32;
  static constexpr int kVectors = kHead / 4;                           // of 16 bytes, in a row
  static constexpr int kPart = kTileKeys * kHead * 4;                  // hi or lo of one operand
  static constexpr int kOwnChunk = kTiledAttentionRows * kChunkBytes;  // 32 columns of all rows that stay
  static constexpr int kOwn = kChunks * kOwnChunk;
  static constexpr int kTransposed = 4 * kPart;  // where these begin, behind those as they are
  static constexpr size_t kShared = 1024 + 2 * kOwn + 8 * kPart;
  static_assert(kHead == 64, "producers' units");
};

// A matrix of one batch and head: its first row, and how far rows are apart.
struct BackwardMatrix {
  const float* data;
  int64_t stride;
};

#ifdef STYLEFORGE_HAS_WGMMA

struct BackwardBarriers {
  uint64_t full, empty, full_transposed, empty_transposed;
  uint64_t seen[2];       // of every other tile: bits of the keys that take part
  float2 columns[2][64];  // of every other tile: logsumexp in powers of two and delta of the queries
};

struct BackwardPlace {
  int batch, head, row;  // of the rows that stay
  int first, steps;      // tiles of the rows that come by
};

// Two matrices come by, 64 rows at a time, split for 3xTF32: as they are, then transposed, the second one only where
// its sums are asked for (kKeys). Both halves have their own barriers. The layouts are those of produce.cuh.
template <bool kKeys>
__device__ __forceinline__ void produce_backward(const TiledAttentionBackwardParams& b, const BackwardPlace& at,
                                                 const BackwardMatrix& first, const BackwardMatrix& second,
                                                 BackwardBarriers& barriers, uint32_t ring) {
  using T = BackwardTile;
  const TiledAttentionParams& p = b.forward;
  const int t = threadIdx.x - kAttentionConsumers, warp = t / 32, lane = t % 32;
  const int row = t / T::kVectors, vector = t % T::kVectors;  // eight rows at a time
  const int chunk = lane % 8;
  const int t_row = chunk / 2 * 8 + chunk % 2, t_column = warp * 16 + lane / 8 * 4;
  const int to = vector / 8 * (kTileKeys * kChunkBytes) + row * kChunkBytes + ((vector % 8 ^ (row & 7)) << 4);
  const int t_to = t_column * kChunkBytes + ((chunk ^ (t_column & 7)) << 4);
  const int valid = p.head_dim - vector * 4, t_valid = p.head_dim - t_column;
  constexpr int kUnits = kKeys ? 8 : 6;

  const int start = at.first * kTileKeys;
  const float* from[2] = {first.data + (start + row) * first.stride + vector * 4,
                          second.data + (start + row) * second.stride + vector * 4};
  const float* t_from[2] = {first.data + (start + t_row) * first.stride + t_column,
                            second.data + (start + t_row) * second.stride + t_column};
  const int64_t stride[2] = {first.stride, second.stride};
  const auto* mask = reinterpret_cast<const unsigned char*>(p.key_padding_mask);
  if (mask != nullptr) mask += at.batch * p.mask_stride[0];
  const int64_t statistics = (static_cast<int64_t>(at.batch) * p.heads + at.head) * attention_rows(p.length);
  float x[2][16];
  uint32_t hidden[2] = {0, 0};
  float2 column = make_float2(0, 0);

  const auto load = [&](int step, int unit, float (&into)[16]) {
    const int begin = start + step * kTileKeys;
    const int which = unit / 2 % 2, u = unit % 2;
    if (unit < 4) {
      const int left = p.length - begin - row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<true>(into + 4 * i, from[which], 8 * (4 * u + i) < left ? valid : 0);
        from[which] += 8 * stride[which];
      }
    } else {
      const int left = p.length - begin - t_row - 32 * u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<true>(into + 4 * i, t_from[which] + (32 * u + 2 * i) * stride[which], 2 * i < left ? t_valid : 0);
      }
      if (u == 1) t_from[which] += kTileKeys * stride[which];
    }
    if (unit != 0) return;
    if (kKeys) {
      if (t < kTileKeys) {
        column.x = b.rows.rows_logsumexp[statistics + begin + t];
        column.y = b.rows.rows_delta[statistics + begin + t];
      }
    } else if (warp == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = begin + 32 * h + lane;
        hidden[h] = i >= p.length;
        if (mask != nullptr && i < p.length) hidden[h] = mask[i * p.mask_stride[1]];
      }
    }
  };

  load(0, 0, x[0]);
  load(0, 1, x[1]);
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    const uint32_t parity = step % 2 ^ 1;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      float (&now)[16] = x[unit % 2];
      const int which = unit / 2 % 2, u = unit % 2;
      if (unit < 4) {
        if (unit == 0) {
          mbarrier_wait(&barriers.empty, parity);
          if (kKeys) {
            if (t < kTileKeys) barriers.columns[step % 2][t] = column;
          } else {
            const uint32_t low = __ballot_sync(0xffffffff, hidden[0] == 0);
            const uint32_t high = __ballot_sync(0xffffffff, hidden[1] == 0);
            if (t == 0) barriers.seen[step % 2] = static_cast<uint64_t>(high) << 32 | low;
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float four[4] = {now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3]};
          store_split(ring + which * 2 * T::kPart + to + 8 * (4 * u + i) * kChunkBytes, T::kPart, four);
        }
        if (unit == 3) publish(&barriers.full);
      } else {
        if (unit == 4) mbarrier_wait(&barriers.empty_transposed, parity);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float four[4] = {now[i], now[4 + i], now[8 + i], now[12 + i]};
          store_split(ring + T::kTransposed + which * 2 * T::kPart + u * (T::kHead * kChunkBytes) + (t_to ^ (i << 4)) +
                          i * kChunkBytes,
                      T::kPart, four);
        }
        if (unit == kUnits - 1) publish(&barriers.full_transposed);
      }
      __syncwarp();  // as in produce.cuh
      if (unit + 2 < kUnits) {
        load(step, unit + 2, now);
      } else if (step + 1 < at.steps) {
        load(step + 1, unit + 2 - kUnits, now);
      }
    }
  }
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
