// The 16-bit matrix product of launch.h on wgmma (sm_90a), for products that fill the device.
//
//   block:      128 x kColumns of the output at a time, going from tile to tile (persistent)
//   producer:   one thread; rows of a and b, 64 numbers of k a stage, by TMA into a ring. In a cluster of two, whose
//               blocks have the same columns and neighbouring rows, each loads half of b for both
//   consumers:  two warpgroups of 64 rows each, both operands from shared memory, one wgmma group in flight
//
// On its way out a warpgroup's share passes through shared memory, 64 columns at a time, and leaves by TMA while the next
// ones are activated. The warpgroups are not held together: the one that is done with its mainloop first activates while
// the other multiplies.
#include <algorithm>

#include "../common/launch.h"
#include "../common/wgmma_shared.cuh"
#include "../ffn/gelu.cuh"
#include "boxes.cuh"
#include "kernels.h"
#include "pack.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kGroups = 2;  // consumer warpgroups
constexpr int kRows = 64 * kGroups;
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kBoxBytes = 64 * kBoxRowBytes;  // of a warpgroup's rows on their way out
constexpr int kBoxes = 2;                     // one is filled while the other leaves
constexpr int kStoreBytes = kGroups * kBoxes * kBoxBytes;

template <int kColumns>
struct Traits {
  static constexpr int kABytes = kRows * kBoxRowBytes;
  static constexpr int kBBytes = kColumns * kBoxRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static_assert(kColumns % kBoxColumns == 0 && kBBytes / 2 % 1024 == 0, "halves of b stay aligned for the swizzle");
};

struct Tile {
  int row, column;
};

// Tiles in bands of rows; within a band, down the rows first. Rows are counted in clusters.
template <int kColumns>
__device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n, int band, int cluster, int rank) {
  const int first = index / (band * tiles_n) * band;
  const int height = min(band, tiles_m - first);
  const int r = index - first * tiles_n;
  const int column = r / height;
  return {((first + r - column * height) * cluster + rank) * kRows, column * kColumns};
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    half_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                     const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap output_map, const __grid_constant__ CUtensorMap product_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using Sizes = Traits<kColumns>;
  extern __shared__ unsigned char dynamic[];
  const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024 bytes
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages];
  const uint32_t full_at = shared_address(full), empty_at = shared_address(empty);

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int rank = s.cluster == 1 ? 0 : static_cast<int>(cluster_rank());
  const int tiles_m = (p.m + kRows * s.cluster - 1) / (kRows * s.cluster);
  const int tiles_n = (p.n + kColumns - 1) / kColumns;
  const int tiles = tiles_m * tiles_n;
  const int first_tile = blockIdx.x / s.cluster, tile_step = gridDim.x / s.cluster;
  const int chunks = (p.k + kBoxColumns - 1) / kBoxColumns;

  if (threadIdx.x == kConsumers) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    prefetch_map(&output_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers / 32 * s.cluster);
    }
    mbarrier_init_fence();
  }
  if (s.cluster > 1) {  // before anything of the other block arrives here
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    if (warp == kConsumers / 32) {
      if (lane == 0) {
        const auto load_b = [&](int chunk, int stage, int column) {
          const uint32_t to = ring + stage * Sizes::kStageBytes + Sizes::kABytes;
          if (s.cluster == 1) {
            load_box(to, &b_map, chunk * kBoxColumns, column, full_at + 8 * stage);
          } else {
            load_box(to + rank * (Sizes::kBBytes / 2), &b_map, chunk * kBoxColumns, column + rank * (kColumns / 2),
                     full_at + 8 * stage, uint16_t{3});
          }
        };
        // What does not depend on the kernel before this one, while that one drains.
        const int early = p.b_is_ready && first_tile < tiles ? min(chunks, s.stages) : 0;
        for (int i = 0; i < early; ++i) {
          mbarrier_arrive_expect(&full[i], Sizes::kStageBytes);
          load_b(i, i, tile_at<kColumns>(first_tile, tiles_m, tiles_n, s.band, s.cluster, rank).column);
        }
        wait_for_predecessor();
        int stage = 0;
        uint32_t parity = 1;
        for (int t = first_tile; t < tiles; t += tile_step) {
          const Tile tile = tile_at<kColumns>(t, tiles_m, tiles_n, s.band, s.cluster, rank);
          for (int chunk = 0; chunk < chunks; ++chunk) {
            if (t != first_tile || chunk >= early) {
              mbarrier_wait(empty_at + 8 * stage, parity);
              mbarrier_arrive_expect(&full[stage], Sizes::kStageBytes);
              load_b(chunk, stage, tile.column);
            }
            load_box(ring + stage * Sizes::kStageBytes, &a_map, chunk * kBoxColumns, tile.row, full_at + 8 * stage);
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
    using Mma = WgmmaShared<kMmaKind<T>, kColumns, false>;
    const int group = warp / 4;
    const bool leader = threadIdx.x % 128 == 0;
    const uint32_t empty_of = map_shared(empty_at, lane < s.cluster ? lane : 0);
    const uint32_t boxes = ring + s.stages * Sizes::kStageBytes + group * (kBoxes * kBoxBytes);
    // This lane's row and 16-byte half of a warp's 16 x 16 piece; the next piece is an exclusive or away.
    const uint32_t piece = (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
    float d[kColumns / 2];
    int stage = 0, box = 0;
    uint32_t parity = 0;

    const auto multiply = [&](bool accumulate) {
      mbarrier_wait(full_at + 8 * stage, parity);
      const uint32_t at = ring + stage * Sizes::kStageBytes;
      const uint64_t a = wgmma_descriptor(at + group * (64 * kBoxRowBytes));
      const uint64_t b = wgmma_descriptor(at + Sizes::kABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Mma::run(d, a + 2 * k, b + 2 * k, accumulate || k > 0);
      wgmma_commit();
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    const auto release = [&](int done) {
      if (lane < s.cluster) mbarrier_arrive_cluster(empty_of + 8 * done);
      __syncwarp();
    };
    // 64 columns of this warpgroup's rows.
    const auto put = [&](const float (&x)[32], const CUtensorMap* map, int column, int row) {
      if (leader) store_wait_read<kBoxes - 1>();
      named_barrier(1 + group, 128);
      const uint32_t to = boxes + box * kBoxBytes + piece;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = pack<T>(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
        store_matrix(to ^ (i << 5), packed);
      }
      fence_async_shared();
      named_barrier(1 + group, 128);
      if (leader) {
        store_box(map, column, row, boxes + box * kBoxBytes);
        store_commit();
      }
      box ^= 1;
    };

    for (int t = first_tile; t < tiles; t += tile_step) {
      const Tile tile = tile_at<kColumns>(t, tiles_m, tiles_n, s.band, s.cluster, rank);
      int done = stage;
      multiply(false);
      for (int chunk = 1; chunk < chunks; ++chunk) {
        const int next = stage;
        multiply(true);
        wgmma_wait<1>();
        release(done);
        done = next;
      }
      wgmma_wait<0>();
      release(done);

      // A loop, although the registers have to be named one by one: unrolled, the code does not fit the instruction
      // cache.
      const int group_row = tile.row + group * 64;
      const int row = group_row + warp % 4 * 16 + lane / 4;
      const int valid = min(kColumns, p.n - tile.column);
      uint32_t other[16];  // residuals, or what was before the activation, of the chunk that comes next
      const auto load_other = [&](int column) {
        const T* from = static_cast<const T*>(p.residual) + row * p.residual_stride + column;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const bool there = column + i / 2 * 8 < p.n && row + i % 2 * 8 < p.m;
          other[i] = there ? __ldg(reinterpret_cast<const uint32_t*>(from + i % 2 * 8 * p.residual_stride + i / 2 * 8))
                           : 0;
        }
      };
      const int lane_column = tile.column + lane % 4 * 2;
      if (p.residual != nullptr) load_other(lane_column);
#pragma unroll 1
      for (int q = 0; q * kBoxColumns < valid; ++q) {
        const int column = lane_column + q * kBoxColumns;
        float2 bias[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          bias[i] = p.bias != nullptr && column + 8 * i < p.n
                        ? unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + column + 8 * i)))
                        : float2{};
        }
        float x[32];
#pragma unroll
        for (int c = 0; c < kColumns / kBoxColumns; ++c) {
          if (c != q) continue;
#pragma unroll
          for (int i = 0; i < 32; ++i) x[i] = d[32 * c + i] + (i % 2 == 0 ? bias[i / 4].x : bias[i / 4].y);
        }
        const int first_column = tile.column + q * kBoxColumns;
        if (p.product != nullptr) put(x, &product_map, first_column, group_row);
        if (p.activate) ffn_activate<true>(x, p.activation);
        if (p.residual != nullptr) {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const float2 r = unpack<T>(other[i]);
            x[2 * i] += r.x;
            x[2 * i + 1] += r.y;
          }
          load_other(column + kBoxColumns);
        }
        put(x, &output_map, first_column, group_row);
      }
    }
    if (leader) store_wait_all();
  }
  if (s.cluster > 1) {  // nobody leaves while the other block still sends something here
    cluster_arrive();
    cluster_wait();
  }
#endif
}

template <typename T, int kColumns>
cudaError_t launch_tile(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  CUtensorMap a, b, output, product;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kRows, a)) return error;
  if (const auto error = box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kColumns / s.cluster, b)) return error;
  if (const auto error = box_map(p.dtype, p.output, p.m, p.n, p.n, 64, output)) return error;
  const void* second = p.product != nullptr ? p.product : p.output;
  if (const auto error = box_map(p.dtype, second, p.m, p.n, p.n, 64, product)) return error;
  const size_t shared = 1024 + s.stages * Traits<kColumns>::kStageBytes + kStoreBytes;
  return launch(half_gemm_kernel<T, kColumns>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads), shared, s.cluster,
                facts, stream, p, s, a, b, output, product);
}

template <typename T>
cudaError_t launch_columns(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  switch (s.columns) {
    case 128:
      return launch_tile<T, 128>(p, s, facts, stream);
    case 192:
      return launch_tile<T, 192>(p, s, facts, stream);
    case 256:
      return launch_tile<T, 256>(p, s, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_half_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.dtype == DType::kFloat16 ? launch_columns<__half>(p, s, facts, stream)
                                    : launch_columns<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
