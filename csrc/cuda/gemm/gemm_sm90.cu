// The matrix product of launch.h on wgmma (sm_90a), for products that fill the device.
//
//   block:      128 x kColumns of the output at a time, going from tile to tile (persistent)
//   producer:   one thread; a's rows as they are and the two prepared parts of b, 32 numbers of k a stage, by TMA into
//               a ring. Loads shared in clusters of two were slower: 235 against 410 TFLOP/s, 8192 x 1024 x 4096
//   consumers:  two warpgroups of 64 rows each. a's fragments by ldmatrix, split in registers while the chunk before
//               is multiplied; b from shared memory
//
// kSplit, float32 accuracy from TF32 units (3xTF32): a = hi + lo, b = hi + lo, both split to nearest; lo * hi, hi * lo,
// then hi * hi. The units truncate when they add, so the sum of every 32 numbers moves on to float32 registers. One
// warpgroup multiplies while the other adds.
#include <algorithm>

#include "../common/cluster.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kGroups = 2;  // consumer warpgroups
constexpr int kRows = 64 * kGroups;
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;
// A warp's 16 rows on their way out, 32 columns at a time, padded: writes of fragments fall into different banks.
constexpr int kStorePitch = 32 + 8;
constexpr int kStoreBytes = kConsumers / 32 * 16 * kStorePitch * static_cast<int>(sizeof(float));

template <int kColumns, bool kSplit>
struct Traits {
  static constexpr int kABytes = kRows * kChunkBytes;
  static constexpr int kBBytes = kColumns * kChunkBytes;
  static constexpr int kStageBytes = kABytes + kBBytes * (kSplit ? 2 : 1);
  static_assert(kColumns % 32 == 0 && kStageBytes % 1024 == 0, "stages stay aligned for the swizzle");
};

struct Tile {
  int row, column;
};

// Tiles in bands of rows; within a band, down the rows first.
template <int kColumns>
__device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n, int band) {
  const int first = index / (band * tiles_n) * band;
  const int height = min(band, tiles_m - first);
  const int r = index - first * tiles_n;
  const int column = r / height;
  return {(first + r - column * height) * kRows, column * kColumns};
}

template <int kColumns, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                const __grid_constant__ CUtensorMap b_lo_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = Traits<kColumns, kSplit>;
  extern __shared__ unsigned char dynamic[];
  // Swizzled tiles start at multiples of 1024 bytes.
  unsigned char* base = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t ring = shared_address(base);
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tiles_m = (p.m + kRows - 1) / kRows;
  const int tiles_n = (p.n + kColumns - 1) / kColumns;
  const int tiles = tiles_m * tiles_n;
  const int chunks = (p.k + kChunk - 1) / kChunk;

  if (threadIdx.x == kConsumers) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    if constexpr (kSplit) prefetch_map(&b_lo_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  if (warp >= kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    if (warp == kConsumers / 32) {
      if (lane == 0) {
        int stage = 0;
        uint32_t parity = 1;
        for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
          const Tile tile = tile_at<kColumns>(t, tiles_m, tiles_n, s.band);
          for (int chunk = 0; chunk < chunks; ++chunk) {
            mbarrier_wait(&empty[stage], parity);
            mbarrier_arrive_expect(&full[stage], T::kStageBytes);
            const uint32_t to = ring + stage * T::kStageBytes;
            const int k = chunk * kChunk;
            load_box(to, &a_map, k, tile.row, &full[stage]);
            load_box(to + T::kABytes, &b_map, k, tile.column, &full[stage]);
            if constexpr (kSplit) load_box(to + T::kABytes + T::kBBytes, &b_lo_map, k, tile.column, &full[stage]);
            if (++stage == s.stages) {
              stage = 0;
              parity ^= 1;
            }
          }
        }
      }
      __syncwarp();
    }
    release_successor();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(232));
    const int row_in_tile = warp * 16 + lane % 16;
    const uint32_t full_at = shared_address(full), empty_at = shared_address(empty);
    float* own = reinterpret_cast<float*>(base + s.stages * T::kStageBytes) + warp * 16 * kStorePitch;
    using Mma = Wgmma<MmaKind::kTF32, kColumns>;
    float d[kColumns / 2], total[kColumns / 2];
    Fragments fragments[2];
    int stage = 0;  // of the chunk whose fragments are loaded next
    uint32_t parity = 0;

    const auto load_next = [&](Fragments& f) {
      mbarrier_wait(full_at + 8 * stage, parity);
      load_fragments<kSplit>(f, ring + stage * T::kStageBytes + row_in_tile * kChunkBytes, row_in_tile);
    };
    // Multiplies the chunk whose fragments are in `set`.
    const auto multiply = [&](int set, bool more, bool first) {
      const Fragments& f = fragments[set];
      const uint64_t b = wgmma_descriptor(ring + stage * T::kStageBytes + T::kABytes);
      wgmma_fence();
      if constexpr (kSplit) multiply_small_terms<kColumns>(d, f, b, b + (T::kBBytes >> 4));
#pragma unroll
      for (int k = 0; k < 4; ++k) Mma::run(d, f.hi[k], b + 2 * k, kSplit || !first || k > 0);
      wgmma_commit();
      const int done = stage;
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
      if (more) load_next(fragments[set ^ 1]);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) total[i] += d[i];
      }
    };

    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const Tile tile = tile_at<kColumns>(t, tiles_m, tiles_n, s.band);
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) total[i] = 0;
      }
      load_next(fragments[0]);
      for (int i = 0; i < chunks; i += 2) {
        multiply(0, i + 1 < chunks, i == 0);
        if (i + 1 < chunks) multiply(1, i + 2 < chunks, false);
      }
      if (t + gridDim.x >= tiles) release_successor();

      // By way of shared memory, 32 columns at a time: a warp's 16 rows in lines of 128 bytes.
      if constexpr (!kSplit) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) total[i] = d[i];
      }
      // By way of shared memory, 32 columns at a time: a warp's 16 rows in lines of 128 bytes. A loop, although the
      // registers have to be named one by one: unrolled, the code does not fit the instruction cache.
      const int row = tile.row + warp * 16 + lane / 8;
#pragma unroll 1
      for (int q = 0; q < kColumns / 32; ++q) {
#pragma unroll
        for (int c = 0; c < kColumns / 32; ++c) {
          if (c != q) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int j = 16 * c + 2 * i;
            *reinterpret_cast<float2*>(own + (lane / 4 + 8 * (i % 2)) * kStorePitch + 8 * (i / 2) + 2 * (lane % 4)) =
                make_float2(total[j], total[j + 1]);
          }
        }
        __syncwarp();
        Four v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = *reinterpret_cast<const Four*>(own + (lane / 8 + 4 * i) * kStorePitch + lane % 8 * 4);
        }
        __syncwarp();
        const int column = tile.column + 32 * q + lane % 8 * 4;
        finish(p, v, row, 4, column, min(4, p.n - column), s.vectors);
      }
    }
  }
#endif
}

template <int kColumns, bool kSplit>
cudaError_t launch_tile(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  const int64_t padded = gemm_padded_k(p.k);
  CUtensorMap a, b, b_lo = {};
  if (const auto error = matrix_map(p.a, p.m, p.k, p.a_stride, kRows, a)) return error;
  if (const auto error = matrix_map(p.b_hi, p.n, p.k, padded, kColumns, b)) return error;
  if (kSplit) {
    if (const auto error = matrix_map(p.b_lo, p.n, p.k, padded, kColumns, b_lo)) return error;
  }
  const size_t shared = 1024 + s.stages * Traits<kColumns, kSplit>::kStageBytes + kStoreBytes;
  return launch(gemm_kernel<kColumns, kSplit>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), shared, 1, facts,
                stream, p, s, a, b, b_lo);
}

}  // namespace

cudaError_t launch_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.precision == GemmPrecision::kIeee ? launch_tile<128, true>(p, s, facts, stream)
                                             : launch_tile<128, false>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
