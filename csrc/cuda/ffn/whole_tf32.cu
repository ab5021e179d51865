// A small float32 feed-forward network in one launch, to float32's accuracy by 3xTF32 on wgmma (sm_90a).
//
//   block:    16, 24 or 32 rows, two warpgroups. 64 hidden columns at a time (a turn), transposed: the weights are the
//             left operand, which comes from registers, the rows the right one, in shared memory in two parts. First
//             product: each warpgroup half of k; they exchange halves of the sums and activate one half of the columns
//             each. Second product: each warpgroup half of the outputs
//   cluster:  the same rows, the hidden width cut up among its blocks. A block adds up some of the outputs: the others
//             send it theirs (st.async), and nobody waits for anything but those
//
// So each weight goes straight from memory to the one lane that needs it and is split once, a row's number once a
// block. What such sizes cost is latency: of 4.5 us for 1 x 256 x 128 -> 512 (one H200; by mma.sync, 32 rows a
// block: 7.5) 1.2 are a launch behind another; of the 6,400 cycles of the rest (with clock stamps) the rows take 1,400
// to arrive, to be split and to be there, the products 1,200 each (in the units alone 600), exchange and activation
// 1,300, sums and their way 1,200. Clusters of eight find room fifteen times: sixteen of them, 16 rows a block,
// take 5.1 us. A multiprocessor has registers and shared memory for two blocks, as the next launch's come while this
// one's run. Hardly faster: the large and the small parts of the rows in one wider product, large terms of 32 of k
// summed in the units (4.4, and 1.3 times the error). Slower: loads of weights that ptxas puts off (4.9).
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/overrides.h"
#include "whole_tf32.cuh"
#include "whole_tile.cuh"

namespace styleforge::cuda {
namespace {

using namespace small_tf32;

struct Schedule {
  int parts = 1;  // of the hidden width, the blocks of a cluster: a power of two
  int parts_log2 = 0;
  int rows = 16;  // of a block
  int blocks = 0;
  bool one_turn(const WholeFfnParams& p) const { return ceil_div(p.hidden, kHidden) <= parts; }
};

#ifdef STYLEFORGE_HAS_WGMMA

using small_ffn::Line;
using small_ffn::load_wanted;

// Not moved down to where it is used.
template <typename P>
__device__ __forceinline__ void pin(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void pin(uint32_t (&v)[4]) {
  asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3]));
}

// As load_wanted, and ptxas, which would have such loads wait until shortly before their use, keeps it where it stands.
__device__ __forceinline__ void load_now(uint32_t (&v)[4], const void* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
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

  if (threadIdx.x == 0) {
    mbarrier_init(&merged, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_arrive_relaxed();  // sums may come
  if (threadIdx.x == 0) mbarrier_arrive_expect(&merged, S::kSumBytes);

  const struct {
    int unit, warp, lane, rank, tile, tiles, first_row, first_chunk, chunks;
  } at{0, warp, lane, rank, tile, tiles, first_row, first_chunk, chunks};
  small_ffn::prefetch<float>(p, at, parts, kRows);

  // The first product: this warp has hidden columns own + 0 and own + 2 of a turn's, half of k.
  const int own = warp % 4 * 16 + quad / 2 * 4 + quad % 2, k = group * 64 + place * 4;
  // Of the input: 4 rows by 128 bytes a warp.
  Line x[kTiles] = {};
  const float* x_at[kTiles];
  uint32_t x_to[kTiles];
  bool x_here[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int index = 4 * i + warp % 4, row = index / 2 * 4 + lane / 8,
              column = group * 64 + index % 2 * 32 + lane % 8 * 4;
    x_here[i] = first_row + row < p.rows && column < p.embed;
    x_at[i] = static_cast<const float*>(p.input) + (x_here[i] ? (first_row + row) * p.input_stride + column : 0);
    // Its four numbers go to neighbouring pieces of 16 bytes; the swizzle flips bits 4 to 6 of them.
    x_to[i] = base_at + S::kInput + (group * 2 + index % 2) * S::kBoxBytes + row * 128 +
              ((lane % 8 / 4 * 4 ^ row % 8) << 4) + lane % 4 * 4;
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
      for (int h = 0; h < 2; ++h) load_now(first[g][h], first_at[h] + 16 * g, 16 * g < p.embed - k);
    }
  };
  // The second weights, by all threads: a row of 256 bytes is 16 threads'.
  const int copy_column = threadIdx.x % 16 * 4, copy_rows = p.out - static_cast<int>(threadIdx.x) / 16;
  const uint32_t copy_to = base_at + S::kWeights + threadIdx.x / 16 * S::kWeightPitch + copy_column * 4;
  const float* second_at = static_cast<const float*>(p.fc2_weight) +
                           min(static_cast<int>(threadIdx.x) / 16, p.out - 1) * p.fc2_stride + first_column +
                           copy_column;
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
  wait_for_predecessor();
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
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + S::kPartBytes), "r"(lo) : "memory");
    }
  }
  fence_async_shared();
  if (group == 0) {
    named_barrier(1, 128);
  } else {
    named_barrier(2, 128);
  }

  const uint64_t input_boxes = wgmma_descriptor(base_at + S::kInput + group * 2 * S::kBoxBytes);
  const uint64_t activated_boxes = wgmma_descriptor(base_at + S::kActivated);
  const uint32_t activated_to = base_at + S::kActivated + warp % 4 / 2 * S::kBoxBytes + place * 2 * 128 +
                                (((warp % 2 * 4 + quad % 2 + 2 * group) ^ (2 * place)) << 4) + quad / 2 * 4;
  float2* const exchange = reinterpret_cast<float2*>(base + S::kExchange);
  const uint32_t fragments_at = base_at + S::kWeights + (warp * 16 + 2 * quad) * S::kWeightPitch + place * 16;
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
    if (p.fc2_bias != nullptr)
      v.bias = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(p.fc2_bias) + c));
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
  const auto fetch_first = [&](int g, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = first[g][i / 4][i % 4];
  };
  const auto load_second = [&](int g, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[h][0]), "=r"(a[h][1]), "=r"(a[h][2]), "=r"(a[h][3])
                   : "r"(fragments_at + h * S::kWeightPitch + g * 64)
                   : "memory");
    }
  };
  float total[S::kSums];
  for (int chunk = 0;;) {  // there is one at least
    const int column = first_column + chunk * kHidden, own_column = column + own + 2 * group;
    float part[S::kSums];
    multiply_64<kRows>(part, fetch_first, input_boxes, [&](int granule) {
      if (granule == 0) copy_second(chunk);
      if (granule == 1 && chunk == 0) {
        __syncwarp();
        cluster_wait();
      }
    });
    // Each warpgroup has half of k. It adds up and activates one half of the columns.
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 others =
          group == 0 ? make_float2(part[4 * i + 2], part[4 * i + 3]) : make_float2(part[4 * i], part[4 * i + 1]);
      exchange[((1 - group) * kTiles + i) * 128 + threadIdx.x % 128] = others;
    }
    copy_wait<0>();
    __syncthreads();
    uint32_t ahead[2][4];
    load_second(0, ahead);
    float h[S::kValues];  // rows 2 place, 2 place + 1 of each tile
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 others = exchange[(group * kTiles + i) * 128 + threadIdx.x % 128];
      h[2 * i] = (group == 0 ? part[4 * i] : part[4 * i + 2]) + others.x;
      h[2 * i + 1] = (group == 0 ? part[4 * i + 1] : part[4 * i + 3]) + others.y;
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
    if (p.product != nullptr) [[unlikely]] {
      float kept[S::kValues];
#pragma unroll
      for (int i = 0; i < S::kValues; ++i) kept[i] = h[i];
      keep_hidden<kRows>(kept, p, first_row + 2 * place, own_column);
    }
#pragma unroll
    for (int i = 0; i < S::kValues; ++i) h[i] += bias;
    if (kTurns && chunk + 1 < chunks) bias = hidden_bias(own_column + kHidden);
    if (p.activation == FfnActivation::kGelu) [[likely]] {
      gelu_exact(h);
    } else {
      ffn_activate<false>(h, p.activation);
    }
#pragma unroll
    for (int i = 0; i < S::kValues; ++i) {
      uint32_t hi, lo;
      split_activated(h[i], hi, lo);
      const uint32_t to = (activated_to ^ (i % 2 << 4)) + i / 2 * 1024 + i % 2 * 128;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(hi) : "memory");
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + S::kPartBytes), "r"(lo) : "memory");
    }
    fence_async_shared();
    __syncthreads();
    multiply_64<kRows>(
        part,
        [&](int g, uint32_t (&a)[2][4]) {
          if (g > 0) {
            load_second(g, a);
          } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = ahead[i / 4][i % 4];
          }
        },
        activated_boxes, [](int) {});
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
    if (!kTurns || ++chunk == chunks) break;
    __syncthreads();  // the second weights have been read
    point_first(column + kHidden);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) first[g][i / 4][i % 4] = 0;
    }
    load_first();
  }

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
  if (parts == 1) __syncthreads();
  if (warp >= pieces) return;
  Added next = added(warp);
  const auto output_of = [&](int piece) {
    return static_cast<float*>(p.output) + static_cast<int64_t>(row_of(piece, 0)) * p.out + column_of(piece);
  };
  float* to = output_of(warp);
  pin(to);
  if (parts > 1) mbarrier_wait_cluster(shared_address(&merged), 0);
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
    if (column_of(piece) < p.out) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 result = {v[e] + (end.bias.x + end.residual[e].x), v[2 + e] + (end.bias.y + end.residual[e].y)};
        if (row_of(piece, e) < p.rows) *reinterpret_cast<float2*>(to + e * p.out) = result;
      }
    }
    if (piece + kThreads / 32 < pieces) to = output_of(piece + kThreads / 32);
  }
#endif
}

template <int kRows>
cudaError_t launch_rows(const WholeFfnParams& p, const Schedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  const auto go = [&](auto* kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads),
                  static_cast<size_t>(Shape<kRows>::kBytes + 1024), s.parts, facts, stream, p, s);
  };
  if (s.one_turn(p) && s.parts_log2 == 3) return go(whole_tf32_kernel<kRows, 3>);
  if (s.one_turn(p) && s.parts_log2 == 2) return go(whole_tf32_kernel<kRows, 2>);
  return go(whole_tf32_kernel<kRows, -1>);
}

// STYLEFORGE_GEMM_TUNE="one=1,parts=4,rows=16" (one: 1 never, 2 always; not where "small" or "wide" asks for
// others)
Schedule schedule(const WholeFfnParams& p, const Overrides& overrides, const DeviceFacts& facts) {
  Schedule s;
  const int64_t all = ceil_div(p.hidden, kHidden);
  const auto wanted = overrides.tuned("parts", kMaxParts);
  while (s.parts * 2 <= wanted && s.parts < kMaxParts && s.parts * 2 <= all) {
    s.parts *= 2;
    ++s.parts_log2;
  }
  // Microseconds where each multiprocessor has one block and where it has two (which it never has with several turns):
  // read off one H200, 64 to 2048 x 128 -> 512. Clusters of four and eight find room on ten of eleven multiprocessors.
  struct Cost {
    int rows;
    float one, two;
  };
  constexpr Cost kCosts[] = {{16, 3.8f, 5.1f}, {24, 4.4f, 6.0f}, {32, 5.0f, 7.15f}};
  const int64_t room = std::max(1, (facts.multiprocessors - facts.multiprocessors / 11) / s.parts);
  float least = 0;
  for (const auto& cost : kCosts) {
    const int64_t clusters = ceil_div(p.rows, cost.rows);
    const float two = s.one_turn(p) ? cost.two : 2 * cost.one;
    const int64_t rest = clusters % (2 * room);
    const float time = static_cast<float>(clusters / (2 * room)) * two + (rest == 0      ? 0
                                                                          : rest <= room ? cost.one
                                                                                         : two);
    if (least != 0 && time >= least) continue;
    least = time;
    s.rows = cost.rows;
  }
  s.rows = static_cast<int>(overrides.tuned("rows", s.rows));
  s.rows = s.rows <= 16 ? 16 : s.rows <= 24 ? 24 : 32;
  s.blocks = static_cast<int>(ceil_div(p.rows, s.rows)) * s.parts;
  return s;
}

}  // namespace

cudaError_t whole_tf32_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("one", 0);
  if (wish == 0 && overrides.tuned("wide", 0) != 0) return cudaSuccess;
  if (p.dtype != DType::kFloat32 || !small_ffn::small_ffn_takes(p, kWidth, wish, overrides, facts)) return cudaSuccess;
  if (facts.max_shared_per_block < Shape<32>::kBytes + 1024) return cudaSuccess;
  // With more rows than these, products one by one are faster, and with fewer ones cuBLAS more accurate: read off one
  // H200. Short sums of float32 are hard to beat in accuracy.
  constexpr int kFewestRows = 64, kMostRows = 4096, kMostInTurns = 512, kShortestSum = 64;
  const auto s = schedule(p, overrides, facts);
  supported =
      wish == 2 || (p.rows >= kFewestRows && p.rows <= (s.one_turn(p) ? kMostRows : kMostInTurns) &&
                    p.embed >= kShortestSum && p.hidden >= kShortestSum && ceil_div(p.hidden, kHidden) <= 2 * s.parts);
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
