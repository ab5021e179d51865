// The matrix product of launch.h on wgmma (sm_90a), for products that fill the device: 16-bit numbers (half_sm90.cu) or
// float32 ones as TF32 (tf32_sm90.cu). Bytes are the same for both: a stage is 128 bytes of k, an instruction takes 32.
//
//   block:      128 x 256 (192) of the output at a time, going from tile to tile (persistent)
//   loader:     one thread; rows of a and b, 128 bytes of k a stage, by TMA into a ring (float32 rounds on the way)
//   consumers:  two warpgroups, 64 rows of a tile each; both operands from shared memory, one group of wgmma in flight.
//               What they have in the end goes to shared memory, 16-bit with the bias and rounded, and on to the next
//               tile
//   way out:    warps of their own; a box of 64 rows x 128 bytes each from there, through the activation, to memory
//               (wide_out.cuh)
//
// An activation of 16-bit numbers costs about as many instructions as the tensor cores need cycles for k = 512, so it
// runs beside them. Sums can change hands rounded: PyTorch rounds there as well. TF32 takes a float32 number's upper 19
// bits as they are; that the copy engine rounds to nearest first is what makes these products as accurate as cuBLAS's.
//
// Measured on an H200 in microseconds, both products with erf-GELU against eager PyTorch in turns, as the chip's power
// is what is short: 8192 x 512 -> 2048, 768 -> 3072, 1024 -> 4096 and 2048 x 4096 -> 11008
//   TF32      117 (133), 237 (258), 444 (448), 1044 (1095)
//   bfloat16  69 (80), 131 (147), 209 (227), 485 (505)
//   float16   67 (80), 130 (148), 212 (231), 509 (533)
// cuBLAS's products alone are faster than these by 10 to 15% up to k = 1024: probably a warpgroup waits until the other
// one's sums have left their place, which they share.
//
// What was tried: two warpgroups that take turns with tiles of 128 x 128; loading by one of the way out's warps in
// between; clusters of two that load b for each other; places for both halves of a tile and one stage less (TF32: 131
// for 120); seven or eight warps of half the registers on the way out (16-bit, in turns: 75, 148, 248, 592 for 72, 143,
// 241, 588); three, and one instruction for 256 columns (16-bit: slower by a sixth up to k = 1024); activations in a
// loop of short code, bands of 8 and 32 rows of tiles (no difference).
//
// kGradient: b lies with n side by side in memory, and the way out is that of the activation's gradient.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/launch.h"
#include "boxes.cuh"
#include "kernels.h"
#include "wgmma_wide.cuh"
#include "wide_out.cuh"

namespace styleforge::cuda {

constexpr int kWideRows = 128;
constexpr int kNarrowColumns = 64;  // of the last tiles, where they are cut up
constexpr int kWideABytes = kWideRows * kBoxRowBytes;

// How a block is made up, by the warps of the way out. 3: a fourth one loads, and a tile's columns are one instruction,
// which is not to be had with more than 384 threads. 4: another warpgroup loads, and 256 columns are two instructions,
// which read a twice.
template <typename T, int kColumns, int kLinesWarps>
struct Wide {
  static constexpr int kWayOut = 256;  // its first thread
  static constexpr int kLoader = kWayOut / 32 + kLinesWarps;
  static constexpr int kThreads = kLinesWarps == 3 ? 384 : 512;
  static constexpr int kInstructions = kLinesWarps == 3 ? 1 : 2;
  // Registers: all together no more than the threads have at the launch, at most 65536.
  static constexpr int kConsumerRegisters = kLinesWarps == 3 ? 184 : 176;
  static constexpr int kLinesRegisters = kLinesWarps == 3 ? 136 : 120;
  static constexpr int kLoaderRegisters = 40;  // of a warpgroup of its own

  static constexpr int kStageBytes = kWideABytes + kColumns * kBoxRowBytes;
  static constexpr int kBoxes = kColumns / kBoxNumbers<T>;  // of a tile's 64 rows
  static constexpr int kNarrowBoxes = kNarrowColumns / kBoxNumbers<T>;
  // Boxes of a narrow tile lie in other places than the same boxes of a wide one, so that nothing would order the uses
  // of one barrier by both, and a wait that comes a phase late waits forever: they have barriers of their own, after
  // the others.
  static constexpr int kBarriers = 4 * kBoxes;
};

#ifdef STYLEFORGE_HAS_WGMMA

struct WideTile {
  int row, column;
  bool narrow = false;
};

// Tiles of 128 rows in bands of rows; within a band, down the rows first.
__device__ __forceinline__ WideTile wide_tile_at(int index, int tiles_m, int tiles_n, int band, int width) {
  const int first = index / (band * tiles_n) * band;
  const int rows = min(band, tiles_m - first);
  const int r = index - first * tiles_n;
  const int column = r / rows;
  return {(first + r - column * rows) * kWideRows, column * width};
}

// The sums are where the compiler thinks they are only once wgmma has been waited for.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void store_two(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

#endif  // STYLEFORGE_HAS_WGMMA

template <typename T, int kColumns, int kLinesWarps, bool kGradient>
__global__ void __launch_bounds__(Wide<T, kColumns, kLinesWarps>::kThreads, 1)
    wide_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                     const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap narrow_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using W = Wide<T, kColumns, kLinesWarps>;
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr int kStage = W::kStageBytes, kBoxes = W::kBoxes, kWidth = kBoxNumbers<T>;
  static_assert(kHalf || !kGradient);
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
    return narrow ? half * W::kNarrowBoxes + box : (half * kBoxes + box) % s.places;
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
    if (s.narrow > 0) prefetch_map(&narrow_map);
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
    constexpr int kParts = kGradient ? kColumns / kWidth : 2;
    constexpr int kPartBytes = kColumns * kBoxRowBytes / kParts;
    const auto load_b = [&](int chunk, int stage, const WideTile& tile) {
      const uint32_t to = ring + stage * kStage + kWideABytes, barrier = full_at + 8 * stage;
      const int k = chunk * kWidth;
      mbarrier_arrive_expect(&full[stage], tile.narrow ? kWideABytes + kBoxBytes : kStage);
      if (!kGradient && tile.narrow) load_box(to, &narrow_map, k, tile.column, barrier);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (tile.narrow && (!kGradient || i > 0)) continue;
        const int x = kGradient ? tile.column + i * kWidth : k;
        const int y = kGradient ? k : tile.column + i * (kColumns / kParts);
        load_box(to + i * kPartBytes, &b_map, x, y, barrier);
      }
    };
    // What does not depend on the kernel before this one, while that one drains.
    const int early = p.b_is_ready ? min(chunks, s.stages) : 0;
    for (int i = 0; i < early; ++i) load_b(i, i, tile_of(first_tile));
    wait_for_predecessor();
    int stage = 0;
    uint32_t parity = 1;
    for (int t = first_tile; t < tiles; t += step) {
      const WideTile tile = tile_of(t);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (t != first_tile || chunk >= early) {
          mbarrier_wait(empty_at + 8 * stage, parity);
          load_b(chunk, stage, tile);
        }
        load_box(ring + stage * kStage, &a_map, chunk * kWidth, tile.row, full_at + 8 * stage);
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
    if (p.residual != nullptr && lines_warp < count) out.load(other, next.row, next.column);
#pragma unroll 1
    for (int index = lines_warp; index < count; index += kLinesWarps) {
      const Box box = next;
      float sums[8] = {};
      const uint4 bias = kHalf ? uint4{} : out.load_bias(box.column);
      mbarrier_wait(filled_at + 8 * box.barrier, box.parity);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        uint4 v[kLines], ahead[kLines] = {};
        out.take(v, box.address, part);
        const bool last = part == kParts - 1;
        if (last) {
          mbarrier_arrive(taken_at + 8 * box.barrier);
          next = box_at(index + kLinesWarps);
        }
        if (p.residual != nullptr && (!last || index + kLinesWarps < count)) {
          out.load(ahead, last ? next.row : box.row + Out::kPartRows * (part + 1), next.column);
        }
        const int row = box.row + Out::kPartRows * part;
        if constexpr (kGradient) {
          out.gradient(v, other, sums, row, box.column);
        } else {
          out.forward(v, bias, other, row, box.column);
        }
#pragma unroll
        for (int i = 0; i < kLines; ++i) other[i] = ahead[i];
      }
      if constexpr (kGradient) {
        if (p.column_sums != nullptr) out.sum_out(sums, box.row, box.column);
      }
    }
  };

  // Each warpgroup has its own number of registers.
  if (warp < W::kWayOut / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(W::kConsumerRegisters));
    wait_for_predecessor();
    constexpr int kMmaWidth = kColumns / W::kInstructions;
    using Mma = WgmmaWide<kMmaKind<T>, kMmaWidth, kGradient>;
    const int group = warp / 4;
    const uint32_t group_a = group * 64 * kBoxRowBytes;
    // Where this lane writes in a box. 16-bit: its row and 16-byte half of a warp's 16 x 16 piece; the next piece is an
    // exclusive or away. float32: its two numbers in the first eight columns.
    const uint32_t piece = kHalf ? (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4)
                                 : (warp % 4 * 16 + lane / 4) * kBoxRowBytes + lane % 4 * 8;
    float d[W::kInstructions][kMmaWidth / 2];
    int stage = 0;
    uint32_t parity = 0;

    const auto multiply = [&](bool accumulate, auto narrow) {
      mbarrier_wait(full_at + 8 * stage, parity);
      constexpr int kNext = kGradient ? 128 : 2;  // 32 bytes of k further on in b
      const uint32_t at = ring + stage * kStage;
      const uint64_t a = wgmma_descriptor(at + group_a);
      const uint64_t b = kGradient ? wgmma_transposed_descriptor(at + kWideABytes) : wgmma_descriptor(at + kWideABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (narrow.value) {
          auto& first = reinterpret_cast<float (&)[kNarrowColumns / 2]>(d);
          WgmmaWide<kMmaKind<T>, kNarrowColumns, kGradient>::run(first, a + 2 * k, b + kNext * k, accumulate || k > 0);
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
      // A box's bias is loaded before the box in front of it goes out.
      [[maybe_unused]] uint32_t bias[2][8];
      [[maybe_unused]] const auto load_bias = [&](int box) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int at = tile.column + lane % 4 * 2 + box * kWidth + 8 * i;
          const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + at);
          bias[box % 2][i] = p.bias != nullptr && at < p.n ? __ldg(from) : 0;
        }
      };
      if constexpr (kHalf) load_bias(0);
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
          const bool earlier = tile.narrow || own < s.places;  // in the turn before this one
          const int last = tile.narrow ? 2 * kBoxes - s.places + place : own - s.places + (earlier ? 2 * kBoxes : 0);
          mbarrier_wait(taken_at + 8 * last, earlier ? turn ^ 1 : turn);
        };
        const uint32_t to = places + place * kBoxBytes + piece;
        if constexpr (kHalf) {
          if (box + 1 < kBoxes) load_bias(box + 1);
          uint32_t pairs[16];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float2 b = unpack<T>(bias[box % 2][i]);
            const float* x = sums + 4 * i;
            pairs[2 * i] = pack<T>(x[0] + b.x, x[1] + b.y);
            pairs[2 * i + 1] = pack<T>(x[2] + b.x, x[3] + b.y);
          }
          wait_for_place();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t four[4] = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
            store_matrix(to ^ (i << 5), four);
          }
        } else {
          wait_for_place();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t at = to + ((i ^ (lane / 4 & 3)) << 5);
            store_two(at, sums[4 * i], sums[4 * i + 1]);
            store_two(at + 8 * kBoxRowBytes, sums[4 * i + 2], sums[4 * i + 3]);
          }
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

template <typename T, int kColumns, int kLinesWarps, bool kGradient>
cudaError_t launch_wide_gemm(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts,
                             cudaStream_t stream) {
  using W = Wide<T, kColumns, kLinesWarps>;
  CUtensorMap a, b, narrow;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kWideRows, a)) return error;
  const auto b_error = kGradient ? box_map(p.dtype, p.b, p.k, p.n, p.b_stride[1], kNarrowColumns, b)
                                 : box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kColumns / 2, b);
  if (b_error != cudaSuccess) return b_error;
  narrow = b;
  if (s.narrow > 0 && !kGradient) {
    if (const auto error = box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kNarrowColumns, narrow)) return error;
  }
  const size_t shared = 1024 + static_cast<size_t>(s.stages) * W::kStageBytes + s.places * size_t{kBoxBytes};
  return launch(wide_gemm_kernel<T, kColumns, kLinesWarps, kGradient>, dim3(static_cast<unsigned>(s.blocks)),
                dim3(W::kThreads), shared, 1, facts, stream, p, s, a, b, narrow);
}

}  // namespace styleforge::cuda
