// softmax(scale q k^T) v of one head for a block's rows of queries.
//
//   warp (g, j): queries [16 g, 16 g + 16) against every part j of each chunk of keys, with a running softmax of its
//   own;
//                at the end the warps of a g are added up in their order
//
// Parts rather than rows for most warps: what takes the time is how long one warp works on its own, not how much all
// do. The result of q k^T has its numbers where the left operand of the next product wants them, if that product takes
// the keys in another order: of eight TF32 keys, columns t and t + 4 are keys 2 t and 2 t + 1.
#pragma once

#include "../common/approximate.cuh"
#include "product.cuh"

namespace styleforge::cuda {

template <typename Math, int kHeadDim_, int kRows_>
struct HeadTile {
  using T = typename Math::T;
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_;
  static constexpr int kGroups = kRows / 16;
  static constexpr int kParts = kSmallWarps / kGroups;
  static constexpr int kWidth = kHeadDim * static_cast<int>(sizeof(T));  // bytes
  static constexpr int kKeys = kWidth > 256 ? 64 : 128;                  // of a chunk
  static constexpr int kOwn = kKeys / kParts / 8;                        // tiles of eight keys of a warp in a chunk
  static constexpr int kPitch = kWidth + 16;  // of a row in shared memory: eight of them lie in different banks
  static constexpr int kUnits = kWidth / 16;
  static constexpr int kStageBytes = 2 * kKeys * kPitch;
  static constexpr int kQueryBytes = kRows * kPitch;
  static constexpr int kMostStages = kStageBytes <= 40 * 1024 ? 5 : 3;
  static constexpr int kSumPitch = kHeadDim + 8;
  static constexpr int kSumBytes = kSmallWarps * 16 * kSumPitch * static_cast<int>(sizeof(float));
  static_assert(kOwn % 2 == 0, "ldmatrix brings two tiles");

  // Only as many stages as there are chunks take memory.
  static int bytes(int length) {
    const int chunks = (length + kKeys - 1) / kKeys;
    const int ring = kQueryBytes + (chunks < kMostStages ? chunks : kMostStages) * kStageBytes;
    return ring > kSumBytes ? ring : kSumBytes;
  }
};

#ifdef STYLEFORGE_HAS_MMA

// What lies where for one head of one sample.
struct HeadPlace {
  const unsigned char* qkv;     // the first token's query
  int64_t stride, part_stride;  // bytes from token to token, from queries to keys to values
  int head_bytes;
  int length;
};

template <typename Tile, int kCount>
__device__ __forceinline__ void load_tokens(uint32_t to, const HeadPlace& place, int part, int first) {
  constexpr int kAtOnce = kSmallThreads / Tile::kUnits;
  const int token = threadIdx.x / Tile::kUnits, unit = threadIdx.x % Tile::kUnits;
  const int left = unit * 16 < place.head_bytes ? place.length - first - token : 0;
  const unsigned char* from = place.qkv + part * place.part_stride + (first + token) * place.stride + unit * 16;
  const uint32_t into = to + token * Tile::kPitch + unit * 16;
#pragma unroll
  for (int i = 0; i < (kCount + kAtOnce - 1) / kAtOnce; ++i) {
    if (kCount % kAtOnce != 0 && i * kAtOnce + token >= kCount) break;
    const bool there = i * kAtOnce < left;
    copy_async(into + i * kAtOnce * Tile::kPitch, there ? from + i * kAtOnce * place.stride : place.qkv,
               there ? 16 : 0);
  }
}

// The sums of one warp.
template <typename Tile>
struct RunningSoftmax {
  float most[2] = {-INFINITY, -INFINITY};  // of rows lane / 4 and lane / 4 + 8
  float sum[2] = {};                       // of the same, this lane's keys alone
  float values[Tile::kHeadDim / 8][4] = {};
};

// One warp's part of a chunk: `keys`, `values` and `queries` are shared addresses of its first row of each.
// hide(scores) makes those of keys that take no part -infinity.
template <typename Math, typename Tile, typename Hide>
__device__ __forceinline__ void attend_chunk(RunningSoftmax<Tile>& r, uint32_t queries, uint32_t keys,
                                             const unsigned char* values, float scale, const Hide& hide) {
  constexpr int kOwn = Tile::kOwn, kPitch = Tile::kPitch;
  const int lane = threadIdx.x % 32;
  float s[kOwn][4] = {};
  const uint32_t q_at = queries + lane % 16 * kPitch + lane / 16 * 16;
  const uint32_t k_at = keys + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
  constexpr int kSteps = Tile::kWidth / 32;
#pragma unroll(kSteps > 8 ? 4 : kSteps)
  for (int step = 0; step < kSteps; ++step) {
    Piece<Math, 4> q;
    load_matrices(q.hi, q_at + step * 32);
    round_piece(q);
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) {
      Piece<Math, 4> k;
      load_matrices(k.hi, k_at + j * 8 * kPitch + step * 32);
      round_piece(k);
      multiply(s[j], q, k, 0);
      multiply(s[j + 1], q, k, 2);
    }
  }

#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
#pragma unroll
    for (float& v : s[j]) v *= scale;
  }
  hide(s);

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = r.most[h];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) most = fmaxf(most, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float base = most == -INFINITY ? 0.0f : most;  // no key so far: every power is 0, not NaN
    const float before = exp2_flushed(r.most[h] - base);
    r.most[h] = most;
    r.sum[h] *= before;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& v = s[j][2 * h + c];
        v = exp2_flushed(v - base);
        r.sum[h] += v;
      }
    }
#pragma unroll
    for (int d = 0; d < Tile::kHeadDim / 8; ++d) {
      r.values[d][2 * h] *= before;
      r.values[d][2 * h + 1] *= before;
    }
  }

  if constexpr (Math::kRound) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      Piece<Math, 4> p;
      p.hi[0] = __float_as_uint(s[j][0]);
      p.hi[1] = __float_as_uint(s[j][2]);
      p.hi[2] = __float_as_uint(s[j][1]);
      p.hi[3] = __float_as_uint(s[j][3]);
      round_piece(p);
      const unsigned char* at = values + (8 * j + lane % 4 * 2) * kPitch + lane / 4 * 4;
#pragma unroll
      for (int d = 0; d < Tile::kHeadDim / 8; ++d) {
        Piece<Math, 2> v;
        v.hi[0] = *reinterpret_cast<const uint32_t*>(at + d * 32);
        v.hi[1] = *reinterpret_cast<const uint32_t*>(at + kPitch + d * 32);
        round_piece(v);
        multiply(r.values[d], p, v, 0);
      }
    }
  } else {
    const uint32_t at = shared_address(values) + lane % 16 * kPitch + lane / 16 * 16;
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) {
      Piece<Math, 4> p;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float pair[2] = {s[j + i / 2][i % 2 * 2], s[j + i / 2][i % 2 * 2 + 1]};
        const auto both = rounded<typename Math::T, 2>(pair);
        p.hi[i] = *reinterpret_cast<const uint32_t*>(&both);
      }
#pragma unroll
      for (int d = 0; d < Tile::kHeadDim / 16; ++d) {
        Piece<Math, 4> v;
        load_matrices_transposed(v.hi, at + j * 8 * kPitch + d * 32);
        multiply(r.values[2 * d], p, v, 0);
        multiply(r.values[2 * d + 1], p, v, 2);
      }
    }
  }
}

// Adds up the parts, of which `most` and `sum` hold a float for each row of each warp, and hands them on, four columns
// at a time: store(row, column, values), and of every row store_logarithm(row, highest, total): of 2^(scores -
// highest).
template <typename Tile, typename Store, typename StoreLogarithm>
__device__ __forceinline__ void finish_rows(RunningSoftmax<Tile>& r, unsigned char* shared, float* most, float* sum,
                                            const Store& store, const StoreLogarithm& store_logarithm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    r.sum[h] += __shfl_xor_sync(0xffffffffu, r.sum[h], 1);
    r.sum[h] += __shfl_xor_sync(0xffffffffu, r.sum[h], 2);
    const int row = warp * 16 + lane / 4 + 8 * h;
    if (lane % 4 == 0) {
      most[row] = r.most[h];
      sum[row] = r.sum[h];
    }
#pragma unroll
    for (int d = 0; d < Tile::kHeadDim / 8; ++d) {
      *reinterpret_cast<float2*>(sums + row * Tile::kSumPitch + 8 * d + lane % 4 * 2) =
          make_float2(r.values[d][2 * h], r.values[d][2 * h + 1]);
    }
  }
  __syncthreads();
  constexpr int kVectors = Tile::kHeadDim / 4;
  for (int i = threadIdx.x; i < Tile::kRows * kVectors; i += kSmallThreads) {
    const int row = i / kVectors, column = i % kVectors * 4;
    const int first = row / 16 * Tile::kParts * 16 + row % 16;
    float highest = -3e38f;  // finite, so that parts without a key weigh 0
#pragma unroll
    for (int j = 0; j < Tile::kParts; ++j) highest = fmaxf(highest, most[first + 16 * j]);
    float total = 0, v[4] = {};
#pragma unroll
    for (int j = 0; j < Tile::kParts; ++j) {
      const float weight = exp2_flushed(most[first + 16 * j] - highest);
      const float4 part = *reinterpret_cast<const float4*>(sums + (first + 16 * j) * Tile::kSumPitch + column);
      total += weight * sum[first + 16 * j];
      v[0] += weight * part.x;
      v[1] += weight * part.y;
      v[2] += weight * part.z;
      v[3] += weight * part.w;
    }
    const float share = total == 0 ? 0.0f : __frcp_rn(total);
#pragma unroll
    for (float& x : v) x *= share;
    store(row, column, v);
    if (column == 0) store_logarithm(row, highest, total);
  }
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
