// A small float32 feed-forward network in one launch, to float32's accuracy by 3xTF32 on mma.sync (in clusters: sm_90).
//
//   cluster:  32 rows, the hidden width cut up among its blocks
//   block:    eight warps, 64 hidden columns at a time. First product: a warp has half of the columns and a quarter of
//             k; the quarters meet in shared memory, where each thread adds up eight numbers and activates them. Second
//             product: a warp has an eighth of the outputs
//
// What such sizes cost is latency, and the same weights read by many multiprocessors. So operands go from memory to
// registers, 16 bytes a lane, all of them at once: as k is what is summed over, its numbers may come in any order that
// both operands share. At the end each block sends its sums to the blocks that have a share of the rows each, and those
// add them in the order of the blocks. (For 16-bit numbers the same is no faster than whole_sm90.cu.)
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/types.cuh"
#include "gelu.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHidden = 64;  // columns at a time
constexpr int kMaxParts = 8;
constexpr int kQuarters = 4;                // of k, in the first product
constexpr int kQuarterPitch = kHidden + 8;  // of a row of their sums: four rows in different banks

constexpr int kLine = 4;     // numbers in 16 bytes
constexpr int kWidth = 128;  // of input and output, at most
constexpr int kActivatedPitch = kHidden + 16, kSumPitch = kWidth + 8;

struct Schedule {
  int parts = 1;  // of the hidden width, the blocks of a cluster
  int blocks = 0;
};

constexpr size_t kSharedBytes = sizeof(float) * kRows * (kQuarters * kQuarterPitch + kActivatedPitch + kSumPitch);

#ifdef STYLEFORGE_HAS_CLUSTER

constexpr int kGranule = 4 * kLine;  // k of two instructions: four lanes with 16 bytes each

struct Line {
  uint32_t word[4];
};

// 16 bytes of a row, zeros beyond the matrix.
__device__ __forceinline__ Line load_line(const void* matrix, int64_t stride, int row, int rows, int column,
                                          int columns) {
  uint4 v{};
  if (row < rows && column < columns) {
    v = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(matrix) + row * stride + column));
  }
  return {{v.x, v.y, v.z, v.w}};
}

// d[i][j] += a[i] b[j]^T over a granule of k. a[i]: lines of rows l / 4 and l / 4 + 8 of lane l; b[j]: of row l / 4.
template <int kTall, int kWide>
__device__ __forceinline__ void multiply_granule(float (&d)[kTall][kWide][4], const Line (&a)[kTall][2],
                                                 const Line (&b)[kWide]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint32_t hi[kTall][4], lo[kTall][4], b_hi[kWide][2], b_lo[kWide][2];
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        hi[i][r] = a[i][r % 2].word[2 * s + r / 2];
        split_fragment(hi[i][r], hi[i][r], lo[i][r]);
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        b_hi[j][r] = b[j].word[2 * s + r];
        split_fragment(b_hi[j][r], b_hi[j][r], b_lo[j][r]);
      }
    }
    // The units cut off what an addition does not fit: so the large term of each step is summed in float32 by itself,
    // and the small ones, where that does not matter, in the units.
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        constexpr float kZero[4] = {};
        float small[4], large[4];
        multiply<float>(large, hi[i], b_hi[j][0], b_hi[j][1], kZero);
        multiply<float>(small, lo[i], b_hi[j][0], b_hi[j][1], kZero);
        multiply<float>(small, hi[i], b_lo[j][0], b_lo[j][1], small);
#pragma unroll
        for (int r = 0; r < 4; ++r) d[i][j][r] += large[r] + small[r];
      }
    }
  }
}

// One element in the plain way, where the parts of a number that is not finite gave NaN (see gemm/finish.cuh).
__device__ __noinline__ float multiply_plainly(const float* a, const float* b, int k) {
  float sum = 0;
  for (int i = 0; i < k && !isnan(sum); ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

__device__ __forceinline__ void store_remote(uint32_t address, float first, float second) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

#endif  // STYLEFORGE_HAS_CLUSTER

__global__ void __launch_bounds__(kThreads)
    whole_mma_kernel(const __grid_constant__ WholeFfnParams p, const __grid_constant__ Schedule s) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr int kFirstGranules = kWidth / (kQuarters * kGranule), kSecondGranules = kHidden / kGranule;
  constexpr int kFirstTiles = kHidden / 16, kSecondTiles = kWidth / (8 * kWarps);  // of eight columns, a warp's
  extern __shared__ __align__(16) unsigned char dynamic[];
  auto* quarters = reinterpret_cast<float*>(dynamic);               // [quarter of k][row][hidden column]
  float* activated = quarters + kQuarters * kRows * kQuarterPitch;  // [row][hidden column]
  float* sums = activated + kRows * kActivatedPitch;                // [part][row of share][output]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_in_tile = lane / 4, line = lane % 4 * kLine;
  const int rank = static_cast<int>(cluster_rank());
  const int first_row = static_cast<int>(blockIdx.x) / s.parts * kRows;
  const int all_chunks = (p.hidden + kHidden - 1) / kHidden;
  const int first_chunk = all_chunks * rank / s.parts;
  const int chunks = all_chunks * (rank + 1) / s.parts - first_chunk;
  const int quarter = warp % kQuarters, side = warp / kQuarters;

  cluster_arrive();  // this block is there: its shared memory may be written
  wait_for_predecessor();
  release_successor();

  Line x[kFirstGranules][2][2];
#pragma unroll
  for (int g = 0; g < kFirstGranules; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[g][i / 2][i % 2] = load_line(p.input, p.input_stride, first_row + 8 * i + row_in_tile, p.rows,
                                     (quarter + g * kQuarters) * kGranule + line, p.embed);
    }
  }
  float total[2][kSecondTiles][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int column = (first_chunk + chunk) * kHidden;
    Line first[kFirstGranules][kFirstTiles], second[kSecondGranules][kSecondTiles];
#pragma unroll
    for (int g = 0; g < kFirstGranules; ++g) {
#pragma unroll
      for (int j = 0; j < kFirstTiles; ++j) {
        first[g][j] = load_line(p.fc1_weight, p.fc1_stride, column + side * 32 + 8 * j + row_in_tile, p.hidden,
                                (quarter + g * kQuarters) * kGranule + line, p.embed);
      }
    }
#pragma unroll
    for (int g = 0; g < kSecondGranules; ++g) {
#pragma unroll
      for (int j = 0; j < kSecondTiles; ++j) {
        second[g][j] = load_line(p.fc2_weight, p.fc2_stride, (warp * kSecondTiles + j) * 8 + row_in_tile, p.out,
                                 column + g * kGranule + line, p.hidden);
      }
    }
    // What this thread activates: four neighbouring columns, and the four that are 32 further on.
    const int row = threadIdx.x / 8, at = threadIdx.x % 8 * 4;
    Vec<float, 4> bias[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = column + at + 32 * h;
      if (p.fc1_bias != nullptr && c < p.hidden) bias[h] = load_const<Vec<float, 4>>(p.fc1_bias, c / 4);
    }

    float d[2][kFirstTiles][4] = {};
#pragma unroll
    for (int g = 0; g < kFirstGranules; ++g) multiply_granule(d, x[g], first[g]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = quarters + (quarter * kRows + 8 * i + row_in_tile) * kQuarterPitch + side * 32 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kFirstTiles; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {d[i / 2][j][i % 2 * 2], d[i / 2][j][i % 2 * 2 + 1]};
      }
    }
    __syncthreads();
    float h[8] = {};
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float4 one = *reinterpret_cast<const float4*>(quarters + (q * kRows + row) * kQuarterPitch + at + 32 * v);
        h[4 * v] += one.x;
        h[4 * v + 1] += one.y;
        h[4 * v + 2] += one.z;
        h[4 * v + 3] += one.w;
      }
    }
    const int64_t global_row = first_row + row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = column + at + i / 4 * 32 + i % 4;
      if (isnan(h[i]) && global_row < p.rows && c < p.hidden) {
        h[i] = multiply_plainly(static_cast<const float*>(p.input) + global_row * p.input_stride,
                                static_cast<const float*>(p.fc1_weight) + c * p.fc1_stride, p.embed);
      }
    }
    if (p.product != nullptr && global_row < p.rows) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int c = column + at + 32 * v;
        auto* to = reinterpret_cast<float4*>(static_cast<float*>(p.product) + global_row * p.hidden + c);
        if (c < p.hidden) *to = {h[4 * v], h[4 * v + 1], h[4 * v + 2], h[4 * v + 3]};
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] += bias[i / 4].data[i % 4];
    ffn_activate<false>(h, p.activation);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      float four[4] = {};  // beyond the hidden width an infinite input would make NaN of the zeros there
      if (column + at + 32 * v < p.hidden) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = h[4 * v + i];
      }
      *reinterpret_cast<Vec<float, 4>*>(activated + row * kActivatedPitch + at + 32 * v) = rounded<float>(four);
    }
    __syncthreads();

    float part[2][kSecondTiles][4] = {};
#pragma unroll
    for (int g = 0; g < kSecondGranules; ++g) {
      Line lines[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto v =
            *reinterpret_cast<const uint4*>(activated + (8 * i + row_in_tile) * kActivatedPitch + g * kGranule + line);
        lines[i / 2][i % 2] = {{v.x, v.y, v.z, v.w}};
      }
      multiply_granule(part, lines, second[g]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kSecondTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          {
            const int out = (warp * kSecondTiles + j) * 8 + lane % 4 * 2 + r % 2;
            if (isnan(part[i][j][r]) && out < p.out) {
              part[i][j][r] = multiply_plainly(activated + (16 * i + r / 2 * 8 + row_in_tile) * kActivatedPitch,
                                               static_cast<const float*>(p.fc2_weight) + out * p.fc2_stride + column,
                                               min(kHidden, p.hidden - column));
            }
          }
          total[i][j][r] += part[i][j][r];
        }
      }
    }
  }

  const int share = kRows / s.parts;
  __syncwarp();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 8 * i + row_in_tile;
    const float* to = sums + (rank * share + row % share) * kSumPitch + warp * kSecondTiles * 8 + lane % 4 * 2;
    const uint32_t address = map_shared(static_cast<uint32_t>(__cvta_generic_to_shared(to)), row / share);
#pragma unroll
    for (int j = 0; j < kSecondTiles; ++j) {
      store_remote(address + 8 * j * static_cast<int>(sizeof(float)), total[i / 2][j][i % 2 * 2],
                   total[i / 2][j][i % 2 * 2 + 1]);
    }
  }

  // This block's share of the rows, four outputs at a time.
  constexpr int kVectors = kWidth / 4;
  struct Added {
    Vec<float, 4> bias{}, residual{};
  };
  const auto row_of = [&](int i) { return static_cast<int64_t>(first_row + rank * share + i / kVectors); };
  const auto column_of = [&](int i) { return i % kVectors * 4; };
  const auto wanted = [&](int i) { return i < share * kVectors && row_of(i) < p.rows && column_of(i) < p.out; };
  const auto added = [&](int i) {
    Added v;
    if (!wanted(i)) return v;
    if (p.fc2_bias != nullptr) v.bias = load_const<Vec<float, 4>>(p.fc2_bias, column_of(i) / 4);
    if (p.residual != nullptr) {
      const float* from = static_cast<const float*>(p.residual) + row_of(i) * p.residual_stride + column_of(i);
      v.residual = *reinterpret_cast<const Vec<float, 4>*>(from);
    }
    return v;
  };
  cluster_arrive();
  Added next = added(threadIdx.x);
  __syncwarp();
  cluster_wait();
  for (int i = threadIdx.x; i < share * kVectors; i += kThreads) {
    const Added end = next;
    next = added(i + kThreads);
    const float* from = sums + i / kVectors * kSumPitch + column_of(i);
    float v[4] = {};
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      if (part >= s.parts) continue;
      const float4 one = *reinterpret_cast<const float4*>(from + part * share * kSumPitch);
      v[0] += one.x;
      v[1] += one.y;
      v[2] += one.z;
      v[3] += one.w;
    }
    if (!wanted(i)) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] += end.bias.data[j] + end.residual.data[j];
    *reinterpret_cast<Vec<float, 4>*>(static_cast<float*>(p.output) + row_of(i) * p.out + column_of(i)) =
        rounded<float>(v);
  }
#endif
}

// STYLEFORGE_GEMM_TUNE="one=1,parts=4" (one: 1 never, 2 always; not where "small" asks for others)
Schedule schedule(const WholeFfnParams& p, const Overrides& overrides, const DeviceFacts& facts) {
  Schedule s;
  const int64_t chunks = ceil_div(p.hidden, kHidden), tiles = ceil_div(p.rows, kRows);
  // Clusters of four and eight find room on ten of eleven multiprocessors.
  const int64_t room = facts.multiprocessors - facts.multiprocessors / 11;
  while (s.parts < kMaxParts && s.parts * 2 <= chunks && tiles * s.parts * 2 <= room) s.parts *= 2;
  s.parts = std::min<int>(kMaxParts, static_cast<int>(overrides.tuned("parts", s.parts)));
  while (kRows % s.parts != 0) --s.parts;
  s.blocks = static_cast<int>(tiles) * s.parts;
  return s;
}

}  // namespace

cudaError_t whole_mma_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("one", 0);
  if (wish == 1 || (wish == 0 && overrides.tuned("small", 0) != 0) || (overrides.forced() && !overrides.forced("sm90")))
    return cudaSuccess;
  if (facts.major != 9 || !facts.has_cluster()) return cudaSuccess;
  if (p.dtype != DType::kFloat32 || p.rows < 1 || p.embed < 1 || p.hidden < 1 || p.out < 1) return cudaSuccess;
  if (p.embed > kWidth || p.out > kWidth) return cudaSuccess;
  for (const int64_t one : {int64_t{p.embed}, int64_t{p.hidden}, int64_t{p.out}, p.input_stride, p.fc1_stride,
                            p.fc2_stride, p.residual_stride}) {
    if (one % kLine != 0) return cudaSuccess;
  }
  if (!aligned16(p.input) || !aligned16(p.fc1_weight) || !aligned16(p.fc2_weight) || !aligned16(p.fc1_bias) ||
      !aligned16(p.fc2_bias) || !aligned16(p.residual)) {
    return cudaSuccess;
  }
  // Where a block has more to do one after the other, and for a few rows, products one by one are faster: read off one
  // H200. Short sums of float32 are hard to beat in accuracy.
  constexpr int kFewestRows = 128, kShortestSum = 64;
  const auto s = schedule(p, overrides, facts);
  const bool one_turn = ceil_div(p.hidden, kHidden) <= s.parts;
  supported = wish == 2 || (p.rows >= kFewestRows && p.embed >= kShortestSum && p.hidden >= kShortestSum && one_turn &&
                            s.blocks <= facts.multiprocessors);
  return cudaSuccess;
}

cudaError_t launch_whole_mma(const WholeFfnParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto s = schedule(p, Overrides("STYLEFORGE_GEMM_TUNE"), facts);
  return launch(whole_mma_kernel, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), kSharedBytes, s.parts, facts,
                stream, p, s);
}

}  // namespace styleforge::cuda
