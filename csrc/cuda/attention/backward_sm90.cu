// The gradients of attention on wgmma (sm_90a), heads up to 64. With weights p = 2^(factor * score - logsumexp) and
// delta = the row's sum of grad_output * output (Dao: FlashAttention-2, algorithm 2):
//
//   ds = p (grad_output v^T - delta)      grad_v = p^T grad_output      grad_k = scale ds^T q      grad_q = scale ds k
//
// Two kernels, so that every sum stays in one block, in a fixed order, without atomics: one where 128 queries stay and
// the keys come by, one where 128 keys stay and the queries do. Both are made like attention_sm90.cu: a warpgroup of
// producers, two of consumers that take turns at the tensor cores, 3xTF32. What stays is split again for each tile,
// since its fragments do not fit the registers; p and ds go from the registers of one product to those of the next.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "backward_tiles.cuh"

namespace styleforge::cuda {
namespace {

#ifdef STYLEFORGE_HAS_WGMMA

using T = BackwardTile;

template <bool kKeys>
struct BackwardConsumer {
  const TiledAttentionBackwardParams& b;
  const BackwardPlace& at;
  BackwardBarriers& barriers;
  const uint32_t ring, own;
  const int group, lane;
  const float factor;  // scores are powers of two of this
  Turns turns;

  Fragments x[2];
  float scores[kTileKeys / 2], weights[kTileKeys / 2];
  float d[T::kHead / 2], total[T::kHead / 2], second_total[T::kHead / 2];
  uint32_t hi[8][4], lo[8][4];
  float logsumexp[2], delta[2];
  bool hidden[2], any_hidden;

  __device__ __forceinline__ int row_of(int r) const { return at.row + threadIdx.x / 32 * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ void store_own(const BackwardMatrix& m, uint32_t to, float sign) {
    const int t = threadIdx.x % 128;
#pragma unroll 4
    for (int i = 0; i < 64 * T::kVectors / 128; ++i) {
      const int row = 64 * group + (t + 128 * i) / T::kVectors, vector = (t + 128 * i) % T::kVectors;
      float v[4];
      load_row<true>(v, m.data + (at.row + row) * m.stride + vector * 4,
                     at.row + row < b.forward.length ? b.forward.head_dim - vector * 4 : 0);
      const uint32_t bits[4] = {__float_as_uint(v[0] * sign), __float_as_uint(v[1] * sign),
                                __float_as_uint(v[2] * sign), __float_as_uint(v[3] * sign)};
      store_shared(to + vector / 8 * T::kOwnChunk + row * kChunkBytes + ((vector % 8 ^ (row & 7)) << 4), bits);
    }
  }
  __device__ __forceinline__ void load_own(int chunk, Fragments& f) {
    const uint32_t row = threadIdx.x / 32 * 16 + lane % 16;
    const uint32_t from = own + chunk * T::kOwnChunk + row * kChunkBytes + (((row & 7) ^ (lane / 16)) << 4);
    load_split(f, from);
  }

  // Issue a chunk's part of a product with what came by: the small terms, all of which come before hi * hi. Added to a
  // large sum they cost it a bit each, since the units truncate; the error was 1.4 times that of ATen's kernel.
  __device__ __forceinline__ void multiply_small(float (&to)[kTileKeys / 2], const Fragments& f, int which, int chunk) {
    using Mma = Wgmma<MmaKind::kTF32, kTileKeys>;
    const uint64_t b_hi = wgmma_descriptor(ring + which * 2 * T::kPart) + chunk * (kTileKeys * kChunkBytes >> 4);
    const uint64_t b_lo = b_hi + (T::kPart >> 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(to, f.rest[k], b_hi + 2 * k, chunk > 0 || k > 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(to, f.hi[k], b_lo + 2 * k, true);
  }
  __device__ __forceinline__ void multiply_large(float (&to)[kTileKeys / 2], const Fragments& f, int which, int chunk) {
    using Mma = Wgmma<MmaKind::kTF32, kTileKeys>;
    const uint64_t b_hi = wgmma_descriptor(ring + which * 2 * T::kPart) + chunk * (kTileKeys * kChunkBytes >> 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(to, f.hi[k], b_hi + 2 * k, true);
  }

  // hi and lo of 64 columns, times a transposed matrix that came by, added to `sum`.
  __device__ __forceinline__ void multiply_transposed(int which, float (&sum)[T::kHead / 2], bool last) {
    using Mma = Wgmma<MmaKind::kTF32, T::kHead>;
    const uint64_t b_hi = wgmma_descriptor(ring + T::kTransposed + which * 2 * T::kPart);
    const uint64_t b_lo = b_hi + (T::kPart >> 4);
    constexpr int kStep = T::kHead * kChunkBytes >> 4;
    turns.take();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, lo[k], b_hi + k / 4 * kStep + k % 4 * 2, k > 0);
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, hi[k], b_lo + k / 4 * kStep + k % 4 * 2, true);
#pragma unroll
    for (int k = 0; k < 8; ++k) Mma::run(d, hi[k], b_hi + k / 4 * kStep + k % 4 * 2, true);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
    if (last) mbarrier_arrive(&barriers.empty_transposed);
#pragma unroll
    for (int i = 0; i < T::kHead / 2; ++i) sum[i] += d[i];
  }

  // scores becomes p, weights (grad_output v^T) becomes ds.
  __device__ __forceinline__ void differentiate(int step) {
    const int begin = (at.first + step) * kTileKeys;
    uint64_t bits[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (kKeys) {
        const uint64_t later = b.forward.is_causal ? ~first_bits(row_of(r) - begin) : ~uint64_t{0};
        bits[r] = hidden[r] ? 0 : later;
      } else {
        const uint64_t seen = barriers.seen[step % 2];
        bits[r] = b.forward.is_causal ? seen & first_bits(row_of(r) - begin + 1) : seen;
      }
    }
    const int first_row = at.row + 64 * group;
    const bool crossed = b.forward.is_causal && (kKeys ? begin < first_row + 63 : begin + kTileKeys - 1 > first_row);
    if (crossed || (kKeys ? any_hidden : barriers.seen[step % 2] != ~uint64_t{0})) {
#pragma unroll
      for (int r = 0; r < 2; ++r) bits[r] >>= 2 * (lane % 4);
      hide_keys(scores, bits);
    }
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      float raised = logsumexp[i / 2 % 2], mean = delta[i / 2 % 2];
      if (kKeys) {
        const float2 column = barriers.columns[step % 2][i / 4 * 8 + 2 * (lane % 4) + i % 2];
        raised = column.x, mean = column.y;
      }
      scores[i] = exp2_flushed(fmaf(scores[i], factor, -raised));
      weights[i] = scores[i] * (weights[i] - mean);
    }
  }

  __device__ __forceinline__ void tile(int step) {
    const uint32_t parity = step % 2;
    load_own(0, x[0]);
    load_own(1, x[1]);
    mbarrier_wait(&barriers.full, parity);
    turns.take();
    wgmma_fence();
    multiply_small(scores, x[0], 0, 0);
    multiply_small(scores, x[1], 0, 1);
    multiply_large(scores, x[0], 0, 0);
    wgmma_commit();
    multiply_large(scores, x[1], 0, 1);
    wgmma_commit();
    // A set is loaded again as soon as its last product is through.
    wgmma_wait<1>();
    load_own(2, x[0]);
    wgmma_fence();
    multiply_small(weights, x[0], 1, 0);
    wgmma_commit();
    wgmma_wait<1>();
    load_own(3, x[1]);
    wgmma_fence();
    multiply_small(weights, x[1], 1, 1);
    multiply_large(weights, x[0], 1, 0);
    multiply_large(weights, x[1], 1, 1);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
    mbarrier_arrive(&barriers.empty);
    differentiate(step);
    mbarrier_wait(&barriers.full_transposed, parity);
    if constexpr (kKeys) {
      split_weights(scores, hi, lo);
      multiply_transposed(1, second_total, false);
    }
    split_weights(weights, hi, lo);
    multiply_transposed(0, total, true);
  }

  __device__ __forceinline__ void write(float* to, const float (&sum)[T::kHead / 2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row >= b.forward.length) continue;
      float* line = to + at.batch * b.grad_batch_stride + row * b.grad_row_stride +
                    static_cast<int64_t>(at.head) * b.forward.head_dim;
#pragma unroll
      for (int i = 0; i < T::kHead / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
        if (column < b.forward.head_dim) {
          *reinterpret_cast<float2*>(line + column) =
              make_float2(sum[4 * i + 2 * r] * scale, sum[4 * i + 2 * r + 1] * scale);
        }
      }
    }
  }

  __device__ __forceinline__ void run(const BackwardMatrix& first, const BackwardMatrix& second) {
    const TiledAttentionParams& p = b.forward;
    store_own(first, own, p.scale < 0 ? -1.0f : 1.0f);
    store_own(second, own + T::kOwn, 1.0f);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (kKeys) {
        hidden[r] = row >= p.length || (p.key_padding_mask != nullptr &&
                                        p.key_padding_mask[at.batch * p.mask_stride[0] + row * p.mask_stride[1]]);
      } else {
        const int64_t i = (static_cast<int64_t>(at.batch) * p.heads + at.head) * attention_rows(p.length) + row;
        logsumexp[r] = b.rows.rows_logsumexp[i];
        delta[r] = b.rows.rows_delta[i];
      }
    }
    any_hidden = kKeys && __any_sync(0xffffffff, hidden[0] || hidden[1]);
#pragma unroll
    for (int i = 0; i < T::kHead / 2; ++i) total[i] = second_total[i] = 0;
    named_barrier(3 + group, 128);
    turns.start((kKeys ? 3 : 2) * at.steps);
#pragma unroll 1
    for (int step = 0; step < at.steps; ++step) tile(step);
    release_successor();
    write(kKeys ? b.grad_k : b.grad_q, total, p.scale);
    if constexpr (kKeys) write(b.grad_v, second_total, 1.0f);
  }
};

#endif  // STYLEFORGE_HAS_WGMMA

// kKeys: keys and values stay, queries and grad_output come by; else the other way round.
template <bool kKeys>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_backward_kernel(const __grid_constant__ TiledAttentionBackwardParams b,
                              const __grid_constant__ TiledAttentionSchedule s) {
#ifdef STYLEFORGE_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  const uint32_t own = (shared_address(dynamic) + 1023) & ~1023u;  // as the swizzle wants it
  const uint32_t ring = own + 2 * T::kOwn;
  __shared__ BackwardBarriers barriers;
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.full, kProducersArrive);
    mbarrier_init(&barriers.full_transposed, kProducersArrive);
    mbarrier_init(&barriers.empty, kConsumersArrive);
    mbarrier_init(&barriers.empty_transposed, kConsumersArrive);
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  // As in the forward: under the causal mask the longest first.
  const TiledAttentionParams& p = b.forward;
  const int heads = p.batch * p.heads;
  const int block = blockIdx.x;
  int tile = block % s.tiles, which = block / s.tiles;
  if (p.is_causal) {
    tile = kKeys ? block / heads : s.tiles - 1 - block / heads;
    which = block % heads;
  }
  BackwardPlace at;
  at.batch = which / p.heads;
  at.head = which - at.batch * p.heads;
  at.row = tile * kTiledAttentionRows;
  const int end = p.is_causal && !kKeys ? min(p.length, at.row + kTiledAttentionRows) : p.length;
  at.first = p.is_causal && kKeys ? at.row / kTileKeys : 0;
  at.steps = (end + kTileKeys - 1) / kTileKeys - at.first;

  const int64_t packed = at.batch * p.batch_stride + static_cast<int64_t>(at.head) * p.head_dim;
  const int64_t width = static_cast<int64_t>(p.heads) * p.head_dim;
  const BackwardMatrix q{p.q + packed, p.row_stride}, k{p.k + packed, p.row_stride}, v{p.v + packed, p.row_stride};
  const BackwardMatrix g{b.grad_output + at.batch * p.length * width + static_cast<int64_t>(at.head) * p.head_dim,
                         width};
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kAttentionGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(88));
    produce_backward<kKeys>(b, at, kKeys ? q : k, kKeys ? g : v, barriers, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(208));
    const float factor = score_factor(p.scale);
    BackwardConsumer<kKeys> consumer{
        b, at, barriers, ring, own, group, static_cast<int>(threadIdx.x % 32), factor, {s, group, 0}};
    consumer.run(kKeys ? k : q, kKeys ? v : g);
  }
#endif
}

}  // namespace

cudaError_t launch_tiled_attention_backward(const TiledAttentionBackwardParams& b, const TiledAttentionSchedule& s,
                                            cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  if (const auto error = launch_attention_rows(b.rows, DType::kFloat32, facts, stream)) return error;
  const dim3 grid(static_cast<unsigned>(s.blocks));
  if (const auto error = launch(attention_backward_kernel<false>, grid, dim3(kAttentionThreads), BackwardTile::kShared,
                                1, facts, stream, b, s)) {
    return error;
  }
  return launch(attention_backward_kernel<true>, grid, dim3(kAttentionThreads), BackwardTile::kShared, 1, facts, stream,
                b, s);
}

}  // namespace styleforge::cuda
