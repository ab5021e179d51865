// A small feed-forward network of 16-bit numbers in one launch, on mma.sync (in clusters: sm_90).
//
//   unit:     16 rows, four warps. 64 hidden columns at a time: a warp makes 16 of them, activated into shared memory,
//             and then a quarter of the outputs from all of them
//   block:    one unit or two, of neighbouring rows
//   cluster:  the same rows, the hidden width cut up among its blocks. A block adds up some of the outputs: the others
//             send it theirs (st.async), and nobody waits for anything but those
//
// What such sizes cost is latency. So operands go from memory to registers, 16 bytes a lane, all of them at once and in
// the order of their use: as k is what is summed over, its numbers may come in any order that both operands share.
// Their addresses, the zeros beyond the matrices' ends and a hint to the L2 cache come before the wait for the kernel's
// predecessor. Where the time of 1 x 256 x 128 -> 512 goes (one H200): of 3.2 us, 1.0 is a launch behind another that
// does nothing; of the 4,800 cycles of the rest (with clock stamps) the first operands take 1,200, the products 300 to
// 400 each, the activation 450 (both twice), sums and their way 1,000. Tried and slower: 128 blocks for 256 rows, which
// read the same lines of the L2 cache at the same time (3.75); two units a block (3.7); operands by cp.async in shared
// memory (4.0); loads as C++ has them, which ptxas makes wait for one another.
#include "../common/launch.h"
#include "../common/overrides.h"
#include "gelu.cuh"
#include "launch.h"
#include "whole_tile.cuh"

namespace styleforge::cuda {
namespace small_ffn {

// Input and output are kWidth wide at most.
template <typename T, int kWidth>
struct HalfShape {
  static constexpr int kLine = 16 / sizeof(T);  // numbers in 16 bytes
  static constexpr int kGranule = 4 * kLine;    // k of two instructions: four lanes with 16 bytes each
  static constexpr int kFirstGranules = kWidth / kGranule, kSecondGranules = kHidden / kGranule;
  static constexpr int kPitch = kHidden + kGranule;  // of a row of activated columns
  static constexpr int kActivatedBytes = kRows * kPitch * static_cast<int>(sizeof(T));
  static constexpr int kTiles = kWidth / 32;  // of eight outputs, a warp's
  static constexpr int kSumBytes = kRows * kWidth * static_cast<int>(sizeof(float));
  // Where a row is long, its registers are not enough: the input's rows lie in shared memory.
  static constexpr bool kInputShared = kWidth * sizeof(T) > 256;
  static constexpr int kInputPitch = kWidth + kGranule;
  static constexpr int kInputBytes = kInputShared ? kRows * kInputPitch * static_cast<int>(sizeof(T)) : 0;
  static constexpr int kUnitBytes = 2 * kActivatedBytes + kSumBytes + kInputBytes;
  static constexpr int kChains = 2;  // sums of the first product that do not wait for each other
};

}  // namespace small_ffn

namespace {

using namespace small_ffn;

#ifdef STYLEFORGE_HAS_CLUSTER

// As load_wanted, but what it does not want is left undefined.
__device__ __forceinline__ void load_or_nothing(uint32_t (&v)[4], const void* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}
// Not moved down to where it is used.
template <typename P>
__device__ __forceinline__ void pin(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void pin(Line& line) {
  asm volatile("" : "+r"(line.word[0]), "+r"(line.word[1]), "+r"(line.word[2]), "+r"(line.word[3]));
}

#endif  // STYLEFORGE_HAS_CLUSTER

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxUnits* kUnitThreads, 1)
    whole_registers_kernel(const __grid_constant__ WholeFfnParams p, const __grid_constant__ SmallFfnSchedule s) {
#ifdef STYLEFORGE_HAS_CLUSTER
  using S = HalfShape<T, kWidth>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t merged[kMaxUnits];

  const Place at(p, s);
  const int unit = at.unit, warp = at.warp, quad = at.quad, place = at.place, tile_row = at.tile_row;
  const int first_row = at.first_row, chunks = at.chunks;

  if (threadIdx.x % kUnitThreads == 0) {
    mbarrier_init(&merged[unit], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_arrive_relaxed();  // sums may come
  if (threadIdx.x % kUnitThreads == 0) mbarrier_arrive_expect(&merged[unit], S::kSumBytes);

  prefetch<T>(p, at, s.parts, s.units * kRows);

  T* activated = reinterpret_cast<T*>(memory + unit * S::kUnitBytes);                  // twice, by turns
  unsigned char* const sums = memory + unit * S::kUnitBytes + 2 * S::kActivatedBytes;  // [piece][part][lane]
  [[maybe_unused]] T* const input = reinterpret_cast<T*>(sums + S::kSumBytes);
  const int row = first_row + quad;
  const int first_column = at.first_chunk * kHidden, k = place * S::kLine;
  Line x[S::kInputShared ? 1 : S::kFirstGranules][2], first[S::kFirstGranules][2] = {},
                                                      second[S::kSecondGranules][S::kTiles] = {};
  Four<T> bias;
  // Beyond the matrices' rows some other one is read: what comes of it is not used.
  const T *x_at[2], *first_at[2], *second_at[S::kTiles], *bias_at;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x_at[i] = static_cast<const T*>(p.input) + min(row + 8 * i, p.rows - 1) * p.input_stride + k;
  }
  const auto point_first = [&](int column) {  // from its first hidden column on
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int n = min(column + warp * 16 + tile_row + 2 * t, p.hidden - 1);
      first_at[t] = static_cast<const T*>(p.fc1_weight) + n * p.fc1_stride + k;
    }
    bias_at = static_cast<const T*>(p.fc1_bias) + min(column + warp * 16 + place * 4, p.hidden - 4);
  };
  const auto point_second = [&](int column) {
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      const int n = min(warp * 8 * S::kTiles + j / 2 * 16 + j % 2 * 2 + tile_row, p.out - 1);
      second_at[j] = static_cast<const T*>(p.fc2_weight) + n * p.fc2_stride + column + k;
    }
  };
  const auto load_first = [&] {
#pragma unroll
    for (int g = 0; g < S::kFirstGranules; ++g) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        load_wanted(first[g][t].word, first_at[t] + g * S::kGranule, g * S::kGranule < p.embed - k);
      }
    }
    load_wanted(bias.word, bias_at, p.fc1_bias != nullptr);
  };
  const auto load_second = [&](int column) {
#pragma unroll
    for (int g = 0; g < S::kSecondGranules; ++g) {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        if (column != first_column) second[g][j] = {};
        load_wanted(second[g][j].word, second_at[j] + g * S::kGranule, g * S::kGranule < p.hidden - column - k);
      }
    }
  };
  const Outputs<T, S::kTiles> outputs(p, s, at, sums, &merged[unit]);

  point_first(first_column);
  point_second(first_column);
  // All of it before the wait, for which the compiler sees no reason.
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j) {
    pin(second_at[j]);
    if (j < 2) pin(x_at[j]);
    if (j < 2) pin(first_at[j]);
#pragma unroll
    for (int g = 0; g < S::kSecondGranules; ++g) pin(second[g][j]);
  }
  pin(bias_at);
#pragma unroll
  for (int g = 0; g < S::kFirstGranules; ++g) {
    pin(first[g][0]);
    pin(first[g][1]);
  }
  wait_for_predecessor();
  release_successor();

  if constexpr (S::kInputShared) {  // 512 bytes of a row a warp
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int r = 4 * i + warp, column = at.lane * S::kLine;
      const bool here = first_row + r < p.rows && column < p.embed;
      const T* from = static_cast<const T*>(p.input) + (here ? (first_row + r) * p.input_stride + column : 0);
      copy_async(shared_address(input + r * S::kInputPitch + column), from, here, true);
    }
    copy_commit();
  } else {
#pragma unroll
    for (int g = 0; g < S::kFirstGranules; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_or_nothing(x[g][i].word, x_at[i] + g * S::kGranule, g * S::kGranule < p.embed - k);
      }
    }
  }
  load_first();
  load_second(first_column);
  const auto added = outputs.added(warp);
  if constexpr (S::kInputShared) {
    copy_wait<0>();
    named_barrier(1 + unit, kUnitThreads);
  }
  float total[S::kTiles][4] = {};
  int other = S::kActivatedBytes / static_cast<int>(sizeof(T));
  for (int chunk = 0;;) {  // there is one at least
    const int column = first_column + chunk * kHidden;
    const int own_column = column + warp * 16 + place * 4;
    float h[8] = {};  // rows quad and quad + 8, four columns each
#pragma unroll
    for (int chain = 0; chain < S::kChains; ++chain) {
      float d[2][4] = {};
#pragma unroll
      for (int g = chain; g < S::kFirstGranules; g += S::kChains) {
        if constexpr (S::kInputShared) {
          load_lines(x[0], input + quad * S::kInputPitch + g * S::kGranule + k, 8 * S::kInputPitch);
        }
        Line own[2] = {x[S::kInputShared ? 0 : g][0], x[S::kInputShared ? 0 : g][1]};
        if constexpr (!S::kInputShared) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            own[i % 2].word[i / 2] = g * S::kGranule + k < p.embed ? own[i % 2].word[i / 2] : 0;
          }
        }
        multiply_granule<T>(d, own, first[g]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) h[i] += d[i % 4 / 2][i / 4 * 2 + i % 2];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] += bias[i % 4];
    if (p.product != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float four[4] = {h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]};
        if (row + 8 * i < p.rows && own_column < p.hidden) {
          auto* to = static_cast<T*>(p.product) + static_cast<int64_t>(row + 8 * i) * p.hidden + own_column;
          *reinterpret_cast<Vec<T, 4>*>(to) = rounded<T>(four);
        }
      }
    }
    if (chunk + 1 < chunks) {
#pragma unroll
      for (int i = 0; i < 2 * S::kFirstGranules; ++i) first[i / 2][i % 2] = {};
      bias = {};
      point_first(column + kHidden);
      load_first();
    }
    ffn_activate_as<T>(h, p.activation);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float four[4] = {};  // beyond the hidden width an infinite input would make NaN of the zeros there
      if (own_column < p.hidden) {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = h[4 * i + j];
      }
      *reinterpret_cast<Vec<T, 4>*>(activated + (quad + 8 * i) * S::kPitch + warp * 16 + place * 4) = rounded<T>(four);
    }
    named_barrier(1 + unit, kUnitThreads);

#pragma unroll
    for (int g = 0; g < S::kSecondGranules; ++g) {
      Line lines[2];
      load_lines(lines, activated + quad * S::kPitch + g * S::kGranule + k, 8 * S::kPitch);
      multiply_granule<T>(total, lines, second[g]);
    }
    if (++chunk == chunks) break;
    point_second(column + kHidden);
    load_second(column + kHidden);
    activated += other;  // the next columns go where no warp reads any more
    other = -other;
  }

  __syncwarp();
  cluster_wait();
  outputs.send_all(total);
  outputs.finish(added);
#endif
}

template <typename T>
cudaError_t launch_dtype(const WholeFfnParams& p, const SmallFfnSchedule& s, const DeviceFacts& facts,
                         cudaStream_t stream) {
  const auto go = [&](auto* kernel, int unit_bytes) {
    return launch(kernel, dim3(static_cast<unsigned>(s.blocks)), dim3(static_cast<unsigned>(s.units * kUnitThreads)),
                  static_cast<size_t>(s.units * unit_bytes), s.parts, facts, stream, p, s);
  };
  return p.embed <= 128 && p.out <= 128 ? go(whole_registers_kernel<T, 128>, HalfShape<T, 128>::kUnitBytes)
                                        : go(whole_registers_kernel<T, 256>, HalfShape<T, 256>::kUnitBytes);
}

constexpr int kBestBlocks = 66;  // half of the multiprocessors: see above

// STYLEFORGE_GEMM_TUNE="one=1,parts=4,units=2" (one: 1 never, 2 always; not where "small" asks for others)
SmallFfnSchedule schedule(const WholeFfnParams& p, const Overrides& overrides) {
  const int64_t tiles = ceil_div(p.rows, kRows);
  int parts = most_parts(p);
  if (tiles * parts > kBestBlocks && parts == kMaxParts && ceil_div(p.hidden, kHidden) <= parts) parts /= 2;
  return small_ffn_schedule(p, overrides, parts, overrides.tuned("units", 1) == 2 ? 2 : 1);
}

}  // namespace

cudaError_t whole_registers_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("one", 0);
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return cudaSuccess;
  if (!small_ffn_takes(p, 256, wish, overrides, facts)) return cudaSuccess;
  // Where more blocks would read the same weights at the same time, whole_sm90.cu is faster, whose blocks have 64 rows
  // and what they read from the copy engine: read off one H200.
  constexpr int kMostHidden = 2048;
  const auto s = schedule(p, overrides);
  const bool little = (p.embed <= 128 && p.out <= 128) || ceil_div(p.hidden, kHidden) <= 2 * s.parts;
  supported = wish == 2 ||
              (p.hidden <= kMostHidden && s.units == 1 && s.blocks <= (little ? facts.multiprocessors : kBestBlocks));
  return cudaSuccess;
}

cudaError_t launch_whole_registers(const WholeFfnParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto s = schedule(p, Overrides("STYLEFORGE_GEMM_TUNE"));
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
