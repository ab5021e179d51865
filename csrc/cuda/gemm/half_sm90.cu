// The 16-bit matrix product of launch.h on wgmma (sm_90a), for products that fill the device.
//
//   block:      128 x 128 of the output at a time, going from tile to tile (persistent)
//   producer:   one thread; rows of a and b, 64 numbers of k a stage, by TMA into a ring
//   consumers:  two warpgroups that take turns, a tile each: one multiplies (both operands from shared memory, one
//   group
//               of wgmma in flight), while the other sends its tile on its way out (half_out.cuh)
//
// What an activation costs is why they take turns: 128 numbers a thread, about twenty instructions each, are as long as
// the tensor cores need for a tile with k = 512. Both warpgroups on one tile of 128 x 256 leave the tensor cores idle
// meanwhile: 77 us for 8192 x 512 -> 2048 with erf-GELU, 63 us with ReLU, against 57 us of cuBLAS for the products
// alone. Such tiles in a cluster of two, each block loading half of b for both, were no faster: the L2 cache keeps up.
//
// kGradient: b lies with n side by side in memory, and the way out is that of the activation's gradient.
#include <algorithm>

#include "../common/launch.h"
#include "../common/wgmma_shared.cuh"
#include "boxes.cuh"
#include "half_out.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kGroups = 2;  // consumer warpgroups
constexpr int kRows = 128, kColumns = 128;
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kABytes = kRows * kBoxRowBytes;
constexpr int kStageBytes = kABytes + kColumns * kBoxRowBytes;

#ifdef STYLEFORGE_HAS_WGMMA
constexpr int kTurn = 1;  // name of the first warpgroup's barrier

struct Tile {
  int row, column;
};

// Tiles in bands of rows; within a band, down the rows first.
__device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n, int band) {
  const int first = index / (band * tiles_n) * band;
  const int height = min(band, tiles_m - first);
  const int r = index - first * tiles_n;
  const int column = r / height;
  return {(first + r - column * height) * kRows, column * kColumns};
}
#endif  // STYLEFORGE_HAS_WGMMA

template <typename T, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1)
    half_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                     const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024 bytes
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages];
  const uint32_t full_at = shared_address(full), empty_at = shared_address(empty);

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int tiles_m = (p.m + kRows - 1) / kRows;
  const int tiles_n = (p.n + kColumns - 1) / kColumns;
  const int tiles = tiles_m * tiles_n;
  const int step = static_cast<int>(gridDim.x);
  const int chunks = (p.k + kBoxColumns - 1) / kBoxColumns;

  if (threadIdx.x == kConsumers) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 4);  // the warps of one warpgroup
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    if (warp == kConsumers / 32) {
      if (lane == 0) {
        const auto load_b = [&](int chunk, int stage, int column) {
          const uint32_t to = ring + stage * kStageBytes + kABytes;
          const int k = chunk * kBoxColumns;
          if constexpr (kGradient) {
            for (int i = 0; i < kColumns / kBoxColumns; ++i) {
              load_box(to + i * kBoxBytes, &b_map, column + i * kBoxColumns, k, full_at + 8 * stage);
            }
          } else {
            load_box(to, &b_map, k, column, full_at + 8 * stage);
          }
        };
        const int first_tile = static_cast<int>(blockIdx.x);
        // What does not depend on the kernel before this one, while that one drains.
        const int early = p.b_is_ready ? min(chunks, s.stages) : 0;
        for (int i = 0; i < early; ++i) {
          mbarrier_arrive_expect(&full[i], kStageBytes);
          load_b(i, i, tile_at(first_tile, tiles_m, tiles_n, s.band).column);
        }
        wait_for_predecessor();
        int stage = 0;
        uint32_t parity = 1;
        for (int t = first_tile; t < tiles; t += step) {
          const Tile tile = tile_at(t, tiles_m, tiles_n, s.band);
          for (int chunk = 0; chunk < chunks; ++chunk) {
            if (t != first_tile || chunk >= early) {
              mbarrier_wait(empty_at + 8 * stage, parity);
              mbarrier_arrive_expect(&full[stage], kStageBytes);
              load_b(chunk, stage, tile.column);
            }
            load_box(ring + stage * kStageBytes, &a_map, chunk * kBoxColumns, tile.row, full_at + 8 * stage);
            if (++stage == s.stages) {
              stage = 0;
              parity ^= 1;
            }
          }
        }
        release_successor();
      }
      __syncwarp();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(232));
    wait_for_predecessor();
    using Mma = WgmmaShared<kMmaKind<T>, kColumns, kGradient>;
    const int group = warp / 4;
    WayOut<T> out(p, ring + s.stages * kStageBytes + warp * kWayOutBytes, warp % 4, lane);
    float d[2][kColumns / 2];  // of the upper 64 rows and of the lower ones
    int stage = 0;
    uint32_t parity = 0;
    const int skip_stages = chunks % s.stages;
    const uint32_t skip_parity = chunks / s.stages & 1;
    const auto skip_tile = [&] {
      stage += skip_stages;
      parity ^= skip_parity;
      if (stage >= s.stages) {
        stage -= s.stages;
        parity ^= 1;
      }
    };

    const auto multiply = [&](bool accumulate) {
      mbarrier_wait(full_at + 8 * stage, parity);
      const uint32_t at = ring + stage * kStageBytes;
      constexpr int kNext = kGradient ? 128 : 2;      // 16 of k further on in b
      constexpr int kLower = 64 * kBoxRowBytes >> 4;  // 64 rows further down in a
      const uint64_t a = wgmma_descriptor(at);
      const uint64_t b = kGradient ? wgmma_transposed_descriptor(at + kABytes) : wgmma_descriptor(at + kABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Mma::run(d[0], a + 2 * k, b + kNext * k, accumulate || k > 0);
        Mma::run(d[1], a + kLower + 2 * k, b + kNext * k, accumulate || k > 0);
      }
      wgmma_commit();
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    const auto release = [&](int done) {
      if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
      __syncwarp();
    };

    // Tiles of this block by turns; the other warpgroup's stages are passed over.
    int t = static_cast<int>(blockIdx.x) + group * step;
    if (group == 1) {
      named_arrive(kTurn, kConsumers);
      skip_tile();
    }
    for (; t < tiles; t += kGroups * step) {
      const Tile tile = tile_at(t, tiles_m, tiles_n, s.band);
      named_barrier(kTurn + group, kConsumers);
      int done = stage;
      multiply(false);
      for (int chunk = 1; chunk < chunks; ++chunk) {
        const int next = stage;
        multiply(true);
        wgmma_wait<1>();
        release(done);
        done = next;
      }
      if (t + step < tiles) named_arrive(kTurn + (group ^ 1), kConsumers);
      out.begin(tile.row, tile.column);
      wgmma_wait<0>();
      release(done);
      skip_tile();
      if constexpr (kGradient) {
        out.gradient(d);
      } else {
        out.forward(d);
      }
    }
  }
#endif
}

template <typename T, bool kGradient>
cudaError_t launch_kernel(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  CUtensorMap a, b;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kRows, a)) return error;
  const auto b_error = kGradient ? box_map(p.dtype, p.b, p.k, p.n, p.b_stride[1], kBoxColumns, b)
                                 : box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kColumns, b);
  if (b_error != cudaSuccess) return b_error;
  const size_t shared = 1024 + s.stages * kStageBytes + kConsumers / 32 * kWayOutBytes;
  return launch(half_gemm_kernel<T, kGradient>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), shared, 1, facts,
                stream, p, s, a, b);
}

template <typename T>
cudaError_t launch_dtype(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  return p.gradient ? launch_kernel<T, true>(p, s, facts, stream) : launch_kernel<T, false>(p, s, facts, stream);
}

}  // namespace

cudaError_t launch_half_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
