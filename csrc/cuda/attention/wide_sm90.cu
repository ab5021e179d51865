// The attention of launch.h for heads of 129 to 256 on wgmma (sm_90a): attention_sm90.cu, cut more finely. A
// warpgroup's sums of 64 queries take 128 registers, and 128 queries more than half of the shared memory, so keys come
// 32 at a time, and these in slices of 128 columns through a ring of three:
//
//   keys, columns 0 to 127 | keys, columns 128 to 255 | values, columns 0 to 127 | values, columns 128 to 255
//
// What limits it are registers: queries are split again for each tile, sixteen columns while the sixteen before are
// multiplied, and the weights' product goes to the sums by 64 columns. On an H200 heads of 256 reach 93 TFLOP/s. (64
// queries a block, half of the columns a warpgroup: 47. The producers then have twice the work for each product, and
// were what all waited for: without them it was as fast as this.)
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "tiles.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kHead = kWideAttentionMaxHead;
constexpr int kKeys = 32;
constexpr int kColumns = 128;                // of a slice
constexpr int kPart = kKeys * kColumns * 4;  // hi or lo of one
constexpr int kSlots = 3;                    // of the ring
constexpr int kSlot = 2 * kPart;
constexpr int kQueryChunk = kTiledAttentionRows * kChunkBytes;  // 32 columns of all rows
constexpr int kQueries = kHead / 32 * kQueryChunk;
constexpr size_t kShared = 1024 + kQueries + kSlots * kSlot;
constexpr int kUnits = 4;  // of 16 numbers a producer, of a tile's keys or values; two make a slice
static_assert(kKeys * kHead == kUnits * 16 * 128);

#ifdef STYLEFORGE_HAS_WGMMA

constexpr int kVectors = kHead / 4;             // of 16 bytes, in a row
constexpr int kKeyChunk = kKeys * kChunkBytes;  // 32 columns of all keys

struct WideBarriers {
  uint64_t full[kSlots], empty[kSlots];
  uint64_t seen[2];  // of every other tile: bits of the keys that take part
};

// As produce.cuh has it, in slices.
template <bool kWhole>
__device__ __forceinline__ void produce_wide(const TiledAttentionParams& p, const AttentionPlace& at,
                                             WideBarriers& barriers, uint32_t ring) {
  const int t = threadIdx.x - kAttentionConsumers, warp = t / 32, lane = t % 32;
  const int chunk = lane % 8;
  // Keys: a warp has a row of a slice, four are taken at a time.
  const int v_row = chunk / 2 * 8 + chunk % 2, v_column = warp * 16 + lane / 8 * 4;  // and 64 columns further on
  const int k_to = lane / 8 * kKeyChunk + warp * kChunkBytes + ((lane % 8 ^ warp) << 4);
  const int v_to = v_column * kChunkBytes + ((chunk ^ (v_column & 7)) << 4);
  const float* k = p.k + at.first + warp * p.row_stride + lane * 4;
  const float* v = p.v + at.first + v_row * p.row_stride + v_column;
  float x[2][16];
  uint32_t hidden = 0;
  Turnover<kSlots> slot;

  const auto load = [&](int step, int unit, float (&to)[16]) {
    const int key = step * kKeys;
    if (unit < kUnits) {
      const int valid = p.head_dim - lane * 4 - unit / 2 * kColumns, left = p.length - key - warp - unit % 2 * 16;
      const float* from = k + unit / 2 * kColumns + unit % 2 * 16 * p.row_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<kWhole>(to + 4 * i, from + 4 * i * p.row_stride, 4 * i < left ? valid : 0);
      }
      if (unit == kUnits - 1) k += kKeys * p.row_stride;
      if (unit == 0 && warp == 0) {
        hidden = key + lane >= p.length;
        if (p.key_padding_mask != nullptr && key + lane < p.length) {
          hidden = p.key_padding_mask[at.batch * p.mask_stride[0] + (key + lane) * p.mask_stride[1]];
        }
      }
    } else {
      const int u = unit - kUnits;
      const int valid = p.head_dim - v_column - 64 * u, left = p.length - key - v_row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<kWhole>(to + 4 * i, v + 64 * u + 2 * i * p.row_stride, 2 * i < left ? valid : 0);
      }
      if (u == kUnits - 1) v += kKeys * p.row_stride;
    }
  };

  load(0, 0, x[0]);
  load(0, 1, x[1]);
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
#pragma unroll
    for (int unit = 0; unit < 2 * kUnits; ++unit) {
      float (&now)[16] = x[unit % 2];
      const uint32_t base = ring + slot.stage * kSlot;
      if (unit % 2 == 0) mbarrier_wait(&barriers.empty[slot.stage], slot.parity ^ 1);
      if (unit == 0) {
        const uint32_t seen = __ballot_sync(0xffffffff, hidden == 0);
        if (t == 0) barriers.seen[step % 2] = seen;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (unit < kUnits) {
          const float four[4] = {now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3]};
          // Every other four rows are in the other half of eight.
          store_split(base + (k_to ^ (i % 2 * 64)) + (4 * i + unit % 2 * 16) * kChunkBytes, kPart, four);
        } else {
          const float four[4] = {now[i], now[4 + i], now[8 + i], now[12 + i]};
          store_split(base + (v_to ^ (i << 4)) + (i + unit % 2 * 64) * kChunkBytes, kPart, four);
        }
      }
      if (unit % 2 == 1) {
        publish(&barriers.full[slot.stage]);
        slot.next();
      }
      __syncwarp();  // as in produce.cuh
      if (unit + 2 < 2 * kUnits) {
        load(step, unit + 2, now);
      } else if (step + 1 < at.steps) {
        load(step + 1, unit + 2 - 2 * kUnits, now);
      }
    }
  }
}

// Sixteen columns of a warp's 16 rows, as they are split for 3xTF32.
struct HalfFragments {
  uint32_t hi[2][4], rest[2][4];
};

template <bool kWhole>
struct WideConsumer {
  const TiledAttentionParams& p;
  const AttentionPlace& at;
  WideBarriers& barriers;
  const uint32_t ring, queries;  // of this lane's row, for ldmatrix
  const int group, lane;
  const float factor;  // scores are powers of two of this

  float total[kHead / 64][32];
  RunningSoftmax softmax;
  Turnover<kSlots> slot;

  __device__ __forceinline__ int row_of(int r) const { return at.row + threadIdx.x / 32 * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ void load_queries(int half, HalfFragments& f) {
    const uint32_t from = queries + half / 2 * kQueryChunk;
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrix(f.hi[k], from ^ ((half % 2 * 2 + k) << 5));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        split(__uint_as_float(f.hi[k][i]), f.hi[k][i], f.rest[k][i]);
        asm volatile("" : "+r"(f.hi[k][i]), "+r"(f.rest[k][i]));  // here, not between the products
      }
    }
  }

  // `small` + `large` are the tile's scores.
  __device__ __forceinline__ void multiply_keys(float (&small)[kKeys / 2], float (&large)[kKeys / 2]) {
    using Mma = Wgmma<MmaKind::kTF32, kKeys>;
    HalfFragments f[2];
    load_queries(0, f[0]);
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
      mbarrier_wait(&barriers.full[slot.stage], slot.parity);
      const uint64_t hi = wgmma_descriptor(ring + slot.stage * kSlot), lo = hi + (kPart >> 4);
#pragma unroll
      for (int h = 0; h < 8; ++h) {
        const int half = 8 * slice + h;
        const HalfFragments& now = f[half % 2];
        const int at_columns = h / 2 * (kKeyChunk >> 4) + h % 2 * 4;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; ++k) Mma::run(small, now.rest[k], hi + at_columns + 2 * k, half > 0 || k > 0);
#pragma unroll
        for (int k = 0; k < 2; ++k) Mma::run(small, now.hi[k], lo + at_columns + 2 * k, true);
#pragma unroll
        for (int k = 0; k < 2; ++k) Mma::run(large, now.hi[k], hi + at_columns + 2 * k, half > 0 || k > 0);
        wgmma_commit();
        if (half > 0) wgmma_wait<1>();  // the other set's last use
        if (half < 15) load_queries(half + 1, f[(half + 1) % 2]);
      }
      wgmma_wait<0>();
      mbarrier_arrive(&barriers.empty[slot.stage]);
      slot.next();
    }
  }

  __device__ __forceinline__ void weigh(int step, float (&scores)[kKeys / 2]) {
    const int key = step * kKeys;
    const auto seen = static_cast<uint32_t>(barriers.seen[step % 2]);
    if (seen != ~0u || (p.is_causal && key + kKeys - 1 > at.row + 64 * group)) {
      uint64_t bits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bits[r] = (p.is_causal ? seen & first_bits(row_of(r) - key + 1) : seen) >> (2 * (lane % 4));
      }
      hide_keys(scores, bits);
    }
    softmax.update(scores, factor);
  }

  __device__ __forceinline__ void multiply_values(const uint32_t (&p_hi)[4][4], const uint32_t (&p_lo)[4][4]) {
    using Mma = Wgmma<MmaKind::kTF32, 64>;
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
      mbarrier_wait(&barriers.full[slot.stage], slot.parity);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint64_t hi = wgmma_descriptor(ring + slot.stage * kSlot + h * 64 * kChunkBytes), lo = hi + (kPart >> 4);
        float d[32];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Mma::run(d, p_lo[k], hi + 2 * k, k > 0);
#pragma unroll
        for (int k = 0; k < 4; ++k) Mma::run(d, p_hi[k], lo + 2 * k, true);
#pragma unroll
        for (int k = 0; k < 4; ++k) Mma::run(d, p_hi[k], hi + 2 * k, true);
        wgmma_commit();
        wgmma_wait<0>();
        if (h == 1) {
          mbarrier_arrive(&barriers.empty[slot.stage]);
          slot.next();
        }
        float (&sum)[32] = total[2 * slice + h];
#pragma unroll
        for (int i = 0; i < 32; ++i) sum[i] = fmaf(sum[i], softmax.rescale[i / 2 % 2], d[i]);
      }
    }
  }

  __device__ __forceinline__ void write() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]);
      const float share = sum == 0 ? 0 : 1 / sum;
      const int row = row_of(r);
      if (row >= p.length) continue;
      if (p.logsumexp != nullptr && lane % 4 == 0) {
        p.logsumexp[(static_cast<int64_t>(at.batch) * p.heads + at.head) * p.length + row] = softmax.logsumexp(r, sum);
      }
      float* to = p.output + ((static_cast<int64_t>(at.batch) * p.length + row) * p.heads + at.head) * p.head_dim;
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
        const float a = total[i / 8][i % 8 * 4 + 2 * r] * share, b = total[i / 8][i % 8 * 4 + 2 * r + 1] * share;
        if constexpr (kWhole) {
          if (column < p.head_dim) *reinterpret_cast<float2*>(to + column) = make_float2(a, b);
        } else {
          if (column < p.head_dim) to[column] = a;
          if (column + 1 < p.head_dim) to[column + 1] = b;
        }
      }
    }
  }

  // Queries as they are, in the swizzle of the fragments; a negative scale is theirs.
  __device__ __forceinline__ void store_queries(uint32_t to) {
    const int t = threadIdx.x % 128;
    const float sign = p.scale < 0 ? -1.0f : 1.0f;
#pragma unroll 4
    for (int i = 0; i < 64 * kVectors / 128; ++i) {
      const int row = 64 * group + (t + 128 * i) / kVectors, vector = (t + 128 * i) % kVectors;
      float x[4];
      load_row<kWhole>(x, p.q + at.first + (at.row + row) * p.row_stride + vector * 4,
                       at.row + row < p.length ? p.head_dim - vector * 4 : 0);
      const uint32_t bits[4] = {__float_as_uint(x[0] * sign), __float_as_uint(x[1] * sign),
                                __float_as_uint(x[2] * sign), __float_as_uint(x[3] * sign)};
      store_shared(to + vector / 8 * kQueryChunk + row * kChunkBytes + ((vector % 8 ^ (row & 7)) << 4), bits);
    }
    named_barrier(1 + group, 128);
  }

  __device__ __forceinline__ void run() {
    softmax.reset();
#pragma unroll
    for (int c = 0; c < kHead / 64; ++c) {
#pragma unroll
      for (int i = 0; i < 32; ++i) total[c][i] = 0;
    }
    const int last = min(p.length, at.row + 64 * (group + 1));  // the first row behind this warpgroup's
    const int needed = p.is_causal ? min(at.steps, (last + kKeys - 1) / kKeys) : at.steps;
    const int steps = last > at.row + 64 * group ? needed : 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t p_hi[kKeys / 8][4], p_lo[kKeys / 8][4];
      {
        float small[kKeys / 2], scores[kKeys / 2];
        multiply_keys(small, scores);
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) scores[i] += small[i];
        weigh(step, scores);
        split_weights(scores, p_hi, p_lo);
      }
      multiply_values(p_hi, p_lo);
    }
    // Tiles that the other warpgroup needs and this one does not.
#pragma unroll 1
    for (int i = 4 * steps; i < 4 * at.steps; ++i) {
      mbarrier_wait(&barriers.full[slot.stage], slot.parity);
      mbarrier_arrive(&barriers.empty[slot.stage]);
      slot.next();
    }
    release_successor();
    write();
  }
};

#endif  // STYLEFORGE_HAS_WGMMA

template <bool kWhole>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    wide_attention_kernel(const __grid_constant__ TiledAttentionParams p,
                          const __grid_constant__ TiledAttentionSchedule s) {
#ifdef STYLEFORGE_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  const uint32_t queries = (shared_address(dynamic) + 1023) & ~1023u;  // as the swizzle wants it
  const uint32_t ring = queries + kQueries;
  __shared__ WideBarriers barriers;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(&barriers.full[i], kProducersArrive);
      mbarrier_init(&barriers.empty[i], kConsumersArrive);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  const AttentionPlace at = attention_place(p, s, kKeys);

  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kAttentionGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(72));
    produce_wide<kWhole>(p, at, barriers, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(216));
    const float factor = score_factor(p.scale);
    const int lane = threadIdx.x % 32;
    const uint32_t row = threadIdx.x / 32 * 16 + lane % 16;
    WideConsumer<kWhole> consumer{
        p, at, barriers, ring, queries + row * kChunkBytes + (((row & 7) ^ (lane / 16)) << 4), group, lane, factor};
    consumer.store_queries(queries);
    consumer.run();
  }
#endif
}

}  // namespace

cudaError_t launch_wide_attention(const TiledAttentionParams& p, const TiledAttentionSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return launch(s.vectors ? wide_attention_kernel<true> : wide_attention_kernel<false>,
                dim3(static_cast<unsigned>(s.blocks)), dim3(kAttentionThreads), kShared, 1, facts, stream, p, s);
}

}  // namespace styleforge::cuda
