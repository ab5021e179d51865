// What a block of attention_sm90.cu keeps in shared memory, and how its warpgroups speak of it.
#pragma once

#include "../gemm/fragments.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {

constexpr int kAttentionGroups = 2;  // consumer warpgroups
constexpr int kAttentionConsumers = 128 * kAttentionGroups;
constexpr int kAttentionThreads = kAttentionConsumers + 128;
static_assert(kTiledAttentionRows == 64 * kAttentionGroups);

template <int kHead>
struct AttentionTile {
  static_assert(kHead % 32 == 0);
  static constexpr int kChunks = kHead / 32;
  static constexpr int kVectors = kHead / 4;           // of 16 bytes, in a row
  static constexpr int kPart = kTileKeys * kHead * 4;  // hi or lo of a tile of keys or values
  static constexpr int kStage = 4 * kPart;             // keys hi, lo, values hi, lo
  static constexpr int kStages = kHead <= 64 ? 2 : 1;
  static constexpr int kQueryChunk = kTiledAttentionRows * kChunkBytes;  // 32 columns of all rows
  static constexpr int kUnits = kHead / 32;           // of 16 numbers a producer, of keys or of values
  static constexpr bool kBothProducts = kStages > 1;  // in one turn
  static constexpr bool kQueriesInRegisters = kHead <= 64;
  static constexpr size_t kShared = 1024 + kChunks * kQueryChunk + kStages * kStage;
};

#ifdef STYLEFORGE_HAS_WGMMA

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

// A chunk of a warp's 16 rows, split for 3xTF32; `from` is the shared address of this lane's first 16 bytes, swizzled.
__device__ __forceinline__ void load_split(Fragments& f, uint32_t from) {
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

// Of their barriers: every lane arrives for itself. One for its warp, behind __syncwarp, would be as right, but it is
// an order that compute-sanitizer does not follow.
constexpr int kProducersArrive = 128, kConsumersArrive = kAttentionConsumers;

// What a producer stored is there for the tensor cores of whoever waits for the barrier.
__device__ __forceinline__ void publish(uint64_t* barrier) {
  fence_async_shared();
  mbarrier_arrive(barrier);
}

// The consumers take turns at the tensor cores: the one's turn ends with its arrival at the other's named barrier.
struct Turns {
  const TiledAttentionSchedule& s;
  const int group;
  int left;

  __device__ __forceinline__ void start(int count) {
    left = count;
    if (s.turns && group == 1) named_arrive(1, kAttentionConsumers);  // the first turn is the first warpgroup's
  }
  __device__ __forceinline__ void take() {
    if (s.turns) named_barrier(1 + group, kAttentionConsumers);
  }
  __device__ __forceinline__ void pass() {
    --left;
    if (s.turns && (group == 0 || left > 0)) named_arrive(2 - group, kAttentionConsumers);
  }
};

struct AttentionBarriers {
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

struct AttentionPlace {
  int64_t first;  // element of this block's batch and head
  int batch, head, row, steps;
};

// Heads one after the other, so that the blocks at work share their keys; under the causal mask the longest first.
// step_keys: keys of a step.
__device__ __forceinline__ AttentionPlace attention_place(const TiledAttentionParams& p,
                                                          const TiledAttentionSchedule& s, int step_keys) {
  const int heads = p.batch * p.heads;
  const int block = blockIdx.x;
  const int tile = p.is_causal ? s.tiles - 1 - block / heads : block % s.tiles;
  const int which = p.is_causal ? block % heads : block / s.tiles;
  AttentionPlace at;
  at.batch = which / p.heads;
  at.head = which - at.batch * p.heads;
  at.first = at.batch * p.batch_stride + static_cast<int64_t>(at.head) * p.head_dim;
  at.row = tile * kTiledAttentionRows;
  const int keys = p.is_causal ? min(p.length, at.row + kTiledAttentionRows) : p.length;
  at.steps = (keys + step_keys - 1) / step_keys;
  return at;
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
