// The 16-bit matrix product of launch.h on wgmma (sm_90a), for products that fill the device.
//
//   block:      128 x 256 (192) of the output at a time, going from tile to tile (persistent)
//   loader:     one thread; rows of a and b, 64 numbers of k a stage, by TMA into a ring
//   consumers:  two warpgroups, 64 rows of a tile each; both operands from shared memory, one group of wgmma in flight.
//               What they have in the end goes, with the bias and rounded, to shared memory, and on to the next tile
//   way out:    warps of their own; a box of 64 x 64 each from there, through the activation, to memory (half_out.cuh)
//
// An activation of 16-bit numbers costs about as many instructions as the tensor cores need cycles for k = 512, so it
// runs beside them. Sums can change hands rounded: PyTorch rounds there as well. Measured on an H200 in microseconds,
// both products with erf-GELU against eager PyTorch: 8192 x 512 -> 2048 68 (80), 768 -> 3072 134 (148), 1024 -> 4096
// 229 (251), 2048 x 4096 -> 11008 554 (557). With ReLU 59, 126, 222 and 550: the activation is not all hidden.
//
// What was tried: two warpgroups that take turns with tiles of 128 x 128 (68, 139, 235, 547, and no backward; wgmma and
// copies together ask more of shared memory than it has); loading by one of the way out's warps in between (each of its
// stops is one for the tensor cores); clusters of two that load b for each other (70, 144, 240); places for both halves
// of a tile and one stage less (71, 141, 247); a warp that takes a whole box at once (76, 147, 245).
//
// kGradient: b lies with n side by side in memory, and the way out is that of the activation's gradient.
#include <algorithm>
#include <type_traits>

#include "../common/launch.h"
#include "boxes.cuh"
#include "half_out.cuh"
#include "kernels.h"
#include "wgmma_wide.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kRows = 128;
// Tiles of 256 columns are two instructions wide, so that 512 threads have the registers for them (one instruction of
// 256 columns is not to be had with more than 384): a warpgroup for the way out, one that loads. Tiles of 192 columns
// are one instruction wide, and three warps of a third warpgroup are the way out, its fourth one loads.
template <int kColumns>
constexpr bool kFourGroups = kColumns == 256;
template <int kColumns>
constexpr int kThreads = kFourGroups<kColumns> ? 512 : 384;
constexpr int kABytes = kRows * kBoxRowBytes;

template <int kColumns>
constexpr int kStageBytes = kABytes + kColumns * kBoxRowBytes;

#ifdef STYLEFORGE_HAS_WGMMA

constexpr int kWayOut = 256;  // its first thread
constexpr int kMostSlots = 8;

struct Tile {
  int row, column;
  bool narrow = false;
};

// Tiles of `height` rows (a cluster's) in bands of rows; within a band, down the rows first.
__device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n, int band, int height, int width) {
  const int first = index / (band * tiles_n) * band;
  const int rows = min(band, tiles_m - first);
  const int r = index - first * tiles_n;
  const int column = r / rows;
  return {(first + r - column * rows) * height, column * width};
}

// To the same place in all blocks of the cluster that `blocks` has a bit for, counted by each one's own barrier.
__device__ __forceinline__ void load_box_for(uint16_t blocks, uint32_t to, const CUtensorMap* map, int column, int row,
                                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void arrive_in(uint32_t block, uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_shared(barrier, block)) : "memory");
}

// The sums are where the compiler thinks they are only once wgmma has been waited for.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#endif  // STYLEFORGE_HAS_WGMMA

template <typename T, int kColumns, bool kGradient>
__global__ void __launch_bounds__(kThreads<kColumns>, 1)
    half_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                     const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap narrow_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  constexpr int kStage = kStageBytes<kColumns>;
  constexpr int kBoxes = kColumns / kBoxColumns;
  constexpr bool kFour = kFourGroups<kColumns>;
  constexpr int kLinesWarps = kFour ? 4 : 3;
  extern __shared__ unsigned char dynamic[];
  const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024 bytes
  const uint32_t slots = ring + s.stages * kStage;
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages], filled[kMostSlots], taken[kMostSlots];
  const uint32_t full_at = shared_address(full), empty_at = shared_address(empty);
  const uint32_t filled_at = shared_address(filled), taken_at = shared_address(taken);

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int rank = s.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int tiles_m = (p.m + kRows * s.cluster - 1) / (kRows * s.cluster);
  const int tiles_n = (p.n + kColumns - 1) / kColumns;
  const int wide_tiles = tiles_m * tiles_n - s.narrow;
  const int tiles = wide_tiles + s.narrow * kBoxes;
  const int first_tile = static_cast<int>(blockIdx.x) / s.cluster;
  const int step = static_cast<int>(gridDim.x) / s.cluster;
  const int chunks = (p.k + kBoxColumns - 1) / kBoxColumns;
  const auto tile_of = [&](int t) {
    const bool narrow = t >= wide_tiles;
    const int whole = narrow ? wide_tiles + (t - wide_tiles) / kBoxes : t;
    Tile tile = tile_at(whole, tiles_m, tiles_n, s.band, kRows * s.cluster, kColumns);
    tile.row += rank * kRows;
    if (narrow) tile.column += (t - wide_tiles) % kBoxes * kBoxColumns;
    tile.narrow = narrow;
    return tile;
  };

  if (threadIdx.x == kWayOut) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    if (s.narrow > 0) prefetch_map(&narrow_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 8 * s.cluster);  // the consumers' warps
    }
    for (int i = 0; i < kMostSlots; ++i) {
      mbarrier_init(&filled[i], 128);
      mbarrier_init(&taken[i], 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (s.cluster > 1) {
    cluster_arrive();
    cluster_wait();
  }

  const auto load_stages = [&] {
    constexpr int kParts = kGradient ? kBoxes : 2;
    constexpr int kPartBytes = kColumns * kBoxRowBytes / kParts;
    const auto load_b = [&](int chunk, int stage, const Tile& tile) {
      const uint32_t to = ring + stage * kStage + kABytes, barrier = full_at + 8 * stage;
      const int k = chunk * kBoxColumns;
      mbarrier_arrive_expect(&full[stage], tile.narrow ? kABytes + kBoxBytes : kStage);
      if (!kGradient && tile.narrow) load_box(to, &narrow_map, k, tile.column, barrier);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (tile.narrow && (!kGradient || i > 0)) continue;
        const int x = kGradient ? tile.column + i * kBoxColumns : k;
        const int y = kGradient ? k : tile.column + i * (kColumns / kParts);
        if (s.cluster == 1) {
          load_box(to + i * kPartBytes, &b_map, x, y, barrier);
        } else if (i * 2 / kParts == rank) {
          load_box_for(3, to + i * kPartBytes, &b_map, x, y, barrier);
        }
      }
    };
    // What does not depend on the kernel before this one, while that one drains.
    const int early = p.b_is_ready ? min(chunks, s.stages) : 0;
    for (int i = 0; i < early; ++i) load_b(i, i, tile_of(first_tile));
    wait_for_predecessor();
    int stage = 0;
    uint32_t parity = 1;
    for (int t = first_tile; t < tiles; t += step) {
      const Tile tile = tile_of(t);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (t != first_tile || chunk >= early) {
          mbarrier_wait(empty_at + 8 * stage, parity);
          load_b(chunk, stage, tile);
        }
        load_box(ring + stage * kStage, &a_map, chunk * kBoxColumns, tile.row, full_at + 8 * stage);
        if (++stage == s.stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    release_successor();
  };
  const auto send_lines = [&](int lines_warp) {
    wait_for_predecessor();
    const LinesOut<T> out(p, s.vectors, lane);
    // Boxes in the order in which they are filled, by turns; what a quarter of one needs of global memory is loaded
    // while the one before it is on its way.
    struct Box {
      int row, column, barrier;
      uint32_t address;
      uint32_t parity;
    };
    const int turns = tiles > first_tile ? (tiles - first_tile - 1) / step + 1 : 0;
    const int wide_turns = wide_tiles > first_tile ? (wide_tiles - first_tile - 1) / step + 1 : 0;
    const auto box_at = [&](int index) {
      int turn = index / (2 * kBoxes), half = index / kBoxes % 2, box = index % kBoxes;
      if (turn >= wide_turns) {  // a narrow tile is one box wide
        const int after = index - wide_turns * 2 * kBoxes;
        turn = wide_turns + after / 2;
        half = after % 2;
        box = 0;
      }
      const Tile tile = tile_of(first_tile + turn * step);
      return Box{tile.row + half * 64, tile.column + box * kBoxColumns, half * kBoxes + box,
                 slots + ((s.halves == 2 ? half * kBoxes : 0) + box) * kBoxBytes, static_cast<uint32_t>(turn & 1)};
    };
    const int count = wide_turns * 2 * kBoxes + (turns - wide_turns) * 2;
    Box next = box_at(lines_warp);
    uint4 other[kLines] = {};
    if (p.residual != nullptr && lines_warp < count) out.load(other, next.row, next.column);
#pragma unroll 1
    for (int index = lines_warp; index < count; index += kLinesWarps) {
      const Box box = next;
      float sums[8] = {};
      mbarrier_wait(filled_at + 8 * box.barrier, box.parity);
#pragma unroll 1
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        uint4 v[kLines], ahead[kLines] = {};
        out.take(v, box.address, quarter);
        if (quarter == kQuarters - 1) {
          mbarrier_arrive(taken_at + 8 * box.barrier);
          next = box_at(index + kLinesWarps);
        }
        if (p.residual != nullptr && (quarter < kQuarters - 1 || index + kLinesWarps < count)) {
          const bool same = quarter < kQuarters - 1;
          out.load(ahead, same ? box.row + 16 * (quarter + 1) : next.row, next.column);
        }
        if constexpr (kGradient) {
          out.gradient(v, other, sums, box.row + 16 * quarter, box.column);
        } else {
          out.forward(v, other, box.row + 16 * quarter, box.column);
        }
#pragma unroll
        for (int i = 0; i < kLines; ++i) other[i] = ahead[i];
      }
      if (kGradient && p.column_sums != nullptr) out.sum_out(sums, box.row, box.column);
    }
  };

  // Each warpgroup has its own number of registers.
  if (warp < kWayOut / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kFour ? 176 : 184));
    wait_for_predecessor();
    constexpr int kInstructions = kFour ? 2 : 1, kWidth = kColumns / kInstructions;
    using Mma = WgmmaWide<kMmaKind<T>, kWidth, kGradient>;
    const int group = warp / 4;
    const uint32_t group_a = group * 64 * kBoxRowBytes;
    // This lane's row and 16-byte half of a warp's 16 x 16 piece; the next piece is an exclusive or away.
    const uint32_t piece = (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
    float d[kInstructions][kWidth / 2];
    int stage = 0;
    uint32_t parity = 0;

    const auto multiply = [&](bool accumulate, auto narrow) {
      mbarrier_wait(full_at + 8 * stage, parity);
      constexpr int kNext = kGradient ? 128 : 2;  // 16 of k further on in b
      const uint32_t at = ring + stage * kStage;
      const uint64_t a = wgmma_descriptor(at + group_a);
      const uint64_t b = kGradient ? wgmma_transposed_descriptor(at + kABytes) : wgmma_descriptor(at + kABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (narrow.value) {
          auto& first = reinterpret_cast<float (&)[kBoxColumns / 2]>(d);
          WgmmaWide<kMmaKind<T>, kBoxColumns, kGradient>::run(first, a + 2 * k, b + kNext * k, accumulate || k > 0);
        } else {
#pragma unroll
          for (int i = 0; i < kInstructions; ++i) {
            Mma::run(d[i], a + 2 * k, b + i * (kWidth * kBoxRowBytes >> 4) + kNext * k, accumulate || k > 0);
          }
        }
      }
      wgmma_commit();
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    const auto release = [&](int done) {
      if (s.cluster == 1) {
        if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
      } else if (lane < s.cluster) {
        arrive_in(lane, empty_at + 8 * done);
      }
      __syncwarp();
    };

    uint32_t turn = 0;
    for (int t = first_tile; t < tiles; t += step) {
      const Tile tile = tile_of(t);
      const int column = tile.column + lane % 4 * 2;
      int done = stage;
      const auto multiply_all = [&](auto narrow) {
        multiply(false, narrow);
        for (int chunk = 1; chunk < chunks; ++chunk) {
          const int next = stage;
          multiply(true, narrow);
          wgmma_wait<1>();
          release(done);
          done = next;
        }
      };
      if (tile.narrow) {
        multiply_all(std::true_type{});
      } else {
        multiply_all(std::false_type{});
      }
      uint32_t bias[kBoxes][8];
#pragma unroll
      for (int i = 0; i < kBoxes * 8; ++i) {
        const int at = column + 8 * i;
        const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + at);
        bias[i / 8][i % 8] = p.bias != nullptr && at < p.n ? __ldg(from) : 0;
      }
      wgmma_wait<0>();
      release(done);
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) hold(d[i]);
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        if (box > 0 && tile.narrow) continue;
        uint32_t pairs[16];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 b = unpack<T>(bias[box][i]);
          const float* x = d[box * 64 / kWidth] + (box * 64 % kWidth / 2 + 4 * i);
          pairs[2 * i] = pack<T>(x[0] + b.x, x[1] + b.y);
          pairs[2 * i + 1] = pack<T>(x[2] + b.x, x[3] + b.y);
        }
        // Where both warpgroups share a place: the upper rows come first, then this tile's lower ones.
        const bool shared_place = s.halves == 1;
        const int before = shared_place ? group ^ 1 : group;
        mbarrier_wait(taken_at + 8 * (before * kBoxes + box), shared_place && group == 1 ? turn : turn ^ 1);
        const uint32_t to = slots + ((shared_place ? 0 : group * kBoxes) + box) * kBoxBytes + piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t four[4] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
          store_matrix(to ^ (i << 5), four);
        }
        mbarrier_arrive(filled_at + 8 * (group * kBoxes + box));
      }
      turn ^= 1;
    }
  } else if (!kFour || warp < kWayOut / 32 + 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFour ? 120 : 136));
    if (warp - kWayOut / 32 < kLinesWarps) {
      send_lines(warp - kWayOut / 32);
    } else {
      if (lane == 0) load_stages();
      __syncwarp();
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    if (warp == kWayOut / 32 + 4) {
      if (lane == 0) load_stages();
      __syncwarp();
    }
  }
  if (s.cluster > 1) {  // nobody leaves while the other one still loads for it
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
#endif
}

template <typename T, int kColumns, bool kGradient>
cudaError_t launch_kernel(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  CUtensorMap a, b, narrow;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kRows, a)) return error;
  const auto b_error = kGradient ? box_map(p.dtype, p.b, p.k, p.n, p.b_stride[1], kBoxColumns, b)
                                 : box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kColumns / 2, b);
  if (b_error != cudaSuccess) return b_error;
  narrow = b;
  if (s.narrow > 0 && !kGradient) {
    if (const auto error = box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kBoxColumns, narrow)) return error;
  }
  const size_t shared = 1024 + s.stages * kStageBytes<kColumns> + s.halves * (kColumns / kBoxColumns) * kBoxBytes;
  return launch(half_gemm_kernel<T, kColumns, kGradient>, dim3(static_cast<unsigned>(s.blocks)),
                dim3(kThreads<kColumns>), shared, s.cluster, facts, stream, p, s, a, b, narrow);
}

template <typename T>
cudaError_t launch_dtype(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  if (p.gradient) return launch_kernel<T, 256, true>(p, s, facts, stream);
  return s.columns == 192 ? launch_kernel<T, 192, false>(p, s, facts, stream)
                          : launch_kernel<T, 256, false>(p, s, facts, stream);
}

}  // namespace

cudaError_t launch_half_gemm_sm90(const GemmParams& p, const GemmSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
