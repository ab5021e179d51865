// The matrix product of launch.h on wgmma (sm_90a), for products that fill the device: 16-bit numbers (half_sm90.cu) or
// float32 ones as TF32 (tf32_sm90.cu). Bytes are the same for both: a stage is 128 bytes of k, an instruction takes 32.
//
//   block:      128 x 256 (192) of the output at a time, going from tile to tile (persistent)
//   loader:     one thread; rows of a and b, 128 bytes of k a stage, by TMA into a ring (float32 rounds on the way)
//   consumers:  two warpgroups, 64 rows of a tile each; both operands from shared memory. What they have in the end
//               goes to places in shared memory, 16-bit with the bias and rounded: of 256 columns one half while the
//               other is still multiplied, then the other while the next tile's first half begins
//   way out:    warps of their own; a box of 64 rows x 128 bytes each from there into registers, which frees its place,
//               then through the activation to memory (wide_out.cuh)
//   biases:     of 16-bit numbers and kGelu, by a warp that has nothing else to do
//   kGelu:      float32 with GELU alone. The consumers bring the second half through it to memory themselves, whole
//               sectors of 32 bytes, while the next tile's first half is multiplied with two stages
//
// Sums can change hands rounded: PyTorch rounds there as well. TF32 takes a float32 number's upper 19 bits as they are;
// that the copy engine rounds to nearest first is what makes these products as accurate as cuBLAS's.
//
// What limits it, in clocks of an H200 (bfloat16, 8192 x 512 -> 2048): a stage takes 1054 alone (1024 were the tensor
// cores' limit) and 1400 beside a way out that computes; a warp there issues one instruction in 3.4 clocks meanwhile,
// in 2 when the tensor cores have nothing to do. So every instruction on the way out counts, and where it lies: with
// code for all activations in a row, most of it jumped over, a box with GELU took 9400 and the product 43.1 us; with
// code of its own in a short loop 7000 and 37.0 (29.9 without GELU, 34.3 with four terms less of its polynomial). A
// half's way to its places takes 700, of which its warpgroups' other halves hide 512. TF32 has twice the bytes on the
// way out: with both halves on it 5500 of a tile's 24700 clocks (k = 512) passed while the second one waited for
// places.
//
// TF32 products of a network of 8192 x 768 -> 3072 (1024 -> 4096) in microseconds, cuBLAS's bare products at the same
// clocks: second product 119 (202), cuBLAS 120 (205). First one, with GELU: cuBLAS without it 117 (208); both halves by
// the way out 146 (252); with three terms less in GELU's polynomial 141 (242); its parts in a row, no registers that
// change places, 136 (237); the second half by the consumers 134 (231), one and three stages ahead 1% slower.
// What is left of the way out there is worth another 7%: without warps for it two warpgroups have 240 registers, an
// instruction takes all 256 columns, and of a tile's sums 80 a lane stay in registers of their own, 32 in shared memory
// that this lane alone knows and go through GELU eight at a time under the next tile's stages. A trial of that: 124
// (211) where this took 133 (224), 59 for 64 with 512 -> 2048. Its last stage in two halves costs all of that (C7511).
//
// ptxas gives up (C7514) where the registers of two halves are never all waited for in a loop: the second half is, when
// the first one is on its way. A stage's number that comes from before a wait costs four R2UR for every wgmma: the ring
// goes on first.
//
// Measured in microseconds, both products with erf-GELU against eager PyTorch in turns, as the chip's power is what is
// short: 8192 x 512 -> 2048, 768 -> 3072, 1024 -> 4096 and 2048 x 4096 -> 11008
//   TF32      119 (152), 226 (272), 424 (470), 1071 (1158)
//   bfloat16  60 (80), 122 (146), 215 (253), 553 (596)
//   float16   62 (81), 125 (150), 212 (251), 575 (624)
//
// What was tried: two warpgroups that take turns with tiles of 128 x 128; loading by one of the way out's warps in
// between; clusters of two that load b for each other (TF32: 164 for 124, 302 for 233); seven or eight warps of half
// the registers on the way out; a first half that is two or three stages ahead of the second one (TF32: 68.4 for 69.1);
// bands of 8 and 32 rows of tiles (no difference).
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

template <typename T, int kColumns, int kLinesWarps, bool kGelu>
__global__ void __launch_bounds__(Wide<T, kColumns, kLinesWarps>::kThreads, 1)
    wide_gemm_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ GemmSchedule s,
                     const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap narrow_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  using W = Wide<T, kColumns, kLinesWarps>;
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr int kStage = W::kStageBytes, kBoxes = W::kBoxes, kWidth = kBoxNumbers<T>;
  extern __shared__ unsigned char dynamic[];
  const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024 bytes
  const uint32_t places = ring + s.stages * kStage;
  constexpr bool kSharedBias = W::kSharedBias || kGelu;
  __shared__ uint64_t full[kMaxGemmStages], empty[kMaxGemmStages], filled[W::kBarriers], taken[W::kBarriers];
  __shared__ uint64_t bias_full, bias_empty;
  __shared__ __align__(16) float biases[kSharedBias ? kColumns : 4];
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
  const auto place_of = [](int group, int box, bool narrow) {
    return W::kOwnPlaces ? group * W::kOwn + box % W::kOwn : narrow ? group * W::kNarrowBoxes + box : box;
  };
  const auto barrier_of = [&](int group, int box, bool narrow) {
    if (W::kOwnPlaces) return place_of(group, box, narrow);
    return narrow ? 2 * kBoxes + group * W::kNarrowBoxes + box : group * kBoxes + box;
  };
  // Of the phase in which a box goes through its barriers, in one of the turns of the block's tiles.
  const auto parity_of = [](int box, bool narrow, int turn) -> uint32_t {
    return W::kOwnPlaces ? box / W::kOwn & 1 : narrow ? 0 : turn & 1;
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
      mbarrier_init(&filled[i], 128);  // all threads of a warpgroup: racecheck knows of nobody else's accesses
      mbarrier_init(&taken[i], 32);
    }
    mbarrier_init(&bias_full, 32);
    mbarrier_init(&bias_empty, 256);
    mbarrier_init_fence();
  }
  __syncthreads();

  const auto load_stages = [&] {
    constexpr int kParts = 2;
    constexpr int kPartBytes = kColumns * kBoxRowBytes / kParts;
    const auto load_b = [&](int chunk, int stage, const WideTile& tile) {
      const uint32_t to = ring + stage * kStage + kWideABytes, barrier = full_at + 8 * stage;
      const int k = chunk * kWidth;
      mbarrier_arrive_expect(&full[stage], tile.narrow ? kWideABytes + kBoxBytes : kStage);
      if (tile.narrow) load_box(to, &narrow_map, k, tile.column, barrier);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (tile.narrow) continue;
        load_box(to + i * kPartBytes, &b_map, k, tile.column + i * (kColumns / kParts), barrier);
      }
    };
    load_wide_tiles(p, s, &a_map, ring, kStage, full_at, empty_at, tiles, chunks, kWidth, tile_of, load_b);
  };
  const auto send_lines = [&](int lines_warp) {
    wait_for_predecessor();
    constexpr int kLines = 4;
    using Out = LinesOut<T, kLines>;
    const Out out(p, s.vectors, lane);
    // Boxes in the order in which they are filled; what a part of one needs of global memory is loaded while the one
    // before it is on its way.
    struct Box {
      int row, column, place, barrier;
      uint32_t parity;
    };
    const int turns = tiles > first_tile ? (tiles - first_tile - 1) / step + 1 : 0;
    const int wide_turns = wide_tiles > first_tile ? (wide_tiles - first_tile - 1) / step + 1 : 0;
    constexpr int kParts = Out::kParts;
    constexpr int kEach = kGelu ? kBoxes / 4 : W::kOwnPlaces ? kBoxes / 2 : 2 * kBoxes;  // boxes of a turn
    constexpr int kFew = W::kNarrowBoxes;
    const auto box_at = [&](int index) {
      int turn = index / kEach, after = index % kEach;
      if (turn >= wide_turns) {
        turn = wide_turns;
        after = index - wide_turns * kEach;
      }
      const bool narrow = turn >= wide_turns;
      const int of_group = narrow ? kFew : kBoxes;
      const int group = W::kOwnPlaces ? lines_warp / 2 : after / of_group;
      const int box = W::kOwnPlaces ? after * 2 + lines_warp % 2 : after % of_group;
      const WideTile tile = tile_of(first_tile + turn * step);
      return Box{tile.row + group * 64, tile.column + box * kWidth, place_of(group, box, narrow),
                 barrier_of(group, box, narrow), parity_of(box, narrow, turn)};
    };
    const int few = W::kOwnPlaces ? (kFew + 1 - lines_warp % 2) / 2 : 2 * kFew;
    const int count = wide_turns * kEach + (turns - wide_turns) * few;
    constexpr int kFirst = W::kOwnPlaces ? 0 : 1, kStep = W::kOwnPlaces ? 1 : kLinesWarps;
    const int first = lines_warp * kFirst;
    const bool gelu = p.activate && p.activation == FfnActivation::kGelu;
    const WayOut usual = p.residual != nullptr ? WayOut::kAny
                         : gelu                ? WayOut::kGelu
                         : p.activate          ? WayOut::kAny
                                               : WayOut::kPlain;
    Box next = box_at(first);
    uint4 other[kLines] = {};
    if (p.residual != nullptr && first < count) out.load(other, next.row, next.column);
#pragma unroll 1
    for (int index = first; index < count; index += kStep) {
      const Box box = next;
      const uint4 bias = kHalf ? uint4{} : out.load_bias(box.column);
      mbarrier_wait(filled_at + 8 * box.barrier, box.parity);
      // All of the box at once: what waits for its place waits no longer than that.
      uint4 v[kParts][kLines];
#pragma unroll
      for (int part = 0; part < kParts; ++part) out.take(v[part], places + box.place * kBoxBytes, part);
      mbarrier_arrive(taken_at + 8 * box.barrier);
      // A loop over the parts, although their registers have to change places: its code comes from the nearest cache.
      // Where the way out is what the products wait for, the parts in a row.
      const auto send = [&](auto way) {
        constexpr bool kAny = way.value == WayOut::kAny;
        constexpr int kInARow = !kAny && !kHalf && !kGelu ? kParts : 1;
#pragma unroll 1
        for (int part = 0; part < kParts; part += kInARow) {
#pragma unroll
          for (int now = 0; now < kInARow; ++now) {
            const bool last = part + now == kParts - 1;
            const int row = box.row + Out::kPartRows * (part + now);
            if (last) next = box_at(min(index + kStep, count - 1));
            const int next_row = last ? next.row : row + Out::kPartRows, next_column = last ? next.column : box.column;
            uint4 ahead[kLines] = {};
            if (kAny && p.residual != nullptr) out.load(ahead, next_row, next_column);
            out.template forward<way.value>(v[now], bias, other, row, box.column);
#pragma unroll
            for (int j = 0; kAny && j < kLines; ++j) other[j] = ahead[j];
          }
#pragma unroll
          for (int i = 0; i + kInARow < kParts; ++i) {
#pragma unroll
            for (int j = 0; j < kLines; ++j) v[i][j] = v[i + kInARow][j];
          }
        }
      };
      const bool whole = box.row + 64 <= p.m && box.column + kWidth <= p.n;
      if (whole && usual == WayOut::kGelu) {
        send(WayOutIs<WayOut::kGelu>{});
      } else if (whole && usual == WayOut::kPlain) {
        send(WayOutIs<WayOut::kPlain>{});
      } else {
        send(WayOutIs<WayOut::kAny>{});
      }
    }
  };
  // A tile's biases as float32, in the order in which a lane of the consumers adds them: of eight neighbouring columns
  // two each, of 16 columns one after the other.
  [[maybe_unused]] const auto send_biases = [&] {
    wait_for_predecessor();
    uint32_t parity = 1;
    for (int t = first_tile; t < tiles; t += step) {
      static_assert(!kSharedBias || kColumns == 8 * 32);
      const int column = tile_of(t).column + lane * 8;
      constexpr int kWords = kHalf ? 4 : 8;
      uint32_t words[kWords] = {};
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (p.bias == nullptr || column + i / 4 * 4 >= p.n) continue;
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + column) + i);
      }
      mbarrier_wait(&bias_empty, parity);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (kHalf) {
          *reinterpret_cast<float2*>(biases + lane / 2 * 16 + i * 4 + lane % 2 * 2) = unpack<T>(words[i]);
        } else {
          biases[lane * 8 + i] = 0.5f * __uint_as_float(words[i]);
        }
      }
      mbarrier_arrive(&bias_full);
      parity ^= 1;
    }
  };

  // Each warpgroup has its own number of registers.
  if (warp < W::kWayOut / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(W::kConsumerRegisters));
    wait_for_predecessor();
    constexpr int kMmaWidth = kColumns / W::kHalves;
    using First = std::integral_constant<int, 0>;
    using Second = std::integral_constant<int, W::kHalves - 1>;
    const int group = warp / 4;
    const uint32_t group_a = group * 64 * kBoxRowBytes;
    // Where this lane writes in a box. 16-bit: its row and 16-byte half of a warp's 16 x 16 piece; the next piece is an
    // exclusive or away. float32: its two numbers in the first eight columns.
    const uint32_t piece = kHalf ? (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4)
                                 : (warp % 4 * 16 + lane / 4) * kBoxRowBytes + lane % 4 * 8;
    const uint32_t biases_at = shared_address(biases) + lane % 4 * 16;
    int stage = 0;
    uint32_t parity = 0;

    const auto advance = [&] {
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    // A stage into one half of the columns, or into the columns of a narrow tile.
    const auto multiply = [&](auto& to, auto half, int from, bool accumulate) {
      constexpr int kWidthOfOne = 2 * static_cast<int>(sizeof(to) / sizeof(float));
      using Mma = WgmmaWide<kMmaKind<T>, kWidthOfOne, false>;
      constexpr int kNext = 2;  // 32 bytes of k further on in b
      const uint32_t at = ring + from * kStage;
      const uint64_t a = wgmma_descriptor(at + group_a);
      const uint64_t b = wgmma_descriptor(at + kWideABytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Mma::run(to, a + 2 * k, b + half.value * (kMmaWidth * kBoxRowBytes >> 4) + kNext * k, accumulate || k > 0);
      }
      wgmma_commit();
    };
    const auto release = [&](int done) {
      if (lane == 0) mbarrier_arrive(empty_at + 8 * done);
      __syncwarp();
    };
    uint32_t turn = 0;  // of the block's tiles, modulo 2
    // The sums of one half's boxes go to their places.
    const auto stash = [&](const auto& from, auto half, auto narrow, const WideTile& tile) {
      constexpr int kCount = narrow.value ? W::kNarrowBoxes : kBoxes / W::kHalves;
      constexpr int kFirstBox = half.value * kCount;
      // A box's bias is loaded before the box in front of it goes out.
      [[maybe_unused]] uint32_t bias[2][8];
      [[maybe_unused]] const auto load_bias = [&](int i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int at = tile.column + lane % 4 * 2 + (kFirstBox + i) * kWidth + 8 * j;
          const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + at);
          bias[i % 2][j] = p.bias != nullptr && at < p.n ? __ldg(from) : 0;
        }
      };
      constexpr bool kLoads = kHalf && !kSharedBias;
      if constexpr (kLoads) load_bias(0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int box = kFirstBox + i, place = place_of(group, box, narrow.value);
        const auto wait_for_place = [&] {
          if constexpr (W::kOwnPlaces) {
            mbarrier_wait(taken_at + 8 * place, parity_of(box, narrow.value, 0) ^ 1);
          } else {  // the other warpgroup's box that was there; before a narrow tile the lower rows' one
            const bool upper = narrow.value || group == 0;
            mbarrier_wait(taken_at + 8 * barrier_of(upper ? 1 : 0, place, false), upper ? turn ^ 1 : turn);
          }
        };
        const float* sums = from + i * kWidth / 2;
        const uint32_t to = places + place * kBoxBytes + piece;
        if constexpr (kHalf) {
          if (kLoads && i + 1 < kCount) load_bias(i + 1);
          // Piece by piece of 16 columns: the sums of the other half stay where they are meanwhile.
          float4 b[4] = {};
#pragma unroll
          for (int j = 0; kSharedBias && j < 4; ++j) b[j] = load_shared_float4(biases_at + (box * 4 + j) * 64);
          wait_for_place();
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (kLoads) {
              const float2 first = unpack<T>(bias[i % 2][2 * j]), second = unpack<T>(bias[i % 2][2 * j + 1]);
              b[j] = {first.x, first.y, second.x, second.y};
            }
            const float* x = sums + 8 * j;
            const uint32_t four[4] = {pack<T>(x[0] + b[j].x, x[1] + b[j].y), pack<T>(x[2] + b[j].x, x[3] + b[j].y),
                                      pack<T>(x[4] + b[j].z, x[5] + b[j].w), pack<T>(x[6] + b[j].z, x[7] + b[j].w)};
            store_matrix(to ^ (j << 5), four);
          }
        } else {
          wait_for_place();
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t at = to + ((j ^ (lane / 4 & 3)) << 5);
            store_two(at, sums[4 * j], sums[4 * j + 1]);
            store_two(at + 8 * kBoxRowBytes, sums[4 * j + 2], sums[4 * j + 3]);
          }
        }
        mbarrier_arrive(filled_at + 8 * barrier_of(group, box, narrow.value));
      }
    };
    // Sums of the second half through the activation to memory, by the warps that have them.
    [[maybe_unused]] const auto send_sums = [&](const auto& from, const WideTile& tile) {
      const int row = tile.row + group * 64 + warp % 4 * 16 + lane / 4;
      const int column = tile.column + kMmaWidth + lane % 4 * 2;
      const int left = p.n - column, upper = row < p.m ? left : 0, lower = row + 8 < p.m ? left : 0;
      float* to = static_cast<float*>(p.output) + static_cast<int64_t>(row) * p.n + column;
      float* below = to + int64_t{8} * p.n;
      const uint32_t bias_at = shared_address(biases) + (kMmaWidth + lane % 4 * 2) * 4;
      constexpr int kTogether = 2;
#pragma unroll
      for (int first = 0; first < kMmaWidth / 8; first += kTogether) {
        float x[4 * kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const float2 b = load_shared_float2(bias_at + (first + i) * 32);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[4 * i + j] = fmaf(0.5f, from[4 * (first + i) + j], j % 2 == 0 ? b.x : b.y);
        }
#pragma unroll
        for (int i = 0; i < 4 * kTogether; ++i) x[i] = gelu_of_twice<TF32>(x[i]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int at = 8 * (first + i);
          if (at < upper) *reinterpret_cast<float2*>(to + at) = {x[4 * i], x[4 * i + 1]};
          if (at < lower) *reinterpret_cast<float2*>(below + at) = {x[4 * i + 2], x[4 * i + 3]};
        }
      }
    };
    const auto wait_for_biases = [&] {
      if constexpr (kSharedBias) mbarrier_wait(shared_address(&bias_full), turn);
    };
    const auto end_turn = [&] {
      if constexpr (kSharedBias) mbarrier_arrive(&bias_empty);
      turn ^= 1;
    };
    // All of a tile before anything of it goes out.
    const auto whole_tile = [&](auto narrow, const WideTile& tile) {
      static_assert(narrow.value || W::kHalves == 1);
      float d[(narrow.value ? kNarrowColumns : kColumns) / 2];
      int done = stage;
      mbarrier_wait(full_at + 8 * stage, parity);
      multiply(d, First{}, stage, false);
      advance();
      for (int chunk = 1; chunk < chunks; ++chunk) {
        mbarrier_wait(full_at + 8 * stage, parity);
        multiply(d, First{}, stage, true);
        wgmma_wait<1>();
        release(done);
        done = stage;
        advance();
      }
      wgmma_wait<0>();
      release(done);
      hold(d);
      wait_for_biases();
      stash(d, First{}, narrow, tile);
      end_turn();
    };
    constexpr auto kWhole = std::false_type{};
    [[maybe_unused]] const auto send_second = [&](const auto& from, const WideTile& tile) {
      if constexpr (kGelu) {
        send_sums(from, tile);
      } else {
        stash(from, Second{}, kWhole, tile);
      }
    };

    int t = first_tile;
    if constexpr (W::kHalves == 1) {
      for (; t < wide_tiles; t += step) whole_tile(kWhole, tile_of(t));
    } else {
      if (t < wide_tiles) {
        WideTile tile = tile_of(t);
        constexpr int kAhead = kGelu ? kGeluAhead : 1;
        int held = stage;
        float d[2][kMmaWidth / 2];
        const auto begin = [&] {
          held = stage;
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            mbarrier_wait(full_at + 8 * stage, parity);
            multiply(d[0], First{}, stage, i > 0);
            advance();
          }
        };
        begin();
        while (true) {
          multiply(d[1], Second{}, held, false);
#pragma unroll
          for (int i = 1; i < kAhead; ++i) {
            const int before = held;
            held = held + 1 == s.stages ? 0 : held + 1;
            multiply(d[1], Second{}, held, true);
            wgmma_wait<1>();
            release(before);
          }
          for (int chunk = kAhead; chunk < chunks; ++chunk) {
            mbarrier_wait(full_at + 8 * stage, parity);
            multiply(d[0], First{}, stage, true);
            multiply(d[1], Second{}, stage, true);
            wgmma_wait<2>();
            release(held);
            held = stage;
            advance();
          }
          wait_for_biases();
          wgmma_wait<1>();
          hold(d[0]);
          stash(d[0], First{}, kWhole, tile);
          t += step;
          if (t >= wide_tiles) break;
          wgmma_wait<0>();
          hold(d[1]);
          release(held);
          begin();
          send_second(d[1], tile);
          end_turn();
          tile = tile_of(t);
        }
        wgmma_wait<0>();
        release(held);
        hold(d[1]);
        send_second(d[1], tile);
        end_turn();
      }
    }
    if (t < tiles) whole_tile(std::true_type{}, tile_of(t));
  } else if (warp < W::kWayOut / 32 + 4) {
    if constexpr (W::kLinesRegisters > 65536 / W::kThreads) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(W::kLinesRegisters));
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(W::kLinesRegisters));
    }
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
    } else if (kSharedBias && warp == W::kLoader + 1) {
      send_biases();
    }
  }
#endif
}

template <typename T, int kColumns, int kLinesWarps, bool kGelu = false>
cudaError_t launch_wide_gemm(const GemmParams& p, const GemmSchedule& s, const DeviceFacts& facts,
                             cudaStream_t stream) {
  using W = Wide<T, kColumns, kLinesWarps>;
  CUtensorMap a, b, narrow;
  if (const auto error = box_map(p.dtype, p.a, p.m, p.k, p.a_stride, kWideRows, a)) return error;
  if (const auto error = box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kColumns / 2, b)) return error;
  narrow = b;
  if (s.narrow > 0) {
    if (const auto error = box_map(p.dtype, p.b, p.n, p.k, p.b_stride[0], kNarrowColumns, narrow)) return error;
  }
  const size_t shared = 1024 + static_cast<size_t>(s.stages) * W::kStageBytes + W::kPlaces * size_t{kBoxBytes};
  return launch(wide_gemm_kernel<T, kColumns, kLinesWarps, kGelu>, dim3(static_cast<unsigned>(s.blocks)),
                dim3(W::kThreads), shared, 1, facts, stream, p, s, a, b, narrow);
}

}  // namespace styleforge::cuda
