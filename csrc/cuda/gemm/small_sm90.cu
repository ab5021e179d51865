// The matrix product of launch.h on wgmma (sm_90a), for products that do not fill the device.
//
//   cluster:    64 x kColumns of the output, k cut up among its blocks
//   block:      one warpgroup. Rows of a and b as they are, 32 numbers of k a stage, by TMA into a ring; a's fragments
//               split in registers, b in shared memory: there is time enough for both here, and no launch before this
//               one that prepares b
//
// At the end the blocks' sums lie in shared memory, and each block adds those of its share of the rows, in the order of
// the blocks. Arithmetic as in gemm_sm90.cu, but that sums move on to float32 registers after every eight numbers: on
// such sizes cuBLAS cuts up k as well, which makes it more accurate than on large ones.
#include <algorithm>

#include "../common/cluster.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kThreads = 128;

template <int kColumns>
struct Traits {
  static constexpr int kABytes = kRows * kChunkBytes;
  static constexpr int kBBytes = kColumns * kChunkBytes;
  static constexpr int kStageBytes = kABytes + 2 * kBBytes;  // b's second half is for what the first one leaves out
  static constexpr int kPitch = kColumns + 8;  // of a row of sums, so that writes fall into different banks
  static constexpr int kSumBytes = kRows * kPitch * static_cast<int>(sizeof(float));
  static_assert(kColumns % 32 == 0 && kStageBytes % 1024 == 0, "stages stay aligned for the swizzle");
};

template <int kColumns, bool kSplit>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 2 : 3)
    small_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                      const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = Traits<kColumns>;
  extern __shared__ unsigned char dynamic[];
  unsigned char* base = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t ring = shared_address(base);
  __shared__ uint64_t full_a[kMaxGemmStages], full_b[kMaxGemmStages];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int parts = s.cluster;
  const int rank = static_cast<int>(cluster_rank());
  const int tile = blockIdx.x / parts;
  const int tiles_m = (p.m + kRows - 1) / kRows;
  const int first_row = tile % tiles_m * kRows;
  const int first_column = tile / tiles_m * kColumns;
  const int all_chunks = (p.k + kChunk - 1) / kChunk;
  const int first_chunk = all_chunks * rank / parts;
  const int chunks = all_chunks * (rank + 1) / parts - first_chunk;

  if (threadIdx.x == 0) {
    prefetch_map(&b_map);
    prefetch_map(&a_map);
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full_a[i], 1);
      mbarrier_init(&full_b[i], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (!p.b_is_ready) wait_for_predecessor();
  release_successor();  // its blocks find room beside these ones

  const auto load_a = [&](int chunk, int stage) {
    mbarrier_arrive_expect(&full_a[stage], T::kABytes);
    load_box(ring + stage * T::kStageBytes, &a_map, (first_chunk + chunk) * kChunk, first_row, &full_a[stage]);
  };
  const auto load_b = [&](int chunk, int stage) {
    mbarrier_arrive_expect(&full_b[stage], T::kBBytes);
    load_box(ring + stage * T::kStageBytes + T::kABytes, &b_map, (first_chunk + chunk) * kChunk, first_column,
             &full_b[stage]);
  };
  const auto load_first = [&](const auto& load) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < min(chunks, s.stages); ++i) load(i, i);
    }
    __syncwarp();
  };
  load_first(load_b);
  if (!p.b_is_ready) load_first(load_a);

  using Mma = Wgmma<MmaKind::kTF32, kColumns>;
  const int row_in_tile = warp * 16 + lane % 16;
  const uint32_t full_a_at = shared_address(full_a), full_b_at = shared_address(full_b);
  float total[kColumns / 2];
  Fragments fragments[2];
  int stage = 0, last_stage = 0;  // of the chunk whose fragments are loaded next, and of the one before
  uint32_t parity = 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) total[i] = 0;

  const auto load_next = [&](Fragments& f, int chunk) {
    mbarrier_wait(full_b_at + 8 * stage, parity);
    unsigned char* b = base + stage * T::kStageBytes + T::kABytes;
#pragma unroll
    for (int i = 0; i < kColumns * 8 / kThreads; ++i) {  // 16 bytes a time, wherever in the row they are
      Four* at = reinterpret_cast<Four*>(b) + i * kThreads + threadIdx.x;
      const Four v = *at;
      Four hi, lo;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        hi.data[j] = __uint_as_float(round_tf32(v.data[j]));
        lo.data[j] = __uint_as_float(round_tf32(v.data[j] - hi.data[j]));
      }
      *at = hi;
      if constexpr (kSplit) *reinterpret_cast<Four*>(reinterpret_cast<unsigned char*>(at) + T::kBBytes) = lo;
    }
    fence_async_shared();
    if (chunk == 0 && p.b_is_ready) {
      wait_for_predecessor();
      load_first(load_a);
    }
    mbarrier_wait(full_a_at + 8 * stage, parity);
    load_fragments<kSplit>(f, ring + stage * T::kStageBytes + row_in_tile * kChunkBytes, row_in_tile);
    __syncthreads();
  };
  const auto add = [&](const float (&part)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) total[i] += part[i];
  };
  // The sums move on to float32 registers after every eight numbers: registers and time are there.
  const auto multiply = [&](const Fragments& f, Fragments& next, int chunk) {
    const uint64_t b = wgmma_descriptor(ring + stage * T::kStageBytes + T::kABytes);
    float d[2][kColumns / 2];
    wgmma_fence();
    if constexpr (kSplit) {
      multiply_small_terms<kColumns>(d[1], f, b, b + (T::kBBytes >> 4));
      wgmma_commit();
    }
    Mma::run(d[0], f.hi[0], b, false);
    wgmma_commit();
    // Every warp has passed the barrier after the chunk before this one was multiplied: its stage is free.
    if (threadIdx.x == 0 && chunk > 0 && chunk - 1 + s.stages < chunks) {
      load_b(chunk - 1 + s.stages, last_stage);
      load_a(chunk - 1 + s.stages, last_stage);
    }
    __syncwarp();
    last_stage = stage;
    if (++stage == s.stages) {
      stage = 0;
      parity ^= 1;
    }
    if (chunk + 1 < chunks) load_next(next, chunk + 1);
    float sum[kColumns / 2];
    const auto add = [&](const float (&part)[kColumns / 2], bool first) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sum[i] = first ? part[i] : sum[i] + part[i];
    };
#pragma unroll
    for (int k = 1; k < 4; ++k) {
      wgmma_wait<1>();
      if (kSplit || k > 1) add(d[k % 2], k == (kSplit ? 1 : 2));
      wgmma_fence();
      Mma::run(d[k % 2], f.hi[k], b + 2 * k, false);
      wgmma_commit();
    }
    wgmma_wait<1>();
    add(d[0], false);
    wgmma_wait<0>();
    add(d[1], false);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) total[i] += sum[i];
  };
  if (chunks > 0) load_next(fragments[0], 0);
  for (int i = 0; i < chunks; i += 2) {
    multiply(fragments[0], fragments[1], i);
    if (i + 1 < chunks) multiply(fragments[1], fragments[0], i + 1);
  }

  float* sums = reinterpret_cast<float*>(base + s.stages * T::kStageBytes);
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<float2*>(sums + (warp * 16 + lane / 4 + 8 * h) * T::kPitch + 8 * i + 2 * (lane % 4)) =
          make_float2(total[4 * i + 2 * h], total[4 * i + 2 * h + 1]);
    }
  }

  if (chunks == 0 && p.b_is_ready) wait_for_predecessor();
  cluster_arrive();
  cluster_wait();
  // This block's share of the rows.
  constexpr int kVectors = kColumns / 4;
  const int share = kRows / parts;
  const uint32_t sums_at = ring + s.stages * T::kStageBytes;
  for (int i = threadIdx.x; i < share * kVectors; i += kThreads) {
    const int r = rank * share + i / kVectors;
    const int c = i % kVectors * 4;
    Four v[1] = {};
    float4 other[kMaxGemmParts];
#pragma unroll
    for (int part = 0; part < kMaxGemmParts; ++part) {  // all on their way before the first one is added
      if (part < parts)
        other[part] = load_remote(sums_at + (r * T::kPitch + c) * static_cast<int>(sizeof(float)), part);
    }
#pragma unroll
    for (int part = 0; part < kMaxGemmParts; ++part) {
      if (part >= parts) continue;
      v[0].data[0] += other[part].x;
      v[0].data[1] += other[part].y;
      v[0].data[2] += other[part].z;
      v[0].data[3] += other[part].w;
    }
    finish(p, v, first_row + r, 0, first_column + c, min(4, p.n - first_column - c), s.vectors);
  }
  cluster_arrive();  // nobody leaves while others read here
  cluster_wait();
#endif
}

template <int kColumns, bool kSplit>
cudaError_t launch_tile(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  using T = Traits<kColumns>;
  CUtensorMap a, b;
  if (const auto error = matrix_map(p.a, p.m, p.k, p.a_stride, kRows, a)) return error;
  if (const auto error = matrix_map(p.b, p.n, p.k, p.b_stride[0], kColumns, b)) return error;
  const size_t shared = 1024 + s.stages * T::kStageBytes + T::kSumBytes;
  return launch(small_gemm_kernel<kColumns, kSplit>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), shared,
                s.cluster, facts, stream, p, s, a, b);
}

template <int kColumns>
cudaError_t launch_columns(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  return p.precision == GemmPrecision::kIeee ? launch_tile<kColumns, true>(p, s, facts, stream)
                                             : launch_tile<kColumns, false>(p, s, facts, stream);
}

}  // namespace

cudaError_t launch_small_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (s.columns) {
    case 32:
      return launch_columns<32>(p, s, facts, stream);
    case 64:
      return launch_columns<64>(p, s, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace styleforge::cuda
