// The attention of launch.h for heads of 129 to 256 on wgmma (sm_90a): attention_sm90.cu with another division of work.
// A warpgroup's registers do not hold 64 rows of 256 columns, nor shared memory two tiles beside the queries. So a
// block has 64 queries, its two consumer warpgroups have half of the head's columns each, and keys come 32 at a time:
//
//   scores:   of the warpgroup's columns; what is missing is the other warpgroup's, by way of shared memory
//   softmax:  of all keys, in both warpgroups, to the same bits
//   values:   of the warpgroup's columns
//
// The next tile's scores are multiplied while the softmax of this one is computed: its keys are there, since the last
// product with keys was over before the last product with values, and keys are made before values.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "tiles.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kHead = kWideAttentionMaxHead;
constexpr int kKeys = 32;
constexpr int kChunks = kHead / 32;                            // of rows of 128 bytes
constexpr int kPart = kKeys * kHead * 4;                       // hi or lo of a tile of keys or values
constexpr int kQueryChunk = kWideAttentionRows * kChunkBytes;  // 32 columns of all rows
constexpr int kExchange = 2 * kWideAttentionRows * kKeys * 4;  // both warpgroups' scores of a tile
constexpr size_t kShared = 1024 + kChunks * kQueryChunk + 4 * kPart + 2 * kExchange;
constexpr int kUnits = 4;  // of 16 numbers a producer, of keys or of values
static_assert(kKeys * kHead == kUnits * 16 * 128);

#ifdef STYLEFORGE_HAS_WGMMA

constexpr int kHalf = kHead / 2;                // columns of a warpgroup
constexpr int kVectors = kHead / 4;             // of 16 bytes, in a row
constexpr int kKeyChunk = kKeys * kChunkBytes;  // 32 columns of all keys

// As produce.cuh has it, for tiles of 32 keys.
template <bool kWhole>
__device__ __forceinline__ void produce_wide(const TiledAttentionParams& p, const AttentionPlace& at,
                                             AttentionBarriers& barriers, uint32_t ring) {
  const int t = threadIdx.x - kAttentionConsumers, warp = t / 32, lane = t % 32;
  const int k_row = t / kVectors, k_vector = t % kVectors;  // two rows at a time
  const int chunk = lane % 8;
  const int v_row = chunk / 2 * 8 + chunk % 2, v_column = warp * 16 + lane / 8 * 4;  // and 64 columns further on
  const int k_to = k_vector / 8 * kKeyChunk + k_row * kChunkBytes + ((k_vector % 8 ^ k_row) << 4);
  const int v_to = v_column * kChunkBytes + ((chunk ^ (v_column & 7)) << 4);
  const float* k = p.k + at.first + k_row * p.row_stride + k_vector * 4;
  const float* v = p.v + at.first + v_row * p.row_stride + v_column;
  const auto* mask = reinterpret_cast<const unsigned char*>(p.key_padding_mask);
  if (mask != nullptr) mask += at.batch * p.mask_stride[0];
  float x[2][16];
  uint32_t hidden = 0;

  const auto load_keys = [&](int step, int unit, float (&to)[16]) {
    if (step >= at.steps) return;
    const int key = step * kKeys;
    const int valid = p.head_dim - k_vector * 4, left = p.length - key - k_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_row<kWhole>(to + 4 * i, k, 2 * (4 * unit + i) < left ? valid : 0);
      k += 2 * p.row_stride;
    }
    if (unit == 0 && warp == 0) {
      hidden = key + lane >= p.length;
      if (mask != nullptr && key + lane < p.length) hidden = mask[(key + lane) * p.mask_stride[1]];
    }
  };
  const auto load_values = [&](int step, int unit, float (&to)[16]) {
    if (step < 0) return;
    const int valid = p.head_dim - v_column - 64 * unit, left = p.length - step * kKeys - v_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_row<kWhole>(to + 4 * i, v + 64 * unit + 2 * i * p.row_stride, 2 * i < left ? valid : 0);
    }
    if (unit == kUnits - 1) v += kKeys * p.row_stride;
  };
  const auto store_keys = [&](int step, int unit, const float (&now)[16]) {
    if (step >= at.steps) return;
    if (unit == 0) {
      mbarrier_wait(&barriers.empty_k[0], step % 2 ^ 1);
      const uint32_t seen = __ballot_sync(0xffffffff, hidden == 0);
      if (t == 0) barriers.seen[0] = seen;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 4 * unit + i;
      const float four[4] = {now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3]};
      store_split(ring + (k_to ^ (n % 4 * 32)) + n * 2 * kChunkBytes, kPart, four);
    }
    if (unit == kUnits - 1) publish(&barriers.full_k[0]);
  };
  const auto store_values = [&](int step, int unit, const float (&now)[16]) {
    if (step < 0) return;
    if (unit == 0) mbarrier_wait(&barriers.empty_v[0], step % 2 ^ 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float four[4] = {now[i], now[4 + i], now[8 + i], now[12 + i]};
      store_split(ring + 2 * kPart + (v_to ^ (i << 4)) + i * kChunkBytes + 64 * unit * kChunkBytes, kPart, four);
    }
    if (unit == kUnits - 1) publish(&barriers.full_v[0]);
  };

  // Keys are a tile ahead of values: room for them is there first.
  load_keys(0, 0, x[0]);
  load_keys(0, 1, x[1]);
#pragma unroll 1
  for (int step = -1; step < at.steps; ++step) {
#pragma unroll
    for (int unit = 0; unit < 2 * kUnits; ++unit) {
      float (&now)[16] = x[unit % 2];
      if (unit < kUnits) {
        store_keys(step + 1, unit, now);
      } else {
        store_values(step, unit - kUnits, now);
      }
      __syncwarp();  // as in produce.cuh
      const int next = (unit + 2) % (2 * kUnits);
      if (next >= kUnits) {
        load_values(step, next - kUnits, now);
      } else {
        load_keys(step + 1 + (unit + 2) / (2 * kUnits), next, now);
      }
    }
  }
}

template <bool kWhole>
struct WideConsumer {
  const TiledAttentionParams& p;
  const AttentionPlace& at;
  AttentionBarriers& barriers;
  const uint32_t ring, queries, exchange;
  const int group, lane;
  const float factor;  // scores are powers of two of this

  Fragments q[2];
  float small[kKeys / 2], large[kKeys / 2], scores[kKeys / 2];
  float d[kHalf / 2], total[kHalf / 2];
  uint32_t p_hi[kKeys / 8][4], p_lo[kKeys / 8][4];
  RunningSoftmax softmax;
  uint32_t seen, next_seen;

  __device__ __forceinline__ int row_of(int r) const { return at.row + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ void load_queries(int chunk, Fragments& f) {
    const uint32_t row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t from =
        queries + (group * 4 + chunk) * kQueryChunk + row * kChunkBytes + (((row & 7) ^ (lane / 16)) << 4);
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

  __device__ __forceinline__ void multiply_keys(int chunk) {
    using Mma = Wgmma<MmaKind::kTF32, kKeys>;
    const Fragments& f = q[chunk % 2];
    const uint64_t hi = wgmma_descriptor(ring + group * 4 * kKeyChunk) + chunk * (kKeyChunk >> 4);
    const uint64_t lo = hi + (kPart >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(small, f.rest[k], hi + 2 * k, chunk > 0 || k > 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(small, f.hi[k], lo + 2 * k, true);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(large, f.hi[k], hi + 2 * k, chunk > 0 || k > 0);
    wgmma_commit();
  }
  __device__ __forceinline__ void multiply_values() {
    using Mma = Wgmma<MmaKind::kTF32, kHalf>;
    const uint64_t hi = wgmma_descriptor(ring + 2 * kPart + group * kHalf * kChunkBytes);
    const uint64_t lo = hi + (kPart >> 4);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(d, p_lo[k], hi + 2 * k, k > 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(d, p_hi[k], lo + 2 * k, true);
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::run(d, p_hi[k], hi + 2 * k, true);
    wgmma_commit();
  }

  // The first of the four chunks of a tile's scores is on its way after this, and after finish_keys all are
  // there.
  __device__ __forceinline__ void start_keys(int step) {
    load_queries(0, q[0]);
    mbarrier_wait(&barriers.full_k[0], step % 2);
    next_seen = static_cast<uint32_t>(barriers.seen[0]);
    multiply_keys(0);
  }
  __device__ __forceinline__ void finish_keys() {
    load_queries(1, q[1]);
    multiply_keys(1);
    wgmma_wait<1>();
    load_queries(2, q[0]);
    multiply_keys(2);
    wgmma_wait<1>();
    load_queries(3, q[1]);
    multiply_keys(3);
    wgmma_wait<0>();
    mbarrier_arrive(&barriers.empty_k[0]);
  }

  // A thread's partner in the other warpgroup has the same rows and keys. Two buffers: who writes one has met the
  // reader of it in between.
  __device__ __forceinline__ uint32_t exchange_of(int step, int of) const {
    return exchange + step % 2 * kExchange + of * (kExchange / 2) + threadIdx.x % 128 * 16;
  }
  __device__ __forceinline__ void offer(int step) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4) {
      uint32_t four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        large[i + j] += small[i + j];
        four[j] = __float_as_uint(large[i + j]);
      }
      store_shared(exchange_of(step, group) + i / 4 * 128 * 16, four);
    }
  }
  __device__ __forceinline__ void take(int step) {
    named_barrier(1, kAttentionConsumers);
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4) {
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(exchange_of(step, group ^ 1) + i / 4 * 128 * 16)
                   : "memory");
      scores[i] = large[i] + v.x, scores[i + 1] = large[i + 1] + v.y;
      scores[i + 2] = large[i + 2] + v.z, scores[i + 3] = large[i + 3] + v.w;
    }
    seen = next_seen;
  }

  __device__ __forceinline__ void weigh(int step) {
    const int key = step * kKeys;
    if (seen != ~0u || (p.is_causal && key + kKeys - 1 > at.row)) {
      uint64_t bits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bits[r] = (p.is_causal ? seen & first_bits(row_of(r) - key + 1) : seen) >> (2 * (lane % 4));
      }
      hide_keys(scores, bits);
    }
    softmax.update(scores, factor);
  }

  template <bool kMore>
  __device__ __forceinline__ void tile(int step) {
    if constexpr (kMore) start_keys(step + 1);
    weigh(step);
    if constexpr (kMore) {
      finish_keys();
      offer(step + 1);
    }
    split_weights(scores, p_hi, p_lo);
    mbarrier_wait(&barriers.full_v[0], step % 2);
    multiply_values();
    if constexpr (kMore) take(step + 1);
    wgmma_wait<0>();
    mbarrier_arrive(&barriers.empty_v[0]);
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) total[i] = fmaf(total[i], softmax.rescale[i / 2 % 2], d[i]);
  }

  __device__ __forceinline__ void write() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[r]);
      const float share = sum == 0 ? 0 : 1 / sum;
      const int row = row_of(r);
      if (row >= p.length) continue;
      if (p.logsumexp != nullptr && group == 0 && lane % 4 == 0) {
        constexpr float kLn2 = 0.693147180559945309f;
        p.logsumexp[(static_cast<int64_t>(at.batch) * p.heads + at.head) * p.length + row] =
            sum == 0 ? __int_as_float(0x7f800000) : (softmax.peak[r] + log2f(sum)) * kLn2;
      }
      float* to = p.output + ((static_cast<int64_t>(at.batch) * p.length + row) * p.heads + at.head) * p.head_dim;
#pragma unroll
      for (int i = 0; i < kHalf / 8; ++i) {
        const int column = group * kHalf + 8 * i + 2 * (lane % 4);
        const float a = total[4 * i + 2 * r] * share, b = total[4 * i + 2 * r + 1] * share;
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
    const int t = threadIdx.x % 128;
    const float sign = p.scale < 0 ? -1.0f : 1.0f;
#pragma unroll 4
    for (int i = 0; i < kWideAttentionRows * kVectors / 2 / 128; ++i) {
      const int row = (t + 128 * i) / (kVectors / 2), vector = group * (kVectors / 2) + (t + 128 * i) % (kVectors / 2);
      float x[4];
      load_row<kWhole>(x, p.q + at.first + (at.row + row) * p.row_stride + vector * 4,
                       at.row + row < p.length ? p.head_dim - vector * 4 : 0);
      const uint32_t bits[4] = {__float_as_uint(x[0] * sign), __float_as_uint(x[1] * sign),
                                __float_as_uint(x[2] * sign), __float_as_uint(x[3] * sign)};
      store_shared(queries + vector / 8 * kQueryChunk + row * kChunkBytes + ((vector % 8 ^ (row & 7)) << 4), bits);
    }
    named_barrier(2 + group, 128);
    softmax.reset();
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) total[i] = 0;
    start_keys(0);
    finish_keys();
    offer(0);
    take(0);
#pragma unroll 1
    for (int step = 0; step + 1 < at.steps; ++step) tile<true>(step);
    tile<false>(at.steps - 1);
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
  const uint32_t ring = queries + kChunks * kQueryChunk;
  __shared__ AttentionBarriers barriers;
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.full_k[0], kProducersArrive);
    mbarrier_init(&barriers.full_v[0], kProducersArrive);
    mbarrier_init(&barriers.empty_k[0], kConsumersArrive);
    mbarrier_init(&barriers.empty_v[0], kConsumersArrive);
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  const int heads = p.batch * p.heads;
  const int block = blockIdx.x;
  const int tile = p.is_causal ? s.tiles - 1 - block / heads : block % s.tiles;
  const int which = p.is_causal ? block % heads : block / s.tiles;
  AttentionPlace at;
  at.batch = which / p.heads;
  at.head = which - at.batch * p.heads;
  at.first = at.batch * p.batch_stride + static_cast<int64_t>(at.head) * p.head_dim;
  at.row = tile * kWideAttentionRows;
  const int keys = p.is_causal ? min(p.length, at.row + kWideAttentionRows) : p.length;
  at.steps = (keys + kKeys - 1) / kKeys;

  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kAttentionGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(88));
    produce_wide<kWhole>(p, at, barriers, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(208));
    constexpr float kLog2E = 1.44269504088896341f;
    const float factor = fmaxf(fabsf(p.scale) * kLog2E, 1.17549435e-38f);
    WideConsumer<kWhole> consumer{
        p, at, barriers, ring, queries, ring + 4 * kPart, group, static_cast<int>(threadIdx.x % 32), factor};
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
