// A small float32 feed-forward network in one launch, to float32's accuracy by 3xTF32 on wgmma (sm_90a).
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/types.cuh"
#include "../common/wgmma.cuh"
#include "gelu.cuh"
#include "launch.h"
#include "whole_tile.cuh"

namespace styleforge::cuda {
namespace small_tf32 {

constexpr int kThreads = 256;
constexpr int kWidth = 128;   // of input and output, at most
constexpr int kHidden = 64;   // columns at a time
constexpr int kMaxParts = 8;  // of a cluster

// Shared memory of a block of kRows rows. Boxes: 32 numbers of k, rows of 128 bytes, swizzled as wgmma reads them.
template <int kRows>
struct Shape {
  static constexpr int kValues = kRows / 4;  // hidden numbers that a thread activates
  static constexpr int kSums = kRows / 2;    // of a thread
  static constexpr int kBoxBytes = kRows * 128;
  static constexpr int kInputBytes = kWidth / 32 * kBoxBytes, kActivatedBytes = kHidden / 32 * kBoxBytes;
  static constexpr int kSumBytes = kRows * kWidth * 4, kExchangeBytes = kThreads * kValues * 4;
  static constexpr int kWeightPitch = kHidden * 4 + 32;  // rows that are two apart lie in different halves of the banks
  static constexpr int kWeightBytes = kWidth * kWeightPitch;
  static constexpr int kInput = 0, kActivated = 2 * kInputBytes, kSumsAt = kActivated + 2 * kActivatedBytes,
                       kExchange = kSumsAt + kSumBytes, kWeights = kExchange + kExchangeBytes,
                       kBytes = kWeights + kWeightBytes;
  static_assert(kBoxBytes % 1024 == 0, "what the swizzle repeats after");
};

}  // namespace small_tf32

namespace {

using namespace small_tf32;

struct Schedule {
  int parts = 1;  // of the hidden width, the blocks of a cluster: a power of two
  int parts_log2 = 0;
  int rows = 16;  // of a block
  int blocks = 0;
  int stamp = 0;
};

#ifdef STYLEFORGE_HAS_WGMMA

using small_ffn::Four;
using small_ffn::Line;
using small_ffn::load_wanted;
using small_ffn::prefetch_bytes;

// D[64 x N] (+)= A[64 x 8] B[N x 8]^T with A in registers, N = 2 kCount.
__device__ __forceinline__ void wgmma_tf32(float (&d)[8], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, %12, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma_tf32(float (&d)[12], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %17, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n24k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, "
      "{%12, %13, %14, %15}, %16, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma_tf32(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<MmaKind::kTF32, 32>::run(d, a, b, accumulate);
}

// The units cut off what an addition does not fit: so the large term of each step is summed in float32 by itself, and
// the small ones, where that does not matter, in the units. a: 64 of k, [16 of k][row][4]; b: descriptor of two boxes
// of the large parts, and how far the small ones are from it.
template <int kRows, typename Then>
__device__ __forceinline__ void multiply_64(float (&sum)[kRows / 2], const uint32_t (&a)[4][2][4], uint64_t b,
                                            uint32_t small_parts, const Then& beside) {
  constexpr int kCount = kRows / 2;
  float small[kCount], large[2][kCount];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t hi[2][4], lo[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) split_fragment(a[g][r % 2][2 * s + r / 2], hi[s][r], lo[s][r]);
    }
    const uint64_t here = b + g / 2 * (Shape<kRows>::kBoxBytes >> 4) + g % 2 * 4;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 2; ++s) wgmma_tf32(small, lo[s], here + 2 * s, g > 0 || s > 0);
#pragma unroll
    for (int s = 0; s < 2; ++s) wgmma_tf32(small, hi[s], here + (small_parts >> 4) + 2 * s, true);
    wgmma_commit();
    if (g > 0) {
      wgmma_wait<1>();
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] = g == 1 && s == 0 ? large[s][i] : sum[i] + large[s][i];
      }
      wgmma_fence();
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) wgmma_tf32(large[s], hi[s], here + 2 * s, false);
    wgmma_commit();
    beside(g);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = (sum[i] + large[0][i]) + (large[1][i] + small[i]);
}

// Where k of a row lies in boxes in shared memory. Of 16 k the fourth ones follow each other: a lane of A's fragments
// has four neighbours.
template <int kRows>
__device__ __forceinline__ int place_in_boxes(int row, int k) {
  return k / 32 * Shape<kRows>::kBoxBytes + row * 128 + (((k / 16 % 2 * 4 + k % 4) ^ (row % 8)) << 4) + k % 16 / 4 * 4;
}

// Where the parts of a number that is not finite gave NaN: elements in the plain way (see gemm/finish.cuh). Functions of
// their own, which keep that code out of the kernel's way. Of a hidden column: rows `row`, `row` + 1 of each tile.
template <int kRows>
__device__ __noinline__ void mend_hidden(float (&h)[kRows / 4], const WholeFfnParams& p, int row, int column) {
#pragma unroll 1
  for (int i = 0; i < kRows / 4; ++i) {
    const int r = row + i / 2 * 8 + i % 2;
    if (!isnan(h[i]) || r >= p.rows || column >= p.hidden) continue;
    const float* a = static_cast<const float*>(p.input) + r * p.input_stride;
    const float* b = static_cast<const float*>(p.fc1_weight) + column * p.fc1_stride;
    float sum = 0;
    for (int k = 0; k < p.embed && !isnan(sum); ++k) sum = fmaf(a[k], b[k], sum);
    h[i] = sum;
  }
}

// Of two outputs, what the 64 hidden columns in shared memory give them.
template <int kRows>
__device__ __noinline__ void mend_outputs(float (&part)[kRows / 2], const WholeFfnParams& p, const unsigned char* hi,
                                          int first_row, int row, int output, int column) {
#pragma unroll 1
  for (int i = 0; i < kRows / 2; ++i) {
    const int r = row + i / 4 * 8 + i % 2, out = output + i / 2 % 2;
    if (!isnan(part[i]) || first_row + r >= p.rows || out >= p.out) continue;
    const float* b = static_cast<const float*>(p.fc2_weight) + out * p.fc2_stride + column;
    float sum = 0;
    for (int k = 0; k < min(kHidden, p.hidden - column) && !isnan(sum); ++k) {
      const unsigned char* at = hi + place_in_boxes<kRows>(r, k);
      const float high = *reinterpret_cast<const float*>(at);
      const float low = *reinterpret_cast<const float*>(at + Shape<kRows>::kActivatedBytes);
      sum = fmaf(isinf(high) ? high : high + low, b[k], sum);
    }
    part[i] = sum;
  }
}

// As split_fragment, but what is finite stays finite.
__device__ __forceinline__ void split_finite(float value, float& hi, float& lo) {
  const uint32_t bits = __float_as_uint(value);
  constexpr uint32_t kSign = 0x80000000u, kLast = 0x7f7fefffu, kInfinity = 0x7f800000u, kCut = ~0x1fffu;
  const bool stays = (bits & ~kSign) > kLast && (bits & ~kSign) < kInfinity;
  hi = __uint_as_float((stays ? bits : bits + 0x1000u) & kCut);
  lo = value - hi;
}

template <typename P>
__device__ __forceinline__ void pin(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void pin(uint32_t (&v)[4]) {
  asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3]));
}

#endif  // STYLEFORGE_HAS_WGMMA

// kCut: the parts' logarithm where each has one turn, -1 for all other schedules.
template <int kRows, int kCut>
__global__ void __launch_bounds__(kThreads, kCut < 0 ? 1 : 2)
    whole_tf32_kernel(const __grid_constant__ WholeFfnParams p, const __grid_constant__ Schedule s) {
#ifdef STYLEFORGE_HAS_WGMMA
  using S = Shape<kRows>;
  constexpr int kTiles = kRows / 8;  // eight rows each
  constexpr bool kTurns = kCut < 0;
  const int parts_log2 = kTurns ? s.parts_log2 : kCut, parts = 1 << parts_log2;
  extern __shared__ unsigned char dynamic[];
  unsigned char* const base = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t base_at = shared_address(base);
  __shared__ uint64_t merged;

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = warp / 4, lane = threadIdx.x % 32;
  const int quad = lane / 4, place = lane % 4;
  const int rank = static_cast<int>(cluster_rank());
  const int tile = static_cast<int>(blockIdx.x >> parts_log2), tiles = static_cast<int>(gridDim.x >> parts_log2);
  const int first_row = tile * kRows;
  const int all = (p.hidden + kHidden - 1) / kHidden;
  const int first_chunk = (all * rank) >> parts_log2;
  const int chunks = kTurns ? ((all * (rank + 1)) >> parts_log2) - first_chunk : 1;
  const int first_column = first_chunk * kHidden;
  const auto stamp = [&](int i) {
    if (s.stamp != 0 && lane == 0) {
      static_cast<unsigned*>(p.product)[(blockIdx.x * 8 + warp) * 16 + i] = static_cast<unsigned>(clock());
    }
  };

  if (threadIdx.x == 0) {
    mbarrier_init(&merged, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_arrive_relaxed();  // sums may come
  if (threadIdx.x == 0) mbarrier_arrive_expect(&merged, S::kSumBytes);

  // What this block is going to read, on its way to the L2 cache while the kernel's predecessor runs: a hint, which
  // sees no values. The clusters share the rows of the weights.
  {
    const int count = min(p.hidden - first_column, chunks * kHidden);
    if (warp == 0) {
      for (int row = tile + lane * tiles; row < count; row += 32 * tiles) {
        prefetch_bytes(static_cast<const float*>(p.fc1_weight) + (first_column + row) * p.fc1_stride, p.embed * 4);
      }
    } else if (warp == 1) {
      for (int row = tile + lane * tiles; row < p.out; row += 32 * tiles) {
        prefetch_bytes(static_cast<const float*>(p.fc2_weight) + row * p.fc2_stride + first_column, count * 4);
      }
    } else if (warp == 2) {
      const int end = min(p.rows - first_row, kRows);
      for (int row = rank + lane * parts; row < end; row += 32 * parts) {
        prefetch_bytes(static_cast<const float*>(p.input) + (first_row + row) * p.input_stride, p.embed * 4);
      }
    }
    __syncwarp();
  }

  // The first product: this warp has hidden columns own + 0 and own + 2 of a turn's, half of k.
  const int own = warp % 4 * 16 + quad / 2 * 4 + quad % 2, k = group * 64 + place * 4;
  // Of the input: 4 rows by 128 bytes a warp.
  Line x[kTiles] = {};
  const float* x_at[kTiles];
  uint32_t x_to[kTiles];
  bool x_here[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int index = 4 * i + warp % 4, row = index / 2 * 4 + lane / 8, column = group * 64 + index % 2 * 32 + lane % 8 * 4;
    x_here[i] = first_row + row < p.rows && column < p.embed;
    x_at[i] = static_cast<const float*>(p.input) + (x_here[i] ? (first_row + row) * p.input_stride + column : 0);
    // Its four numbers go to neighbouring pieces of 16 bytes; the swizzle flips bits 4 to 6 of them.
    x_to[i] = base_at + S::kInput + (group * 2 + index % 2) * S::kBoxBytes + row * 128 + ((lane % 8 / 4 * 4 ^ row % 8) << 4) +
              lane % 4 * 4;
  }
  uint32_t first[4][2][4] = {};
  const float* first_at[2];
  const auto point_first = [&](int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = min(column + own + 2 * h, p.hidden - 1);
      first_at[h] = static_cast<const float*>(p.fc1_weight) + n * p.fc1_stride + k;
    }
  };
  const auto load_first = [&] {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) load_wanted(first[g][h], first_at[h] + 16 * g, 16 * g < p.embed - k);
    }
  };
  // The second weights, by all threads: a row of 256 bytes is 16 threads'.
  const int copy_column = threadIdx.x % 16 * 4, copy_rows = p.out - static_cast<int>(threadIdx.x) / 16;
  const uint32_t copy_to = base_at + S::kWeights + threadIdx.x / 16 * S::kWeightPitch + copy_column * 4;
  const float* second_at = static_cast<const float*>(p.fc2_weight) +
                           min(static_cast<int>(threadIdx.x) / 16, p.out - 1) * p.fc2_stride + first_column + copy_column;
  const int64_t copy_step = 16 * p.fc2_stride;
  const auto copy_second = [&](int chunk) {
    const bool valid = first_column + chunk * kHidden + copy_column < p.hidden;
    const float* from = valid ? second_at + chunk * kHidden : static_cast<const float*>(p.fc2_weight);
    const int64_t step = valid ? copy_step : 0;
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i, from += step) {
      copy_async(copy_to + i * 16 * S::kWeightPitch, from, valid, 16 * i < copy_rows);
    }
    copy_commit();
  };
  point_first(first_column);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) pin(x_at[i]);
  pin(first_at[0]);
  pin(first_at[1]);
  pin(second_at);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) pin(x[i].word);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    pin(first[g][0]);
    pin(first[g][1]);
  }
  stamp(0);
  wait_for_predecessor();
  stamp(1);
  release_successor();

#pragma unroll
  for (int i = 0; i < kTiles; ++i) load_wanted(x[i].word, x_at[i], x_here[i]);
  load_first();
  // This thread activates one column: of fragment row `group`.
  const auto hidden_bias = [&](int column) {
    return p.fc1_bias != nullptr && column < p.hidden ? __ldg(static_cast<const float*>(p.fc1_bias) + column) : 0.0f;
  };
  float bias = hidden_bias(first_column + own + 2 * group);

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t hi, lo;
      split_fragment(x[i].word[j], hi, lo);
      const uint32_t to = x_to[i] ^ (j << 4);
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(hi) : "memory");
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + S::kInputBytes), "r"(lo) : "memory");
    }
  }
  stamp(2);
  fence_async_shared();
  if (group == 0) {
    named_barrier(1, 128);
  } else {
    named_barrier(2, 128);
  }
  stamp(3);

  const uint64_t input_boxes = wgmma_descriptor(base_at + S::kInput + group * 2 * S::kBoxBytes);
  const uint64_t activated_boxes = wgmma_descriptor(base_at + S::kActivated);
  const uint32_t activated_to = base_at + S::kActivated + warp % 4 / 2 * S::kBoxBytes + place * 2 * 128 +
                                (((warp % 2 * 4 + quad % 2 + 2 * group) ^ (2 * place)) << 4) + quad / 2 * 4;
  float2* const exchange = reinterpret_cast<float2*>(base + S::kExchange);
  const uint32_t fragments_at =
      base_at + S::kWeights + (warp * 16 + 2 * quad) * S::kWeightPitch + place * 16;
  // 16 outputs of all rows are a group, a warp's; of a group, eight rows are a piece. The blocks of the cluster have as
  // many groups each.
  const int own_log2 = 3 - parts_log2;
  const int pieces = kTiles << own_log2;
  const auto row_of = [&](int piece, int e) { return first_row + piece % kTiles * 8 + 2 * place + e; };
  const auto column_of = [&](int piece) { return ((rank << own_log2) + piece / kTiles) * 16 + 2 * quad; };
  struct Added {
    float2 bias = {}, residual[2] = {};
  };
  const auto added = [&](int piece) {
    Added v;
    const int c = column_of(piece);
    if (piece >= pieces || c >= p.out) return v;
    if (p.fc2_bias != nullptr) v.bias = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(p.fc2_bias) + c));
    if (p.residual != nullptr) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row_of(piece, e) < p.rows) {
          v.residual[e] = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(p.residual) +
                                                                row_of(piece, e) * p.residual_stride + c));
        }
      }
    }
    return v;
  };
  Added next;
  float total[S::kSums];
  for (int chunk = 0;;) {  // there is one at least
    const int column = first_column + chunk * kHidden, own_column = column + own + 2 * group;
    float part[S::kSums];
    multiply_64<kRows>(part, first, input_boxes, S::kInputBytes, [&](int granule) {
      if (granule == 0) copy_second(chunk);
      if (granule == 1 && chunk == 0) {
        __syncwarp();
        cluster_wait();
      }
    });
    stamp(4);
    // Each warpgroup has half of k. It adds up and activates one half of the columns.
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 others = group == 0 ? make_float2(part[4 * i + 2], part[4 * i + 3])
                                       : make_float2(part[4 * i], part[4 * i + 1]);
      exchange[((1 - group) * kTiles + i) * 128 + threadIdx.x % 128] = others;
    }
    copy_wait<0>();
    __syncthreads();
    stamp(5);
    float h[S::kValues];  // rows 2 place, 2 place + 1 of each tile
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 others = exchange[(group * kTiles + i) * 128 + threadIdx.x % 128];
      h[2 * i] = (group == 0 ? part[4 * i] : part[4 * i + 2]) + others.x;
      h[2 * i + 1] = (group == 0 ? part[4 * i + 1] : part[4 * i + 3]) + others.y;
    }
    uint32_t second[4][2][4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(second[g][r][0]), "=r"(second[g][r][1]), "=r"(second[g][r][2]), "=r"(second[g][r][3])
                     : "r"(fragments_at + r * S::kWeightPitch + g * 64)
                     : "memory");
      }
    }
    float all_of_it = 0;
#pragma unroll
    for (int i = 0; i < S::kValues; ++i) all_of_it += h[i];
    if (isnan(all_of_it)) [[unlikely]] {
      float mended[S::kValues];
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) mended[i] = h[i];
      mend_hidden<kRows>(mended, p, first_row + 2 * place, own_column);
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) h[i] = mended[i];
    }
    if (p.product != nullptr && s.stamp == 0) [[unlikely]] {  // before its bias
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) {
        const int r = first_row + i / 2 * 8 + 2 * place + i % 2;
        if (r < p.rows && own_column < p.hidden) {
          static_cast<float*>(p.product)[static_cast<int64_t>(r) * p.hidden + own_column] = h[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kValues; ++i) h[i] += bias;
    if (kTurns && chunk + 1 < chunks) bias = hidden_bias(own_column + kHidden);
    if (p.activation == FfnActivation::kGelu) {
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) h[i] *= normal_distribution<false>(h[i]).cdf;
    } else {
      ffn_activate<false>(h, p.activation);
    }
    stamp(6);
#pragma unroll
    for (int i = 0; i < S::kValues; ++i) {
      float hi, lo;
      // Beyond the hidden width an infinite input would make NaN of the zeros there.
      split_finite(own_column < p.hidden ? h[i] : 0.0f, hi, lo);
      const uint32_t to = (activated_to ^ (i % 2 << 4)) + i / 2 * 1024 + i % 2 * 128;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(hi) : "memory");
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + S::kActivatedBytes), "f"(lo) : "memory");
    }
    fence_async_shared();
    __syncthreads();
    stamp(7);
    multiply_64<kRows>(part, second, activated_boxes, S::kActivatedBytes, [&](int granule) {
      if (granule == 3 && (!kTurns || chunk + 1 == chunks)) next = added(warp);
    });
    all_of_it = 0;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) all_of_it += part[i];
    if (isnan(all_of_it)) [[unlikely]] {
      float mended[S::kSums];
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) mended[i] = part[i];
      mend_outputs<kRows>(mended, p, base + S::kActivated, first_row, 2 * place, warp * 16 + 2 * quad, column);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) part[i] = mended[i];
    }
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) total[i] = kTurns && chunk > 0 ? total[i] + part[i] : part[i];
    stamp(8);
    if (!kTurns || ++chunk == chunks) break;
    point_first(column + kHidden);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) first[g][i / 4][i % 4] = 0;
    }
    load_first();
  }

  stamp(9);
  {
    const int owner = warp >> own_log2, piece = (warp & ((1 << own_log2) - 1)) * kTiles;
    const uint32_t sums = base_at + S::kSumsAt;
    const uint32_t barrier = parts > 1 ? map_shared(shared_address(&merged), owner) : 0;
    const uint32_t to = parts > 1 ? map_shared(sums, owner) : 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float4 four = {total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]};
      const int at = (((piece + i) << parts_log2) + rank) * 512 + lane * 16;
      if (parts > 1) {
        store_remote(to + at, four, barrier);
      } else {  // no cluster to send anything in
        *reinterpret_cast<float4*>(base + S::kSumsAt + at) = four;
      }
    }
  }
  stamp(10);
  if (parts == 1) __syncthreads();
  if (warp >= pieces) return;
  if (parts > 1) mbarrier_wait_cluster(shared_address(&merged), 0);
  stamp(11);
  for (int piece = warp; piece < pieces; piece += kThreads / 32) {
    const Added end = next;
    const float4* from = reinterpret_cast<const float4*>(base + S::kSumsAt) + (piece << parts_log2) * 32 + lane;
    float4 one[kMaxParts];
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      if (part < parts) one[part] = from[part * 32];
    }
    if (piece + kThreads / 32 < pieces) next = added(piece + kThreads / 32);
    float v[4] = {};  // two rows of an output, two of the next
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      if (part >= parts) continue;
      v[0] += one[part].x;
      v[1] += one[part].y;
      v[2] += one[part].z;
      v[3] += one[part].w;
    }
    if (column_of(piece) >= p.out) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (row_of(piece, e) >= p.rows) continue;
      const float2 result = {v[e] + (end.bias.x + end.residual[e].x), v[2 + e] + (end.bias.y + end.residual[e].y)};
      *reinterpret_cast<float2*>(static_cast<float*>(p.output) + static_cast<int64_t>(row_of(piece, e)) * p.out +
                                 column_of(piece)) = result;
    }
  }
  stamp(12);
#endif
}

template <int kRows>
cudaError_t launch_rows(const WholeFfnParams& p, const Schedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  const auto go = [&](auto* kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads),
                  static_cast<size_t>(Shape<kRows>::kBytes + 1024), s.parts, facts, stream, p, s);
  };
  const bool one_turn = ceil_div(p.hidden, kHidden) <= s.parts;
  if (one_turn && s.parts_log2 == 3) return go(whole_tf32_kernel<kRows, 3>);
  if (one_turn && s.parts_log2 == 2) return go(whole_tf32_kernel<kRows, 2>);
  return go(whole_tf32_kernel<kRows, -1>);
}

// STYLEFORGE_GEMM_TUNE="one=1,parts=4,rows=16" (one: 1 never, 2 always; not where "small" asks for others)
Schedule schedule(const WholeFfnParams& p, const Overrides& overrides, const DeviceFacts& facts) {
  Schedule s;
  const int64_t all = ceil_div(p.hidden, kHidden);
  const auto wanted = overrides.tuned("parts", kMaxParts);
  while (s.parts * 2 <= wanted && s.parts < kMaxParts && s.parts * 2 <= all) {
    s.parts *= 2;
    ++s.parts_log2;
  }
  // Clusters of four and eight find room on ten of eleven multiprocessors.
  const int64_t room = facts.multiprocessors - facts.multiprocessors / 11;
  while (s.rows < 32 && ceil_div(p.rows, s.rows) * s.parts > room) s.rows += 8;
  s.rows = static_cast<int>(overrides.tuned("rows", s.rows));
  s.rows = s.rows <= 16 ? 16 : s.rows <= 24 ? 24 : 32;
  s.blocks = static_cast<int>(ceil_div(p.rows, s.rows)) * s.parts;
  s.stamp = static_cast<int>(overrides.tuned("stamp", 0));
  return s;
}

}  // namespace

cudaError_t whole_tf32_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("one", 0);
  if (overrides.tuned("mma", 0) != 0) return cudaSuccess;
  if (p.dtype != DType::kFloat32 || !small_ffn::small_ffn_takes(p, kWidth, wish, overrides, facts)) return cudaSuccess;
  constexpr int kFewestRows = 64, kShortestSum = 64;
  const auto s = schedule(p, overrides, facts);
  supported = wish == 2 || (p.rows >= kFewestRows && p.embed >= kShortestSum && p.hidden >= kShortestSum &&
                            s.blocks <= facts.multiprocessors && ceil_div(p.hidden, kHidden) <= 2 * s.parts);
  return cudaSuccess;
}

cudaError_t launch_whole_tf32(const WholeFfnParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto s = schedule(p, Overrides("STYLEFORGE_GEMM_TUNE"), facts);
  switch (s.rows) {
    case 16:
      return launch_rows<16>(p, s, facts, stream);
    case 24:
      return launch_rows<24>(p, s, facts, stream);
    default:
      return launch_rows<32>(p, s, facts, stream);
  }
}

}  // namespace styleforge::cuda
