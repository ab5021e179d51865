// The matrix product of launch.h on wgmma (sm_90a), for products that do not fill the device.
//
//   cluster:    64 x kColumns of the output, k cut up among its blocks
//   producer:   one thread; rows of a and b as they are, 32 numbers of k a stage, by TMA into a ring
//   consumers:  one warpgroup. a's fragments split in registers, b in shared memory: there is time enough for both
//               here, and no launch before this one that prepares b
//
// At the end the blocks' sums lie in shared memory, and each block adds those of its share of the rows, in the order of
// the blocks. Arithmetic as in gemm_sm90.cu.
#include <algorithm>

#include "../common/cluster.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr int kMaxStages = 8;
constexpr int kConsumerBarrier = 1;

template <int kColumns>
struct Traits {
  static constexpr int kABytes = kRows * kChunkBytes;
  static constexpr int kBBytes = kColumns * kChunkBytes;
  static constexpr int kStageBytes = kABytes + 2 * kBBytes;  // b's second half is for what the first one leaves out
  static constexpr int kPitch = kColumns + 8;                // of a row of sums, so that writes fall into different banks
  static constexpr int kSumBytes = kRows * kPitch * static_cast<int>(sizeof(float));
  static_assert(kColumns % 32 == 0 && kStageBytes % 1024 == 0, "stages stay aligned for the swizzle");
};

template <int kColumns, bool kSplit>
__global__ void __launch_bounds__(kThreads)
    small_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                      const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = Traits<kColumns>;
  extern __shared__ unsigned char dynamic[];
  unsigned char* base = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t ring = shared_address(base);
  __shared__ uint64_t full_a[kMaxStages], full_b[kMaxStages], empty[kMaxStages];

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
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full_a[i], 1);
      mbarrier_init(&full_b[i], 1);
      mbarrier_init(&empty[i], kConsumers / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (!p.b_is_ready) wait_for_predecessor();
  release_successor();  // its blocks find room beside these ones

  if (warp == kConsumers / 32) {
    if (lane == 0) {
      const auto load = [&](int chunk, int stage, bool of_a) {
        uint64_t* barrier = of_a ? &full_a[stage] : &full_b[stage];
        mbarrier_arrive_expect(barrier, of_a ? T::kABytes : T::kBBytes);
        load_box(ring + stage * T::kStageBytes + (of_a ? 0 : T::kABytes), of_a ? &a_map : &b_map,
                 (first_chunk + chunk) * kChunk, of_a ? first_row : first_column, barrier);
      };
      const int at_once = min(chunks, s.stages);
      for (int i = 0; i < at_once; ++i) load(i, i, false);
      if (p.b_is_ready) wait_for_predecessor();
      for (int i = 0; i < at_once; ++i) load(i, i, true);
      int stage = 0;
      uint32_t parity = 0;
      for (int chunk = at_once; chunk < chunks; ++chunk) {
        mbarrier_wait(&empty[stage], parity);
        load(chunk, stage, false);
        load(chunk, stage, true);
        if (++stage == s.stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    const int row_in_tile = warp * 16 + lane % 16;
    const uint32_t full_a_at = shared_address(full_a), full_b_at = shared_address(full_b);
    const uint32_t empty_at = shared_address(empty);
    float d[kColumns / 2], total[kColumns / 2];
    Fragments fragments[2];
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) total[i] = 0;

    const auto load_next = [&](Fragments& f) {
      mbarrier_wait(full_b_at + 8 * stage, parity);
      unsigned char* b = base + stage * T::kStageBytes + T::kABytes;
#pragma unroll
      for (int i = 0; i < kColumns * 8 / kConsumers; ++i) {  // 16 bytes a time, wherever in the row they are
        Four* at = reinterpret_cast<Four*>(b) + i * kConsumers + threadIdx.x;
        const Four v = *at;
        Four hi, lo;
#pragma unroll
        for (int j = 0; j < 4; ++j) split_tf32(v.data[j], hi.data[j], lo.data[j]);
        *at = hi;
        if constexpr (kSplit) *reinterpret_cast<Four*>(reinterpret_cast<unsigned char*>(at) + T::kBBytes) = lo;
      }
      fence_async_shared();
      mbarrier_wait(full_a_at + 8 * stage, parity);
      load_fragments<kSplit>(f, ring + stage * T::kStageBytes + row_in_tile * kChunkBytes, row_in_tile);
      named_barrier(kConsumerBarrier, kConsumers);
    };
    const auto multiply = [&](int set, bool more) {
      const uint64_t b = wgmma_descriptor(ring + stage * T::kStageBytes + T::kABytes);
      multiply_chunk<kColumns, kSplit>(d, fragments[set], b, b + (T::kBBytes >> 4), false);
      const int done = stage;
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
      if (more) load_next(fragments[set ^ 1]);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) total[i] += d[i];
    };
    if (chunks > 0) load_next(fragments[0]);
    for (int i = 0; i < chunks; i += 2) {
      multiply(0, i + 1 < chunks);
      if (i + 1 < chunks) multiply(1, i + 2 < chunks);
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
  }

  if (p.b_is_ready) wait_for_predecessor();
  cluster_arrive();
  cluster_wait();
  // This block's share of the rows.
  constexpr int kVectors = kColumns / 4;
  const int share = kRows / parts;
  const uint32_t sums = ring + s.stages * T::kStageBytes;
  for (int i = threadIdx.x; i < share * kVectors; i += kThreads) {
    const int r = rank * share + i / kVectors;
    const int c = i % kVectors * 4;
    Four v[1] = {};
    for (int part = 0; part < parts; ++part) {
      const float4 other = load_remote(sums + (r * T::kPitch + c) * static_cast<int>(sizeof(float)), part);
      v[0].data[0] += other.x;
      v[0].data[1] += other.y;
      v[0].data[2] += other.z;
      v[0].data[3] += other.w;
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
