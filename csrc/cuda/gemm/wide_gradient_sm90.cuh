// The product of a feed-forward network's backward on wgmma (sm_90a), 16-bit: the gradient of the activation's result,
// a b^T with b's n side by side in memory, and on its way out the activation's gradient (GemmParams::gradient).
//
// As wide_sm90.cuh, from which it differs where the way out is what takes longest: a box needs another operand, from
// global memory, and twice the instructions, so its registers do not hold all of a box. A tile's sums go out when all
// of them are there, the upper rows' boxes first: while the lower rows wait for their places, the upper ones' warpgroup
// is at the next tile already. With halves of columns one after the other, as there, both wait: 72, 112 and 166 us for
// 65, 107 and 152 (8192 x 512 -> 2048, 768 -> 3072, 1024 -> 4096). With all of a box in registers and the other operand
// two rows at a time: 86, 135, 189. That operand fetched to the L2 cache by the copy engine beforehand: no difference.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/launch.h"
#include "boxes.cuh"
#include "kernels.h"
#include "wgmma_wide.cuh"
#include "wide_out.cuh"
#include "wide_tiles.cuh"

namespace styleforge::cuda {

// How a block is made up.
struct WideGradient {
  static constexpr int kColumns = 256;  // of a tile, two instructions
  static constexpr int kWayOut = 256;   // its first thread
  static constexpr int kLinesWarps = 4;
  static constexpr int kLoader = kWayOut / 32 + kLinesWarps;
  static constexpr int kThreads = 512;
  static constexpr int kInstructions = 2;
  // Registers: all together no more than the threads have at the launch, 65536.
  static constexpr int kConsumerRegisters = 176, kLinesRegisters = 120, kLoaderRegisters = 40;

  static constexpr int kStageBytes = kWideABytes + kColumns * kBoxRowBytes;
  static constexpr int kBoxes = kColumns / kBoxColumns;  // of a tile's 64 rows
  static constexpr int kNarrowBoxes = 1;
  static constexpr int kPlaces = kBoxes;
  // Boxes of narrow tiles lie in other places than the same boxes of a wide one, so that nothing would order the uses
  // of one barrier by both, and a wait that comes a phase late waits forever: they have barriers of their own, after
  // the others.
  static constexpr int kBarriers = 4 * kBoxes;
};

template <typename T>
__global__ void __launch_bounds__(WideGradient::kThreads, 1)
    wide_gradient_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                         const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using W = WideGradient;
  static_assert(sizeof(T) == 2);
  constexpr int kColumns = W::kColumns, kStage = W::kStageBytes, kBoxes = W::kBoxes, kWidth = kBoxColumns;
  extern __shared__ unsigned char dynamic[];
  const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024 bytes
  const uint32_t places = ring + s.stages * kStage;
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages], filled[W::kBarriers], taken[W::kBarriers];
  const uint32_t full_at = shared_address(full), empty_at = shared_address(empty);
  const uint32_t filled_at = shared_address(filled), taken_at = shared_address(taken);

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int tiles_m = (p.m + kWideRows - 1) / kWideRows;
  const int tiles_n = (p.n + kColumns - 1) / kColumns;
  const int wide_tiles = tiles_m * tiles_n - s.narrow;
  constexpr int kPieces = kColumns / kNarrowColumns;  // of a tile that is cut up
  const int tiles = wide_tiles + s.narrow * kPieces;
  const int first_tile = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const int chunks = (p.k + kWidth - 1) / kWidth;
  // Boxes take turns in their places: the upper half of a tile's rows first, then the lower one.
  const auto place_of = [&](int half, int box, bool narrow) {
    return narrow ? half * W::kNarrowBoxes + box : (half * kBoxes + box) % W::kPlaces;
  };
  const auto barrier_of = [](int half, int box, bool narrow) {
    return half * kBoxes + box + (narrow ? 2 * kBoxes : 0);
  };
  const auto tile_of = [&](int t) {
    const bool narrow = t >= wide_tiles;
    const int whole = narrow ? wide_tiles + (t - wide_tiles) / kPieces : t;
    WideTile tile = wide_tile_at(whole, tiles_m, tiles_n, s.band, kColumns);
    if (narrow) tile.column += (t - wide_tiles) % kPieces * kNarrowColumns;
    tile.narrow = narrow;
    return tile;
  };

  if (threadIdx.x == W::kWayOut) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 8);  // the consumers' warps
    }
    for (int i = 0; i < W::kBarriers; ++i) {
      if (i >= 2 * kBoxes && i % kBoxes >= W::kNarrowBoxes) continue;
      mbarrier_init(&filled[i], 128);
      mbarrier_init(&taken[i], 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const auto load_stages = [&] {
    constexpr int kParts = kColumns / kWidth;
    constexpr int kPartBytes = kColumns * kBoxRowBytes / kParts;
    const auto load_b = [&](int chunk, int stage, const WideTile& tile) {
      const uint32_t to = ring + stage * kStage + kWideABytes, barrier = full_at + 8 * stage;
      const int k = chunk * kWidth;
      mbarrier_arrive_expect(&full[stage], tile.narrow ? kWideABytes + kBoxBytes : kStage);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (tile.narrow && i > 0) continue;
        load_box(to + i * kPartBytes, &b_map, tile.column + i * kWidth, k, barrier);
      }
    };
    load_wide_tiles(p, s, &a_map, ring, kStage, full_at, empty_at, tiles, chunks, kWidth, tile_of, load_b);
  };
  const auto send_lines = [&](int lines_warp) {
    wait_for_predecessor();
    constexpr int kLines = 4;
    using Out = LinesOut<T, kLines>;
    const Out out(p, s.vectors, lane);
    // Boxes in the order in which they are filled, by turns; what a part of one needs of global memory is loaded while
    // the one before it is on its way.
    struct Box {
      int row, column, barrier;
      uint32_t address;
      uint32_t parity;
    };
    const int turns = tiles > first_tile ? (tiles - first_tile - 1) / step + 1 : 0;
    const int wide_turns = wide_tiles > first_tile ? (wide_tiles - first_tile - 1) / step + 1 : 0;
    constexpr int kParts = Out::kParts;
    const auto box_at = [&](int index) {
      int turn = index / (2 * kBoxes), half = index / kBoxes % 2, box = index % kBoxes;
      if (turn >= wide_turns) {
        constexpr int kFew = W::kNarrowBoxes;
        const int after = index - wide_turns * 2 * kBoxes;
        turn = wide_turns + after / (2 * kFew);
        half = after / kFew % 2;
        box = after % kFew;
      }
      const WideTile tile = tile_of(first_tile + turn * step);
      return Box{tile.row + half * 64, tile.column + box * kWidth, barrier_of(half, box, tile.narrow),
                 places + place_of(half, box, tile.narrow) * kBoxBytes,
                 static_cast<uint32_t>(tile.narrow ? 0 : turn & 1)};
    };
    const int count = (wide_turns * kBoxes + (turns - wide_turns) * W::kNarrowBoxes) * 2;
    Box next = box_at(lines_warp);
    uint4 other[kLines] = {};
    if (lines_warp < count) out.load(other, next.row, next.column);
#pragma unroll 1
    for (int index = lines_warp; index < count; index += W::kLinesWarps) {
      const Box box = next;
      float sums[8] = {};
      mbarrier_wait(filled_at + 8 * box.barrier, box.parity);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        uint4 v[kLines], ahead[kLines] = {};
        out.take(v, box.address, part);
        const bool last = part == kParts - 1;
        if (last) {
          mbarrier_arrive(taken_at + 8 * box.barrier);
          next = box_at(index + W::kLinesWarps);
        }
        if (!last || index + W::kLinesWarps < count) {
          out.load(ahead, last ? next.row : box.row + Out::kPartRows * (part + 1), next.column);
        }
        const int row = box.row + Out::kPartRows * part;
        out.gradient(v, other, sums, row, box.column);
#pragma unroll
        for (int i = 0; i < kLines; ++i) other[i] = ahead[i];
      }
      if (p.column_sums != nullptr) out.sum_out(sums, box.row, box.column);
    }
  };

  // Each warpgroup has its own number of registers.
  if (warp < W::kWayOut / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(W::kConsumerRegisters));
    wait_for_predecessor();
    constexpr int kMmaWidth = kColumns / W::kInstructions;
    using Mma = WgmmaWide<kMmaKind<T>, kMmaWidth, true>;
    const int group = warp / 4;
    const uint32_t group_a = group * 64 * kBoxRowBytes;
    // Where this lane writes in a box: its row and 16-byte half of a warp's 16 x 16 piece; the next piece is an
    // exclusive or away.
    const uint32_t piece = (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
    float d[W::kInstructions][kMmaWidth / 2];
    int stage = 0;
    uint32_t parity = 0;

    const auto multiply = [&](bool accumulate, auto narrow) {
      mbarrier_wait(full_at + 8 * stage, parity);
      constexpr int kNext = 128;  // 16 of k further on in b
      const uint32_t at = ring + stage * kStage;
      const uint64_t a = wgmma_descriptor(at + group_a);
      const uint64_t b = wgmma_transposed_descriptor(at + kWideABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (narrow.value) {
          auto& first = reinterpret_cast<float (&)[kNarrowColumns / 2]>(d);
          WgmmaWide<kMmaKind<T>, kNarrowColumns, true>::run(first, a + 2 * k, b + kNext * k, accumulate || k > 0);
        } else {
#pragma unroll
          for (int i = 0; i < W::kInstructions; ++i) {
            Mma::run(d[i], a + 2 * k, b + i * (kMmaWidth * kBoxRowBytes >> 4) + kNext * k, accumulate || k > 0);
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
      if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
      __syncwarp();
    };

    uint32_t turn = 0;
    for (int t = first_tile; t < tiles; t += step) {
      const WideTile tile = tile_of(t);
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
      wgmma_wait<0>();
      release(done);
#pragma unroll
      for (int i = 0; i < W::kInstructions; ++i) hold(d[i]);
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        if (box >= W::kNarrowBoxes && tile.narrow) continue;
        const float* sums = d[box * kWidth / kMmaWidth] + box * kWidth % kMmaWidth / 2;
        const int place = place_of(group, box, tile.narrow);
        // For the last box there, of a wide tile: a block has one narrow tile at most.
        const auto wait_for_place = [&] {
          const int own = group * kBoxes + box;
          const bool earlier = tile.narrow || own < W::kPlaces;  // in the turn before this one
          const int last =
              tile.narrow ? 2 * kBoxes - W::kPlaces + place : own - W::kPlaces + (earlier ? 2 * kBoxes : 0);
          mbarrier_wait(taken_at + 8 * last, earlier ? turn ^ 1 : turn);
        };
        const uint32_t to = places + place * kBoxBytes + piece;
        uint32_t pairs[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) pairs[i] = pack<T>(sums[2 * i], sums[2 * i + 1]);
        wait_for_place();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t four[4] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
          store_matrix(to ^ (i << 5), four);
        }
        mbarrier_arrive(filled_at + 8 * barrier_of(group, box, tile.narrow));
      }
      turn ^= 1;
    }
  } else if (warp < W::kWayOut / 32 + 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(W::kLinesRegisters));
    if (warp < W::kLoader) {
      send_lines(warp - W::kWayOut / 32);
    } else {
      if (lane == 0) load_stages();
      __syncwarp();
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(W::kLoaderRegisters));
    if (warp == W::kLoader) {
      if (lane == 0) load_stages();
      __syncwarp();
    }
  }
#endif
}

template <typename T>
cudaError_t launch_wide_gradient(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts,
                                 cudaStream_t stream) {
  using W = WideGradient;
  CUtensorMap a, b;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kWideRows, a)) return error;
  if (const auto error = box_map(p.dtype, p.b, p.k, p.n, p.b_stride[1], kNarrowColumns, b)) return error;
  const size_t shared = 1024 + static_cast<size_t>(s.stages) * W::kStageBytes + W::kPlaces * size_t{kBoxBytes};
  return launch(wide_gradient_kernel<T>, dim3(static_cast<unsigned>(s.blocks)), dim3(W::kThreads), shared, 1, facts,
                stream, p, s, a, b);
}

}  // namespace styleforge::cuda
