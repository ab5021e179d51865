// The gradients of attention in 16 bits on wgmma (sm_90a), heads up to 128: the formulas and the two kernels of
// backward_sm90.cu, without atomics, so that they have the same bits on every run. (ATen's kernels that have too run on
// the tensor cores of sm_80, with one block a head: six times cuDNN's time, whose order of sums is not fixed.)
// Sums of keys and of values together do not fit the registers beyond heads of 64: there they have a kernel each.
//
// What stays, 64 rows a warpgroup, is read as fragments for each tile. What comes by is brought by the copy engine,
// four tiles ahead, and is read as it lies by both of its products: wgmma takes 16-bit tiles of either order. Seven
// products where one kernel with atomics has five; one warpgroup's softmax runs beside the other's products.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "../gemm/pack.cuh"
#include "half_mma.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kGroups = 2;  // consumer warpgroups, of 64 rows that stay
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;  // and a thread that brings tiles; registers go by warpgroups
constexpr int kStages = 4;
constexpr int kBox = 64 * 128;               // 64 rows of 64 columns
constexpr int kColumns = 2 * kTileKeys * 4;  // logsumexp and delta of a tile of queries
static_assert(kTiledAttentionRows == 64 * kGroups);

// Whose gradients a kernel sums up: queries stay and keys come by, or the other way round.
enum class Of { kQueries, kKeys, kValues, kKeysAndValues };

template <int kHead>
struct HalfTile {
  static constexpr int kBoxes = kHead / 64;
  static constexpr int kMatrix = kBoxes * kBox;       // 64 rows of one matrix
  static constexpr int kStage = 2 * kMatrix;          // a tile of both
  static constexpr int kOwn = 2 * kGroups * kMatrix;  // the rows that stay, of both
  static constexpr int kRing = kStages * kStage;
  static constexpr size_t kShared = 1024 + kOwn + kRing + kStages * kColumns;
};

#ifdef STYLEFORGE_HAS_WGMMA

struct HalfBarriers {
  uint64_t own, full[kStages], empty[kStages];
};

struct HalfPlace {
  int batch, head, row;  // of the rows that stay
  int first, steps;      // tiles of the rows that come by
};

// 64 rows of a head.
template <int kBoxes>
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, int head, int row, int batch,
                                          uint64_t* barrier) {
#pragma unroll
  for (int c = 0; c < kBoxes; ++c) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(to + c * kBox),
        "l"(map), "r"(64 * c), "r"(head), "r"(row), "r"(batch), "r"(shared_address(barrier))
        : "memory");
  }
}

template <typename T, int kHead, Of kOf>
struct HalfConsumer {
  using Tile = HalfTile<kHead>;
  static constexpr MmaKind kKind = kMmaKind<T>;
  static constexpr bool kKeys = kOf != Of::kQueries;  // they and values stay
  static constexpr bool kValuesToo = kOf == Of::kValues || kOf == Of::kKeysAndValues;
  static constexpr bool kDifferentiate = kOf != Of::kValues;
  using Sum = float[Tile::kBoxes][32];

  const HalfAttentionBackwardParams& b;
  const HalfPlace& at;
  HalfBarriers& barriers;
  const uint32_t own, ring, columns;
  const int group, lane;
  const float factor;  // scores are powers of two of this

  uint32_t x[2][kHead / 16][4];  // fragments of the rows that stay
  Sum total, total_values;
  uint32_t p[4][4], ds[4][4];
  float logsumexp[2], delta[2];
  bool hidden[2], any_hidden;

  __device__ __forceinline__ int row_of(int r) const { return at.row + threadIdx.x / 32 * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ void load_own() {
    const uint32_t row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int m = 0; m < (kDifferentiate ? 2 : 1); ++m) {
      const uint32_t from = own + (kGroups * m + group) * Tile::kMatrix + row * 128 + (((row & 7) ^ (lane / 16)) << 4);
#pragma unroll
      for (int k = 0; k < kHead / 16; ++k) load_matrix(x[m][k], (from + k / 4 * kBox) ^ (k % 4 << 5));
    }
  }

  // What stays times what comes by, transposed.
  __device__ __forceinline__ void multiply(float (&d)[32], int which, uint32_t tile) {
    const uint64_t t = wgmma_descriptor(tile + which * Tile::kMatrix);
#pragma unroll
    for (int k = 0; k < kHead / 16; ++k) {
      Wgmma<kKind, 64>::run(d, x[which][k], t + k / 4 * (kBox >> 4) + k % 4 * 2, k > 0);
    }
    wgmma_commit();
  }
  // Weights times what comes by.
  __device__ __forceinline__ void add_product(Sum& sum, const uint32_t (&a)[4][4], int which, uint32_t tile) {
    const uint64_t t = wgmma_descriptor(tile + which * Tile::kMatrix);
#pragma unroll
    for (int c = 0; c < Tile::kBoxes; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) WgmmaByRows<kKind>::run(sum[c], a[k], t + c * (kBox >> 4) + 128 * k);
    }
    wgmma_commit();
  }
  // Of what lies as scores do.
  __device__ __forceinline__ void fragments(uint32_t (&a)[4][4], const float (&v)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      a[i / 4][i % 4] = pack<T>(v[2 * i], v[2 * i + 1]);
      asm volatile("" : "+r"(a[i / 4][i % 4]));  // here, not between the products
    }
  }
  // Two neighbouring columns' numbers, of the tile's logsumexp or (`which` = 1) delta.
  __device__ __forceinline__ float2 column(uint32_t from, int which, int i) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(from + which * kTileKeys * 4 + (8 * i + 2 * (lane % 4)) * 4)
                 : "memory");
    return v;
  }

  // Bits of the tile's keys that take part, but for the causal mask. Of what a lane loaded a tile ago.
  __device__ __forceinline__ void look(int begin, bool (&key_hidden)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = begin + 32 * h + lane;
      key_hidden[h] = key >= b.length;
      if (b.key_padding_mask != nullptr && key < b.length) {
        key_hidden[h] = b.key_padding_mask[at.batch * b.mask_stride[0] + key * b.mask_stride[1]];
      }
    }
  }

  // scores become weights p, 0 where there is none.
  __device__ __forceinline__ void weigh(float (&scores)[32], int begin, uint32_t from, uint64_t seen) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 raised = make_float2(0, 0);
      if constexpr (kKeys) raised = column(from, 0, i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (!kKeys) raised.x = raised.y = logsumexp[r];
        scores[4 * i + 2 * r] = exp2_flushed(fmaf(scores[4 * i + 2 * r], factor, -raised.x));
        scores[4 * i + 2 * r + 1] = exp2_flushed(fmaf(scores[4 * i + 2 * r + 1], factor, -raised.y));
      }
    }
    const int first_row = at.row + 64 * group;
    const bool crossed = b.is_causal && (kKeys ? begin < first_row + 63 : begin + kTileKeys - 1 > first_row);
    if (crossed || (kKeys ? any_hidden : seen != ~uint64_t{0})) {
      uint64_t bits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kKeys) {
          bits[r] = hidden[r] ? 0 : b.is_causal ? ~first_bits(row_of(r) - begin) : ~uint64_t{0};
        } else {
          bits[r] = b.is_causal ? seen & first_bits(row_of(r) - begin + 1) : seen;
        }
        bits[r] >>= 2 * (lane % 4);
      }
      hide_keys(scores, bits, 0.0f);
    }
  }

  // weights (grad_output v^T) become ds.
  __device__ __forceinline__ void differentiate(float (&weights)[32], const float (&scores)[32], uint32_t from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 mean = make_float2(0, 0);
      if constexpr (kKeys) mean = column(from, 1, i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (!kKeys) mean.x = mean.y = delta[r];
        weights[4 * i + 2 * r] = scores[4 * i + 2 * r] * (weights[4 * i + 2 * r] - mean.x);
        weights[4 * i + 2 * r + 1] = scores[4 * i + 2 * r + 1] * (weights[4 * i + 2 * r + 1] - mean.y);
      }
    }
  }

  __device__ __forceinline__ void write(int which, const Sum& sum, float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row >= b.length) continue;
      T* line = static_cast<T*>(b.grad_qkv) +
                (((static_cast<int64_t>(at.batch) * b.length + row) * 3 + which) * b.heads + at.head) * b.head_dim;
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
        const float* pair = &sum[i / 8][i % 8 * 4 + 2 * r];
        if (column < b.head_dim) {
          *reinterpret_cast<uint32_t*>(line + column) = pack<T>(pair[0] * scale, pair[1] * scale);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int64_t which = static_cast<int64_t>(at.batch) * b.heads + at.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if constexpr (kKeys) {
        hidden[r] = row >= b.length || (b.key_padding_mask != nullptr &&
                                        b.key_padding_mask[at.batch * b.mask_stride[0] + row * b.mask_stride[1]]);
      } else {
        logsumexp[r] = b.rows.rows_logsumexp[which * attention_rows(b.length) + row];
        delta[r] = b.rows.rows_delta[which * attention_rows(b.length) + row];
      }
    }
    any_hidden = kKeys && __any_sync(0xffffffff, hidden[0] || hidden[1]);
#pragma unroll
    for (int c = 0; c < Tile::kBoxes; ++c) {
#pragma unroll
      for (int i = 0; i < 32; ++i) total[c][i] = total_values[c][i] = 0;
    }
    mbarrier_wait(&barriers.own, 0);
    bool key_hidden[2] = {false, false};
    if constexpr (!kKeys) look(at.first * kTileKeys, key_hidden);

#pragma unroll 1
    for (int step = 0; step < at.steps; ++step) {
      const int stage = step % kStages;
      const uint32_t tile = ring + stage * Tile::kStage, from = columns + stage * kColumns;
      const int begin = (at.first + step) * kTileKeys;
      // Again for each tile: kept, ptxas 13.0 gave some of their registers to ds as well.
      load_own();
      mbarrier_wait(&barriers.full[stage], step / kStages % 2);
      float scores[32], weights[32];  // of this tile alone: what is left of the last is no input
      wgmma_fence();
      multiply(scores, 0, tile);
      if constexpr (kDifferentiate) multiply(weights, 1, tile);
      uint64_t seen = 0;
      if constexpr (!kKeys) {
        const uint32_t low = __ballot_sync(0xffffffff, !key_hidden[0]);
        const uint32_t high = __ballot_sync(0xffffffff, !key_hidden[1]);
        seen = static_cast<uint64_t>(high) << 32 | low;
        look(begin + kTileKeys, key_hidden);
      }
      wgmma_wait<kDifferentiate ? 1 : 0>();
      weigh(scores, begin, from, seen);
      if constexpr (kValuesToo) {
        fragments(p, scores);
        wgmma_fence();
        add_product(total_values, p, 1, tile);
      }
      if constexpr (kDifferentiate) {
        wgmma_wait<kValuesToo ? 1 : 0>();
        differentiate(weights, scores, from);
        fragments(ds, weights);
        wgmma_fence();
        add_product(total, ds, 0, tile);
      }
      wgmma_wait<0>();  // were products to run on into the next tile, ptxas would let each wait for the last
      mbarrier_arrive(&barriers.empty[stage]);
    }
    release_successor();
    if constexpr (kDifferentiate) write(kKeys ? 1 : 0, total, b.scale);
    if constexpr (kValuesToo) write(2, total_values, 1.0f);
  }
};

#endif  // STYLEFORGE_HAS_WGMMA

template <typename T, int kHead, Of kOf>
__global__ void __launch_bounds__(kThreads, 1)
    half_attention_backward_kernel(const __grid_constant__ HalfAttentionBackwardParams b,
                                   const __grid_constant__ TiledAttentionSchedule s,
                                   const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap grad) {
#ifdef STYLEFORGE_HAS_WGMMA
  using Tile = HalfTile<kHead>;
  using Consumer = HalfConsumer<T, kHead, kOf>;
  constexpr bool kKeys = Consumer::kKeys;
  extern __shared__ unsigned char dynamic[];
  const uint32_t own = (shared_address(dynamic) + 1023) & ~1023u;  // as the swizzle wants it
  const uint32_t ring = own + Tile::kOwn, columns = ring + Tile::kRing;
  __shared__ HalfBarriers barriers;
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.own, 1);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], kConsumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  // As in the forward: under the causal mask the longest first.
  const int heads = b.batch * b.heads;
  const int block = blockIdx.x;
  int tile = block % s.tiles, which = block / s.tiles;
  if (b.is_causal) {
    tile = kKeys ? block / heads : s.tiles - 1 - block / heads;
    which = block % heads;
  }
  HalfPlace at;
  at.batch = which / b.heads;
  at.head = which - at.batch * b.heads;
  at.row = tile * kTiledAttentionRows;
  const int end = b.is_causal && !kKeys ? min(b.length, at.row + kTiledAttentionRows) : b.length;
  at.first = b.is_causal && kKeys ? at.row / kTileKeys : 0;
  at.steps = (end + kTileKeys - 1) / kTileKeys - at.first;

  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(24));
    if (threadIdx.x == kConsumers) {
      const int q = at.head, k = b.heads + at.head, v = 2 * b.heads + at.head;
      const auto load = load_rows<Tile::kBoxes>;
      mbarrier_arrive_expect(&barriers.own, Tile::kOwn);
      for (int g = 0; g < kGroups; ++g) {
        const int row = at.row + 64 * g;
        load(own + g * Tile::kMatrix, &qkv, kKeys ? k : q, row, at.batch, &barriers.own);
        load(own + (kGroups + g) * Tile::kMatrix, kKeys ? &qkv : &grad, kKeys ? v : q, row, at.batch, &barriers.own);
      }
      const int64_t rows = static_cast<int64_t>(which) * attention_rows(b.length);
      for (int step = 0; step < at.steps; ++step) {
        const int stage = step % kStages, begin = (at.first + step) * kTileKeys;
        const uint32_t to = ring + stage * Tile::kStage;
        mbarrier_wait(&barriers.empty[stage], step / kStages % 2 ^ 1);
        mbarrier_arrive_expect(&barriers.full[stage], Tile::kStage + (kKeys ? kColumns : 0));
        load(to, &qkv, kKeys ? q : k, begin, at.batch, &barriers.full[stage]);
        load(to + Tile::kMatrix, kKeys ? &grad : &qkv, kKeys ? q : v, begin, at.batch, &barriers.full[stage]);
        if constexpr (kKeys) {
          const uint32_t statistics = columns + stage * kColumns;
          bulk_load(statistics, b.rows.rows_logsumexp + rows + begin, kColumns / 2, &barriers.full[stage]);
          bulk_load(statistics + kColumns / 2, b.rows.rows_delta + rows + begin, kColumns / 2, &barriers.full[stage]);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(240));
    Consumer consumer{b, at, barriers, own, ring, columns, group, static_cast<int>(threadIdx.x % 32), b.scale * kLog2E};
    consumer.run();
  }
#endif
}

// [d, heads, length, batch] in boxes of 64 rows of one head.
cudaError_t rows_map(const HalfAttentionBackwardParams& b, const void* data, int heads, CUtensorMap& map) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(b.head_dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(b.length), static_cast<cuuint64_t>(b.batch)};
  const cuuint64_t head = 2 * sizes[0];
  const cuuint64_t strides[3] = {head, head * sizes[1], head * sizes[1] * sizes[2]};
  const cuuint32_t box[4] = {64, 1, 64, 1};
  return tensor_map(b.dtype, data, sizes, strides, box, map, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

struct HalfLaunch {
  const HalfAttentionBackwardParams& b;
  const TiledAttentionSchedule& s;
  const DeviceFacts& facts;
  cudaStream_t stream;
  CUtensorMap qkv, grad;

  template <typename T, int kHead, Of kOf>
  cudaError_t one() const {
    return launch(half_attention_backward_kernel<T, kHead, kOf>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads),
                  HalfTile<kHead>::kShared, 1, facts, stream, b, s, qkv, grad);
  }
  template <typename T>
  cudaError_t all() const {
    if (s.head == 64) {
      const auto error = one<T, 64, Of::kQueries>();
      return error ? error : one<T, 64, Of::kKeysAndValues>();
    }
    if (const auto error = one<T, 128, Of::kQueries>()) return error;
    const auto error = one<T, 128, Of::kKeys>();
    return error ? error : one<T, 128, Of::kValues>();
  }
};

}  // namespace

cudaError_t launch_half_attention_backward(const HalfAttentionBackwardParams& b, const TiledAttentionSchedule& s,
                                           cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  HalfLaunch launch{b, s, facts, stream, {}, {}};
  if (const auto error = rows_map(b, b.qkv, 3 * b.heads, launch.qkv)) return error;
  if (const auto error = rows_map(b, b.rows.grad_output, b.heads, launch.grad)) return error;
  if (const auto error = launch_attention_rows(b.rows, b.dtype, facts, stream)) return error;
  return b.dtype == DType::kFloat16 ? launch.all<__half>() : launch.all<__nv_bfloat16>();
}

}  // namespace styleforge::cuda
