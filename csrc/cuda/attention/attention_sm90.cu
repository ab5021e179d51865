// The attention of launch.h on wgmma (sm_90a).
//
//   block:      128 queries of one head against all keys, 64 at a time
//   producers:  one warpgroup. Reads keys and values from global memory, splits them for 3xTF32 and writes hi and lo to
//               shared memory: keys as they are, values transposed (wgmma wants TF32 operands with neighbouring k), so
//               that nothing is ever stored in global memory. What comes next is in registers by then
//   consumers:  two warpgroups of 64 queries each: scores, running softmax, product with the values
//
// 3xTF32 as in gemm/gemm_sm90.cu: a = hi + lo, b = hi + lo, both to nearest; the small terms have accumulators of their
// own or come first, and each tile's product with the values is added to its float32 sum outside of the tensor cores,
// which truncate. Weights of a tile go from the scores' registers to the next product's without a move: the order of
// keys within eight is the accumulators' (softmax.cuh), and the transposed values follow it.
//
// What limits it is the tensor cores (360 TFLOP/s of TF32, a third of that of float32). So the warpgroups take turns
// at them, by named barriers: one does its softmax while the other multiplies. Up to heads of 64 a turn is the product
// with the values and the next tile's scores, two tiles being in shared memory. With heads of 128 only one tile fits
// beside the queries; the two products are turns by themselves, which leaves a turn for refilling either half.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../gemm/fragments.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kGroups = 2;  // consumer warpgroups
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kRows = kTiledAttentionRows;
static_assert(kRows == 64 * kGroups);

template <int kHead>
struct Traits {
  static_assert(kHead % 32 == 0);
  static constexpr int kChunks = kHead / 32;
  static constexpr int kVectors = kHead / 4;                // of 16 bytes, in a row
  static constexpr int kPart = kTileKeys * kHead * 4;       // hi or lo of a tile of keys or values
  static constexpr int kStage = 4 * kPart;                  // keys hi, lo, values hi, lo
  static constexpr int kStages = kHead <= 64 ? 2 : 1;
  static constexpr int kQueryChunk = kRows * kChunkBytes;   // 32 columns of all rows
  static constexpr int kUnits = kHead / 32;                 // of 16 numbers a producer, of keys or of values
  static constexpr bool kBothProducts = kStages > 1;        // in one turn
  static constexpr bool kQueriesInRegisters = kHead <= 64;
  static constexpr size_t kShared = 1024 + kChunks * kQueryChunk + kStages * kStage;
};

#ifdef STYLEFORGE_HAS_WGMMA

__device__ __forceinline__ void named_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// hi at `to`, lo `part` bytes behind.
__device__ __forceinline__ void store_split(uint32_t to, uint32_t part, const float (&x)[4]) {
  uint32_t hi[4], lo[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(x[i], hi[i], lo[i]);
  store_shared(to, hi);
  store_shared(to + part, lo);
}

// Four numbers of a row of which `valid` exist (none: zeros, and nothing is read).
template <bool kWhole>
__device__ __forceinline__ void load_row(float* to, const float* from, int valid) {
  if constexpr (kWhole) {
    const float4 x = valid > 0 ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < valid ? from[i] : 0.0f;
  }
}

struct Barriers {
  uint64_t full_k[2], empty_k[2], full_v[2], empty_v[2];
  uint64_t seen[2];  // bits of a stage's keys that take part
};

// Where a tile's stage stands in the ring.
template <int kStages>
struct Turnover {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (kStages == 1 || ++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Place {
  int64_t first;  // element of this block's batch and head
  int batch, head, row, steps;
};

template <int kHead, bool kWhole>
__device__ __forceinline__ void produce(const TiledAttentionParams& p, const Place& at, Barriers& barriers,
                                        uint32_t ring) {
  using T = Traits<kHead>;
  const int t = threadIdx.x - kConsumers, warp = t / 32, lane = t % 32;
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
  const bool* mask = p.key_padding_mask == nullptr ? nullptr : p.key_padding_mask + at.batch * p.mask_stride[0];
  float x[2][16];
  bool hidden[2] = {false, false};

  const auto load = [&](int step, int unit, float (&to)[16]) {
    const int key = step * kTileKeys;
    if (unit < T::kUnits) {
      const int valid = p.head_dim - k_vector * 4, left = p.length - key - k_row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row<kWhole>(to + 4 * i, k, kRowStep * (4 * unit + i) < left ? valid : 0);
        k += k_step;
      }
      if (unit == 0 && mask != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = key + 32 * h + lane;
          hidden[h] = i < p.length && mask[i * p.mask_stride[1]];
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
  const auto publish = [&](uint64_t* barrier) {
    fence_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };

  Turnover<T::kStages> ring_at;
  load(0, 0, x[0]);
  load(0, 1, x[1]);
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    const int stage = ring_at.stage;
    const uint32_t empty_parity = ring_at.parity ^ 1;
    const uint32_t base = ring + stage * T::kStage;
#pragma unroll
    for (int unit = 0; unit < 2 * T::kUnits; ++unit) {
      float(&now)[16] = x[unit % 2];
      if (unit < T::kUnits) {
        if (unit == 0) {
          mbarrier_wait(&barriers.empty_k[stage], empty_parity);
          const int key = step * kTileKeys + lane;
          const uint32_t low = __ballot_sync(0xffffffff, key < p.length && !hidden[0]);
          const uint32_t high = __ballot_sync(0xffffffff, key + 32 < p.length && !hidden[1]);
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
      if (unit + 2 < 2 * T::kUnits) {
        load(step, unit + 2, now);
      } else if (step + 1 < at.steps) {
        load(step + 1, unit + 2 - 2 * T::kUnits, now);
      }
    }
    ring_at.next();
  }
}

template <int kHead, bool kWhole>
struct Consumer {
  using T = Traits<kHead>;
  static constexpr int kSets = T::kQueriesInRegisters ? T::kChunks : 2;

  const TiledAttentionParams& p;
  const TiledAttentionSchedule& s;
  const Place& at;
  Barriers& barriers;
  const uint32_t ring, queries;
  const int group, lane;
  const uint32_t query_row;  // of this lane, for ldmatrix
  const float factor;        // scores are powers of two of this
  int turns_left;

  Fragments q[kSets];
  float small[kTileKeys / 2], scores[kTileKeys / 2];
  float d[kHead / 2], total[kHead / 2];
  uint32_t p_hi[8][4], p_lo[8][4];
  RunningSoftmax softmax;
  Turnover<T::kStages> k_at, v_at;
  uint64_t seen;

  // The other warpgroup's turn ends with this one's arrival, and the other way round.
  __device__ __forceinline__ void take_turn() {
    if (s.turns) named_barrier(1 + group, kConsumers);
  }
  __device__ __forceinline__ void pass_turn() {
    --turns_left;
    if (s.turns && (group == 0 || turns_left > 0)) named_arrive(2 - group, kConsumers);
  }
  __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void load_queries(int chunk, Fragments& f) {
    const uint32_t from = queries + chunk * T::kQueryChunk + query_row * kChunkBytes +
                          (((query_row & 7) ^ (lane / 16)) << 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrix(f.hi[k], from ^ (k << 5));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        split(__uint_as_float(f.hi[k][i]), f.hi[k][i], f.rest[k][i]);
        asm volatile("" : "+r"(f.hi[k][i]), "+r"(f.rest[k][i]));  // here, not between the products
      }
    }
  }

  __device__ __forceinline__ void wait_keys() {
    mbarrier_wait(&barriers.full_k[k_at.stage], k_at.parity);
    seen = barriers.seen[k_at.stage];
  }
  __device__ __forceinline__ void release_keys() {
    release(&barriers.empty_k[k_at.stage]);
    k_at.next();
  }
  __device__ __forceinline__ void wait_values() { mbarrier_wait(&barriers.full_v[v_at.stage], v_at.parity); }
  __device__ __forceinline__ void release_values() {
    release(&barriers.empty_v[v_at.stage]);
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
      take_turn();
      multiply_values();
      wgmma_wait<0>();
      release_values();
      if constexpr (kMore) multiply_keys();
      pass_turn();
      add_up();
      if constexpr (kMore) {
        wgmma_wait<0>();
        release_keys();
      }
    } else {
      wait_keys();
      load_queries(0, q[0]);
      take_turn();
      multiply_keys();
      pass_turn();
      wgmma_wait<0>();
      release_keys();
      weigh(step);
      wait_values();
      take_turn();
      multiply_values();
      pass_turn();
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
        take_turn();
        pass_turn();
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
        constexpr float kLn2 = 0.693147180559945309f;
        p.logsumexp[(static_cast<int64_t>(at.batch) * p.heads + at.head) * p.length + row] =
            sum == 0 ? __int_as_float(0x7f800000) : (softmax.peak[r] + log2f(sum)) * kLn2;
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
      store_shared(queries + vector / 8 * T::kQueryChunk + (64 * group + row) * kChunkBytes +
                       ((vector % 8 ^ (row & 7)) << 4),
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
    turns_left = T::kBothProducts ? at.steps + 1 : 2 * at.steps;
    if (s.turns && group == 1) named_arrive(1, kConsumers);  // the first turn is the first warpgroup's
    if (T::kBothProducts) {
      if (steps > 0) {
        wait_keys();
        take_turn();
        multiply_keys();
        pass_turn();
        wgmma_wait<0>();
        release_keys();
      } else {
        take_turn();
        pass_turn();
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

template <int kHead, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ TiledAttentionParams p, const __grid_constant__ TiledAttentionSchedule s) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = Traits<kHead>;
  extern __shared__ unsigned char dynamic[];
  // Swizzled tiles start at multiples of 1024 bytes.
  const uint32_t queries = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t ring = queries + T::kChunks * T::kQueryChunk;
  __shared__ Barriers barriers;

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      mbarrier_init(&barriers.full_k[i], 4);
      mbarrier_init(&barriers.full_v[i], 4);
      mbarrier_init(&barriers.empty_k[i], kConsumers / 32);
      mbarrier_init(&barriers.empty_v[i], kConsumers / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  // Heads one after the other, so that the blocks at work share their keys; under the causal mask the longest first.
  const int heads = p.batch * p.heads;
  const int block = blockIdx.x;
  const int tile = p.is_causal ? s.tiles - 1 - block / heads : block % s.tiles;
  const int which = p.is_causal ? block % heads : block / s.tiles;
  Place at;
  at.batch = which / p.heads;
  at.head = which - at.batch * p.heads;
  at.first = at.batch * p.batch_stride + static_cast<int64_t>(at.head) * p.head_dim;
  at.row = tile * kRows;
  const int keys = p.is_causal ? min(p.length, at.row + kRows) : p.length;
  at.steps = (keys + kTileKeys - 1) / kTileKeys;

  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(72));
    produce<kHead, kWhole>(p, at, barriers, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(216));
    constexpr float kLog2E = 1.44269504088896341f;
    const int lane = threadIdx.x % 32;
    // Not 0: -infinity stays what it is.
    const float factor = fmaxf(fabsf(p.scale) * kLog2E, 1.17549435e-38f);
    Consumer<kHead, kWhole> consumer{
        p, s, at, barriers, ring, queries, group, lane, threadIdx.x / 32 * 16u + lane % 16, factor, 0};
    consumer.run();
  }
#endif
}

template <int kHead>
cudaError_t launch_head(const TiledAttentionParams& p, const TiledAttentionSchedule& s, const DeviceFacts& facts,
                        cudaStream_t stream) {
  return launch(s.vectors ? attention_kernel<kHead, true> : attention_kernel<kHead, false>,
                dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), Traits<kHead>::kShared, 1, facts, stream, p, s);
}

}  // namespace

cudaError_t launch_tiled_attention(const TiledAttentionParams& p, const TiledAttentionSchedule& s,
                                   cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (s.head) {
    case 32:
      return launch_head<32>(p, s, facts, stream);
    case 64:
      return launch_head<64>(p, s, facts, stream);
    case 128:
      return launch_head<128>(p, s, facts, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
