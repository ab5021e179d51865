// Implicit GEMM on wgmma (sm_90a): 2-d convolution, channels_last, with per-tile channel moments in the epilogue, and
// with the norm behind it where all tiles fit on the chip.
//
//   tile:  16 x (4 or 8) output pixels x kColumns output channels; a warp has one row of 16 pixels
//   K:     chunks of 128 bytes of input channels (64 halves, 32 floats), for each chunk all taps of the kernel
//
//   producer warps 1-3: the tile's input with its halo, one chunk of channels -> ring of input stages, each used by all
//                       taps. One TMA box, which fills what lies outside with zeros; at the border of a reflected or
//                       replicated picture the warps then copy what belongs there from elsewhere in the box (or, where
//                       it is not in the box, bring all by cp.async)
//   producer warp 0:    weights of one (chunk, tap), kColumns x 128 bytes, by TMA -> ring of weight stages.
//                       Multicast in clusters of two was slower: 20.5 against 12.8 thousand clocks, 1x128x128x128
//   where weights are split by the block, warp 1 brings the input alone, and warps 2 and 3 split
//   consumer warps:     A fragments by ldmatrix from the halo, at the tap's offset, into registers; B from the weight
//                       stage; one wgmma group runs while the next one's fragments are loaded
//
// The input is read from L2 once a tile instead of once a tap. A pixel's 128 bytes are swizzled in 16-byte pieces by
// its index, as the copy engine does it, so that eight neighbouring pixels lie in different banks.
//
// A block computes one tile or a few, one after the other. The launch is cooperative (or gated, below) where all tiles
// of the tensor are resident that way: results stay in shared memory until all moments are there, and every block
// normalises, adds the residual, activates and writes its tiles, once. Few moments are merged by every block for
// itself; many in two steps, a few channels a block. Nobody waits for the whole grid where it would be on the way:
// moments say themselves that they are there (common/grid.cuh), and that there are marks in their places is settled
// beside the multiplications.
//
// Where the time goes, 16-bit 1x128x128x128 by lean kernels (13 us, thousands of clocks, stages stamped): 2.1 from the
// end of the kernel before on the same multiprocessor to here, 1.3 to the first barrier (2 before it had no division
// and no loop), 2.7 until the first tile is there (it comes from memory: what starts earlier waits longer), 9.9 of
// multiplications, 1.3 for the moments of a tile, 4.2 until those of all are merged, 2 to 2.6 for what follows.
//
// Few pixels: what counts is how much a block reads before it is done (16-bit 1x64x64x64, 6.7 us in clocks: 2000 until
// the first input is there, 2500 of nine steps, 1300 for the marks, 950 for the moments of a tile, 2700 until all are
// merged, 1000 on the way out). Two blocks may share a tile's input channels (float32, shared_sums.cuh), or bring the
// input of one tile for each other (16 bits). Tried and not kept: twice as many moments on their way in the merge (the
// unrolled code is 40% more for every kernel: 0.4 to 0.9 us slower), loads in the order of need, rings of 18 stages,
// parameters read before they are needed (all within 0.1 us), weights for two or four tiles by one block (0.1 us; grids
// with clusters of four may be refused a place and then wait for themselves).
//
// kLean (conv_sm90_lean.cu): what is known of most tensors beforehand, so that less stands between the end of the
// kernel before and the first loads (150 to 250 instructions one after the other, 700 to 1000 clocks), moments need
// neither shuffles nor lists (mma_moments.cuh: 440 instructions a warp and three barriers before), nobody waits for the
// marks before there is something to publish, and a merge asks again only for what was not there: what all blocks ask
// for again and again is 2 to 4 MB a turn, on the way of those that publish (merge_lean.cuh). A block publishes once
// its own marks are there; that all blocks' are is for those to know who read. Blocks without a tile (s.spare) stay
// until moments are there and keep the next kernel's blocks, where two fit a multiprocessor, from its place.
//
// Tried for the merge of 1x128x128x128, 16 bits (blocks publish with a standard deviation of 360 clocks, from when they
// start and when their input comes; the last one then waits 3.2 thousand): sums as fixed-point integers by
// red.global.add.u64, one step instead of two, but the cache adds them too slowly (1.0 us more); four warps of a block
// that ask at different times (1.8 us more: what asks is on the way of what publishes). Moments by channel, of which a
// warp reads 128 in two loads of 16 bytes, and eight copies of the merged ones: 0.26 and 0.35 us less in two runs, with
// loads of 8 bytes nothing; in other builds of these kernels nothing either (12.69 and 12.64).
//
// Gated (gate.h; kGated, where the schedule says so, in graphs): the launch is not cooperative, whose blocks all start
// at once when the kernel before has ended everywhere; each starts when its place is free, and the next kernel's first
// blocks are let in early, to prefetch the input of all. Waiting stays safe because blocks first count themselves
// (GridGate). Where some get no place for 100 us, because other streams hold the multiprocessors, the grid is called
// off: blocks write their raw tiles, rounded as they always are before they are normalised, and their moments, and
// leave; the last one normalises all, by the same steps in the same order, so that the result is the same to the bit.
// TF32, stride 2, 1x64x128x128: 8.67 instead of 9.46 us (8.88 without the prefetch; called off 105). Little or nothing
// elsewhere: 12.80 and 12.88 (16 bits, 1x128x128x128), 20.22 and 20.26 (16 bits, 8x128x64x64), 34.6 and 34.8 (TF32).
// What ran before the first loads for a prefetch without it (a warp that looked for what to ask for, off by default)
// cost 0.1 to 0.9 us wherever it was compiled in: 12.87 instead of 13.15 (16 bits, 1x128x128x128), 8.2 instead of 9.1
// (TF32, 1x256x64x64, 1x1).
//
// kIeee, float32 accuracy from TF32 units (3xTF32): a = hi + lo, b = hi + lo; lo * hi, hi * lo, then hi * hi. The units
// truncate when they add, so the sum of every 32 numbers moves on to float32 registers. The weights come split, or two
// more producer warps split them (split_weights.cuh), which spares a short convolution a launch.
#pragma once

#include <cuda.h>

#include "../common/cluster.cuh"
#include "../common/grid.cuh"
#include "../common/launch.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "../common/wgmma.cuh"
#include "gate.h"
#include "kernels.h"
#include "merge_lean.cuh"
#include "mma_moments.cuh"
#include "shared_sums.cuh"
#include "split_weights.cuh"
#include "tile_in.cuh"
#include "tile_out.cuh"
#include "tile_out_nchw.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kWarps = 4;    // of a warpgroup
constexpr int kChunk = 128;  // bytes of input channels

// Of captured launches; the first is nobody's.
[[maybe_unused]] __device__ GridGate gates[kGates];

#ifdef STYLEFORGE_HAS_WGMMA

constexpr int kConsumerBarrier = 1;

template <typename T>
struct KindOf;
template <>
struct KindOf<__half> {
  static constexpr MmaKind kKind = MmaKind::kF16;
};
template <>
struct KindOf<__nv_bfloat16> {
  static constexpr MmaKind kKind = MmaKind::kBF16;
};
template <>
struct KindOf<float> {
  static constexpr MmaKind kKind = MmaKind::kTF32;
};

#endif  // STYLEFORGE_HAS_WGMMA

template <typename T, int kColumns, int kGroups, bool kSplit, int kShare>
struct ConvTraits {
  static constexpr int kConsumers = 128 * kGroups;
  // Of the producers: one warp for the weights, then those that bring the input, and those that split weights.
  static constexpr int kLoaders = kSplit ? kWarp : 3 * kWarp;
  static constexpr int kSplitters = kSplit ? 2 * kWarp : 0;
  static constexpr int kProducers = kWarp + kLoaders + kSplitters;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kOut = kColumns / kShare;  // columns of the result that a block has in the end
  static constexpr int kRows = kWarps * kGroups;  // tile height: a warp has one row of 16 pixels
  static constexpr int kWeightBytes = kColumns * kChunk * (kSplit ? 2 : 1);
  static constexpr int kElements = kChunk / static_cast<int>(sizeof(T));
  // Half a multiprocessor each where the accumulators leave room.
  static constexpr int kBlocks = kColumns <= 64 && !kSplit && kShare == 1 ? 2 : 1;
  // Where the sums and the fragments are more than an even share of the registers, the producers give theirs away.
  static constexpr bool kMoveRegisters = kGroups == 2;
  // Of fragments: with a third one, ldmatrix of a tap runs beside the multiplication of the one before, and not between
  // the two; large tiles take long enough to multiply, or have no registers to spare.
  static constexpr int kSets = (kColumns == 32 || kGroups == 1 || kShare > 1) && !kSplit ? 3 : 2;
  static constexpr int kConsumerRegisters = kBlocks == 2 ? 96 : 224;
  static constexpr int kProducerRegisters = kBlocks == 2 ? 48 : 56;
  static constexpr int kStorePitch = stash_pitch(kOut, static_cast<int>(sizeof(T)));
  static constexpr int kStoreBytes = ConvSchedule::kTileWidth * kStorePitch;
  static_assert(kColumns % 32 == 0 && kColumns <= 128);
  static_assert(kStorePitch % 16 == 0 && kRows * kStoreBytes % 128 == 0, "the stash holds vectors");
  static_assert(kWeightBytes % 1024 == 0, "stages stay aligned for the swizzle");
  static_assert(kElements % 8 == 0 && kSets >= 2);
  static_assert(!kMoveRegisters ||
                (kConsumers * kConsumerRegisters + kProducers * kProducerRegisters) * kBlocks <= 64 * 1024);
  static_assert(!kMoveRegisters || kProducers == 128, "registers move by warpgroups");
  static_assert(kShare == 1 || (kShare == 2 && sizeof(T) == 4), "moments of 16 columns of 16 bits have no form");
};

// Whether a launch may do without the promise that all blocks are resident together (common/grid.cuh). Small tiles that
// two blocks share take 0.5 of 5.6 us longer with that code, also where the launch is cooperative.
template <typename T, typename Traits, int kLean>
constexpr bool kGated =
    kLean > 0 && Traits::kBlocks == 1 && Traits::kMoveRegisters && (sizeof(T) == 4 || kLean == kLeanMerge);

// kSide: of a square kernel with stride 1 whose taps are unrolled, which is 10% faster; 0: any kernel.
// kShare: blocks of a cluster that share a tile's input channels, and then its columns.
// kLean: of a resident grid of full tiles, plain convolution, activations without transcendental functions: one of
// tiles.h. 0: any.
template <typename T, int kColumns, int kGroups, bool kSplit, int kSide, int kShare, int kLean>
__global__ void __launch_bounds__(ConvTraits<T, kColumns, kGroups, kSplit, kShare>::kThreads,
                                  ConvTraits<T, kColumns, kGroups, kSplit, kShare>::kBlocks)
    conv_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ ConvSchedule s,
                const __grid_constant__ InstanceNormParams norm, const __grid_constant__ CUtensorMap input,
                const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap weights_lo,
                const GateOfLaunch gate) {
#ifdef STYLEFORGE_HAS_WGMMA
  using Traits = ConvTraits<T, kColumns, kGroups, kSplit, kShare>;
  constexpr int kElements = Traits::kElements;
  constexpr int kLoaders = Traits::kLoaders;
  constexpr int kOut = Traits::kOut;
  constexpr bool kMmaMoments = kLean > 0 && sizeof(T) == 2;
  constexpr bool kLeanMerged = kLean == kLeanMerge;
  constexpr bool kMayBeGated = kGated<T, Traits, kLean>;
  static_assert(kLean == 0 || !kSplit);
  constexpr int kWeightThread = Traits::kConsumers, kInputThread = kWeightThread + kWarp;
  extern __shared__ unsigned char dynamic[];
  // Swizzled tiles start at multiples of 1024 bytes.
  unsigned char* ring = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t weight_ring = shared_address(ring);
  const uint32_t input_ring = weight_ring + s.weight_stages * Traits::kWeightBytes;
  __shared__ uint64_t weight_full[kMaxWeightStages], weight_empty[kMaxWeightStages];
  __shared__ uint64_t input_full[kMaxInputStages], input_empty[kMaxInputStages];
  __shared__ uint64_t box_full[kMaxInputStages];                  // boxes whose edges are still to be mended
  __shared__ uint64_t started;                                    // the first input is there
  __shared__ uint64_t marked;                                     // all blocks have put marks where moments will be
  __shared__ uint64_t own_marked;                                 // and this one
  __shared__ bool called_off;                                     // the grid, when all are marked
  __shared__ uint64_t weight_raw[kSplit ? kMaxWeightStages : 1];  // weights that are still to be split
  __shared__ uint64_t shared_sums;                                // kShare: what the other block has added up is there
  __shared__ float2 statistics[kOut];                             // mean, rstd * the norm's weight
  __shared__ float scales[kOut], shifts[kOut];                    // the norm's weight and bias

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int taps = p.kernel_h * p.kernel_w;
  // Neighbours in a cluster: the blocks that share a tile, or that have the same input for other columns.
  const int neighbours = kShare > 1 ? kShare : s.same_input;
  const int block = static_cast<int>(blockIdx.x) >> (neighbours - 1);  // neighbours: 1 or 2
  const int neighbour = static_cast<int>(blockIdx.x) & (neighbours - 1);
  const int rank = kShare > 1 ? neighbour : 0;
  const bool in_cluster = kShare > 1 || s.same_input > 1;
  const int chunks = (p.in_channels + kElements - 1) / kElements / kShare;
  const int first_channel = rank * chunks * kElements;
  const int steps = chunks * taps;
  const int n = blockIdx.z;
  const int multiplied_column =
      (kShare > 1 ? static_cast<int>(blockIdx.y) : static_cast<int>(blockIdx.y) * neighbours + neighbour) * kColumns;
  const int first_column = multiplied_column + rank * kOut;
  // Along x, but those that have no tile.
  const int blocks_x = static_cast<int>(gridDim.x) - (kLean > 0 ? s.spare : 0);
  const auto linear_block = [&] { return (blockIdx.z * gridDim.y + blockIdx.y) * blocks_x + blockIdx.x; };
  [[maybe_unused]] const bool is_spare = kLean > 0 && static_cast<int>(blockIdx.x) >= blocks_x;
  const int begin = block * s.tiles;
  const int end = min(begin + s.tiles, s.entries);
  const auto tile_at = [&](int tile) {
    if constexpr (kLean > 0) {
      return full_tile(s, tile, Traits::kRows);
    } else {
      return conv_tile(p, s, tile);
    }
  };
  // Of a sample: entries of moments where the grid is resident.
  [[maybe_unused]] const int sample_blocks = blocks_x >> (neighbours - 1);
  const auto is_resident = [&] {
    if constexpr (kLean > 0) {
      return true;
    } else {
      return s.resident;
    }
  };
  [[maybe_unused]] const auto entry_of = [&](int entry) {
    return p.moments + (n * sample_blocks + entry) * p.out_channels;
  };
  [[maybe_unused]] const auto is_gated = [&] { return kMayBeGated && gate.place != 0; };
  [[maybe_unused]] const auto all_blocks = [&] { return gridDim.x * gridDim.y * gridDim.z; };
  // The producers' first tile, while the predecessor drains.
  ConvTileAt at = tile_at(begin);
  // Whether the copy engine brings a tile's input.
  const auto top_of = [&] { return at.y * p.stride_h - p.pad_top + (at.phase >> 1); };
  const auto left_of = [&] { return at.x * p.stride_w - p.pad_left + (at.phase & 1); };
  const auto takes_boxes = [&] {
    return p.mode == PaddingMode::kZeros || (top_of() >= 0 && left_of() >= 0 && top_of() + s.halo_height <= p.height &&
                                             left_of() + s.halo_width <= p.width);
  };
  // One thread brings all: the others must not wait, which would take the consumers' time.
  const bool boxes_only = s.tiles == 1 && takes_boxes();

  if (threadIdx.x == kWeightThread) {
    prefetch_map(&weights);
    prefetch_map(&input);
  }
  if constexpr (kLean > 0) {
    if (s.prefetch && !is_spare && threadIdx.x == kInputThread) {
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (kShare == 1 && (chunk & (neighbours - 1)) != neighbour) continue;
        prefetch_box(&input, first_channel + chunk * kElements, left_of(), top_of(), n);
      }
    }
  }
  // For as many stages as there could be, two threads side by side: without loops each is one instruction.
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kMaxWeightStages; ++i) {
      if constexpr (kSplit) mbarrier_init(&weight_raw[i], 1);
      mbarrier_init(&weight_full[i], kSplit && !s.split_before ? Traits::kSplitters : 1);
      mbarrier_init(&weight_empty[i], kWarps * kGroups);
    }
    mbarrier_init_fence();
  } else if (threadIdx.x == kWarp) {
#pragma unroll
    for (int i = 0; i < kMaxInputStages; ++i) {
      mbarrier_init(&input_full[i], boxes_only ? 1 : kLoaders);
      mbarrier_init(&input_empty[i], kWarps * kGroups * 32);
      mbarrier_init(&box_full[i], 1);
    }
    mbarrier_init(&marked, 32);
    mbarrier_init(&own_marked, 32);
    mbarrier_init(&started, 1);
    if constexpr (kShare > 1) {
      mbarrier_init(&shared_sums, 1);
      mbarrier_arrive_expect(&shared_sums, shared_sums_bytes(kColumns, Traits::kConsumers));
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (kLean > 0) {
    // A grid that fills the multiprocessors lets in few of the next one's blocks before it ends: those ask for all.
    if (is_gated() && s.early > 0 && linear_block() < s.early && threadIdx.x == kInputThread) {
      const int all = p.in_channels / kElements;
#pragma unroll 1
      for (int i = linear_block(); i < s.entries * all; i += s.early) {
        const ConvTileAt tile = tile_at(i / all);
        prefetch_box(&input, i % all * kElements, tile.x * p.stride_w - p.pad_left, tile.y * p.stride_h - p.pad_top, n);
      }
    }
  }
  if (in_cluster) cluster_arrive_relaxed();
  wait_for_predecessor();
  if constexpr (kMayBeGated) {
    if (is_gated() && s.early > 0) release_successor();
  }
  if (in_cluster) cluster_wait();  // the other blocks' barriers are there
  [[maybe_unused]] const int first_boxes = takes_boxes() ? min(chunks, s.first_boxes) : 0;
  [[maybe_unused]] const int first_weights = s.first_weights;
  // kLean: a box of the copy engine, by one thread.
  [[maybe_unused]] const auto bring_box = [&](int stage, int chunk, int left, int top) {
    const uint32_t to = input_ring + stage * s.halo_bytes;
    const int pixels = s.halo_height * s.halo_width;
    const int channel = first_channel + chunk * kElements;
    mbarrier_arrive_expect(&input_full[stage], pixels * kChunk);
    if (kShare > 1 || s.same_input == 1) {
      load_box(to, &input, channel, left, top, n, &input_full[stage]);
    } else if ((chunk & (neighbours - 1)) == neighbour) {
      load_box_for((1u << neighbours) - 1, to, &input, channel, left, top, n, &input_full[stage]);
    }
  };
  if constexpr (kLean > 0) {
    if (is_spare) {
      if (threadIdx.x == 0) {
        const uint32_t token = grid_phase();
        grid_arrive_unanswered();
        release_successor();
        grid_wait(token);
        const float2* last = entry_of(sample_blocks - 1) + multiplied_column;
        while (!is_there(look(last))) __nanosleep(200);
      }
      return;
    }
    // What has a place before anything else: what the warps do until their loops is half of what a load takes.
    if (threadIdx.x == kInputThread) {
#pragma unroll 1
      for (int chunk = 0; chunk < first_boxes; ++chunk) bring_box(chunk, chunk, left_of(), top_of());
    }
    if (threadIdx.x == kWeightThread) {
      int tap = 0, channel = first_channel;
#pragma unroll 1
      for (int i = 0; i < first_weights; ++i) {
        mbarrier_arrive_expect(&weight_full[i], Traits::kWeightBytes);
        load_weights(weight_ring + i * Traits::kWeightBytes, &weights, channel, tap, multiplied_column,
                     &weight_full[i]);
        if (++tap == taps) {
          tap = 0;
          channel += kElements;
        }
      }
    }
    __syncwarp();
  }

  if (warp >= kWarps * kGroups) {
    if constexpr (Traits::kMoveRegisters)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    const int role = warp - kWarps * kGroups;
    // The last warp puts marks where this block's moments will be, and those that it merges.
    const bool marks = is_resident() && role == Traits::kProducers / kWarp - 1;
    const bool splits = kSplit && !s.split_before && role > 1;
    uint32_t token = 0;
    const auto put_marks = [&] {
      if constexpr (kLean > 0) {
        if (lane == 0 && !is_gated()) token = grid_phase();
      }
      if constexpr (kLean > 0) {
        float2* own = entry_of(block) + first_column;
        for (int c = lane; c < kOut; c += 32) retract(own + c);
      } else {
        float2* own = p.moments + (static_cast<int64_t>(n) * partials(s) + block) * p.out_channels + first_column;
        for (int c = lane; c < kOut && first_column + c < p.out_channels; c += 32) retract(own + c);
      }
      if (s.merge_apart) {
        const int slices = p.batch * (p.out_channels / kMergeSlice);  // one after the other in memory
        const int blocks = blocks_x * gridDim.y * gridDim.z;
        for (int i = linear_block(); i < slices; i += blocks) {
          if (lane < kMergeSlice) retract(merged(p, s, 0) + i * kMergeSlice + lane);
        }
      }
      __syncwarp();
      if constexpr (kLean > 0) {
        mbarrier_arrive(&own_marked);
        if (lane == 0) {
          if (is_gated()) {
            token = gate_arrive(&gates[gate.place], all_blocks(), gate.nanoseconds);
          } else {
            grid_arrive_unanswered();
          }
        }
      } else {
        if (lane == 0) token = grid_arrive();
      }
    };
    const auto load_norm = [&] {
      for (int c = lane; c < kOut && first_column + c < p.out_channels; c += 32) {
        const int64_t param = n * norm.param_batch_stride + first_column + c;
        const AwaitedParam<float> weight(norm.weight, norm.param_dtype, param);
        const AwaitedParam<float> bias(norm.bias, norm.param_dtype, param);
        scales[c] = weight.value(1.0f);
        shifts[c] = bias.value(0.0f);
      }
    };

    // Of all blocks' moments, by one warp.
    [[maybe_unused]] const auto merge_channels = [&] {
      __syncwarp();  // the marks are there for all lanes
      const int blocks = blocks_x * gridDim.y * gridDim.z;
#pragma unroll 1
      for (int i = linear_block(); i < p.batch * p.out_channels; i += blocks) {
        const int of = i / p.out_channels;
        const int channel = i - of * p.out_channels;
        const float2 moments = merge_channel(p, s, norm, sample_blocks, of, channel);
        if (lane == 0) publish(merged(p, s, of) + channel, moments);
      }
    };
    if (role == 0) {
      if (lane == 0) {
        int stage = 0;
        uint32_t parity = 1;
        for (int tile = begin;;) {
          const int row = at.phase * p.out_channels + multiplied_column;
          int tap = 0, channel = first_channel;
          for (int i = 0; i < steps; ++i) {
            const bool raw = kSplit && !s.split_before;
            uint64_t* there = raw ? &weight_raw[stage] : &weight_full[stage];
            if (kLean == 0 || i >= first_weights || tile > begin) {
              mbarrier_wait(&weight_empty[stage], parity);
              mbarrier_arrive_expect(there, raw ? kColumns * kChunk : Traits::kWeightBytes);
              const uint32_t to = weight_ring + stage * Traits::kWeightBytes;
              load_weights(to, &weights, channel, tap, row, there);
              if constexpr (kSplit) {
                if (s.split_before) load_weights(to + kColumns * kChunk, &weights_lo, channel, tap, row, there);
              }
            }
            if (++tap == taps) {
              tap = 0;
              channel += kElements;
            }
            if (++stage == s.weight_stages) {
              stage = 0;
              parity ^= 1;
            }
          }
          if (++tile == end) break;
          at = tile_at(tile);
        }
      }
      __syncwarp();
    } else if (splits) {
      if constexpr (kSplit) {
        if (marks) {  // while the first weights are on their way
          put_marks();
          load_norm();
          __syncwarp();
        }
        const int splitter = threadIdx.x - Traits::kConsumers - 2 * kWarp;
        int stage = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int i = steps * (end - begin); i > 0; --i) {
          mbarrier_wait(&weight_raw[stage], parity);
          split_weights<kColumns * kChunk, Traits::kSplitters>(ring + stage * Traits::kWeightBytes, splitter);
          fence_async_shared();
          mbarrier_arrive(&weight_full[stage]);
          if (++stage == s.weight_stages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    } else if (role == 1 || (!kSplit && !boxes_only)) {
      // The first thread brings the box, or all move some pixels at a time, each its 16 bytes within the pixel.
      // Or the box, and then what lies outside of the picture from within the box.
      const int loader = threadIdx.x - Traits::kConsumers - 32;
      const int piece = loader % 8;
      const int pixels = s.halo_height * s.halo_width;
      int stage = 0;
      uint32_t parity = 1, box_parities = 0;
      for (int tile = begin;;) {
        const int top = top_of(), left = left_of();
        const bool boxes = takes_boxes();
        HaloEdges edges;
        if (!boxes) edges.set(p, s, at, top, left);
        // Found before the first box is there: of a tile of 16 x 8 pixels and a padding of 1 these are all.
        constexpr int kMended = Traits::kBlocks == 2 ? 0 : 3;
        uint32_t mended[kMended + 1];  // no array is empty
#pragma unroll
        for (int i = 0; i < kMended; ++i) {
          mended[i] = boxes ? HaloEdges::kNone : edges.find(p, s, loader / 8 + i * (kLoaders / 8));
        }
        const T* sample = static_cast<const T*>(p.input) + static_cast<int64_t>(n) * p.height * p.width * p.in_channels;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          const uint32_t to = input_ring + stage * s.halo_bytes;
          // Not for the first, which may have been multiplied by now: its barrier would be a phase further.
          if (kLean == 0 || chunk >= first_boxes || tile > begin) mbarrier_wait(&input_empty[stage], parity);
          __syncwarp();
          if (!boxes && edges.within) {
            if (loader == 0) {
              mbarrier_arrive_expect(&box_full[stage], pixels * kChunk);
              load_box(to, &input, first_channel + chunk * kElements, left, top, n, &box_full[stage]);
            }
            mbarrier_wait(&box_full[stage], box_parities >> stage & 1);
            box_parities ^= 1u << stage;
            unsigned char* box = ring + (to - weight_ring);
#pragma unroll
            for (int i = 0; i < kMended; ++i) HaloEdges::copy(box, mended[i], piece);
            for (int i = loader / 8 + kMended * (kLoaders / 8); i < edges.outside(s); i += kLoaders / 8) {
              HaloEdges::copy(box, edges.find(p, s, i), piece);
            }
            fence_async_shared();
            mbarrier_arrive(&input_full[stage]);
          } else if (!boxes) {
            const int channel = first_channel + chunk * kElements + piece * (16 / static_cast<int>(sizeof(T)));
            const bool valid = channel < p.in_channels;
            const T* from = sample + (valid ? channel : 0);
#pragma unroll 2
            for (int pixel = loader / 8; pixel < pixels; pixel += kLoaders / 8) {
              const int y = __umulhi(pixel, s.halo_divisor);
              const int x = pixel - y * s.halo_width;
              const int sy = padded_source(top + y, p.height, p.mode);
              const int sx = padded_source(left + x, p.width, p.mode);
              copy_async(to + pixel * kChunk + ((piece ^ (pixel & 7)) << 4), from + (sy * p.width + sx) * p.in_channels,
                         valid);
            }
            copy_async_arrive(&input_full[stage]);
          } else if (kLean > 0 && loader == 0) {
            if (chunk >= first_boxes || tile > begin) bring_box(stage, chunk, left, top);
          } else if (loader == 0) {
            mbarrier_arrive_expect(&input_full[stage], pixels * kChunk);
            if (kShare > 1 || s.same_input == 1) {
              load_box(to, &input, first_channel + chunk * kElements, left, top, n, &input_full[stage]);
            } else if ((chunk & (neighbours - 1)) == neighbour) {
              load_box_for((1u << neighbours) - 1, to, &input, chunk * kElements, left, top, n, &input_full[stage]);
            }
          } else if (!boxes_only) {
            mbarrier_arrive(&input_full[stage]);
          }
          if (++stage == s.input_stages) {
            stage = 0;
            parity ^= 1;
          }
          // Loads first: the others wait for them, and the marks' way to memory is waited for.
          if (marks && chunk == 0 && tile == begin) put_marks();
        }
        if (++tile == end) break;
        at = tile_at(tile);
      }
    } else if (marks) {
      // First loads would have to wait for the marks' way to memory: 0.3 us, which a short tile waits longer for marks.
      if (!s.marks_first) mbarrier_wait(&started, 0);
      put_marks();
    }
    __syncwarp();
    if (marks && !splits) load_norm();
    release_successor();
    [[maybe_unused]] bool goes = true;
    if (marks) {
      if (lane == 0) {
        if (is_gated()) {
          goes = gate_opens(&gates[gate.place], token, all_blocks(), gate.nanoseconds);
          called_off = !goes;
        } else {
          grid_wait(token);
        }
      }
      mbarrier_arrive(&marked);
    }
    if constexpr (kLeanMerged) {
      if (marks && s.merge_apart && __shfl_sync(0xffffffffu, goes, 0)) merge_channels();
    }
  } else {
    if constexpr (Traits::kMoveRegisters)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    using Mma = Wgmma<KindOf<T>::kKind, kColumns>;
    float d[kColumns / 2];
    uint32_t fragments[Traits::kSets][4][4];
    uint32_t rest[kSplit ? 2 : 1][4][4];  // kSplit: what the fragments' TF32 numbers leave out
    const int half = lane / 16;
    const int halo_width = kSide > 0 ? ConvSchedule::kTileWidth - 1 + kSide : s.halo_width;
    const int base =
        kSide > 0 ? warp * halo_width + lane % 16 : warp * p.stride_h * halo_width + lane % 16 * p.stride_w;
    const uint32_t weight_full_at = shared_address(weight_full), weight_empty_at = shared_address(weight_empty);
    const uint32_t input_full_at = shared_address(input_full), input_empty_at = shared_address(input_empty);
    int input_stage = 0, weight_stage = 0, last_stage = 0;
    uint32_t input_parity = 0, weight_parity = 0;
    // Where the warp's row of tile `i` of the block lies. The last tile's take the place of the rings; without the norm
    // the others come after each other in one place.
    const auto stash = [&](int tile) {
      const int held = is_resident() ? tile - begin : 0;
      const int offset = tile + 1 == end ? 0 : s.stash_offset + held * Traits::kRows * Traits::kStoreBytes;
      return ring + offset + warp * Traits::kStoreBytes;
    };

    // The fragments of the tap `offset` pixels from the first one in the halo.
    const auto load_tap = [&](uint32_t (&a)[4][4], int offset) {
      const int pixel = base + offset;
      // 16-byte piece 2 k + half of the pixel, swizzled: 2 k only turns bits over.
      const uint32_t row = input_ring + input_stage * s.halo_bytes + pixel * kChunk + (((pixel & 7) ^ half) << 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) load_matrix(a[k], row ^ (k << 5));
    };
    const auto wait_for_input = [&] { mbarrier_wait(input_full_at + 8 * input_stage, input_parity); };
    const auto has_started = [&] {
      if (threadIdx.x == 0) mbarrier_arrive(&started);
    };
    const auto release_input = [&](int stage) {
      __syncwarp();
      mbarrier_arrive(input_empty_at + 8 * stage);  // every lane for what it has read: racecheck follows that
    };
    const auto next_input = [&] {
      if (++input_stage == s.input_stages) {
        input_stage = 0;
        input_parity ^= 1;
      }
    };
    int r = 0, c = 0;
    const auto load_next = [&](uint32_t (&a)[4][4]) {
      if (r == 0 && c == 0) wait_for_input();
      load_tap(a, r * halo_width + c);
      if (++c == p.kernel_w) {
        c = 0;
        if (++r == p.kernel_h) {
          r = 0;
          release_input(input_stage);
          next_input();
        }
      }
    };
    const auto weight_descriptor = [&]<bool kFirstTile>() {
      mbarrier_wait(weight_full_at + 8 * weight_stage, weight_parity);
      uint32_t at = weight_ring + weight_stage * Traits::kWeightBytes;
      if constexpr (!kFirstTile || (kSide == 0 && kGroups == 1 && !kSplit)) at = __shfl_sync(0xffffffffu, at, 0);
      return wgmma_descriptor(at);
    };
    const auto release_weights = [&](int stage) {
      if (lane == 0) mbarrier_arrive(weight_empty_at + 8 * stage);
    };
    const auto next_weights = [&] {
      last_stage = weight_stage;
      if (++weight_stage == s.weight_stages) {
        weight_stage = 0;
        weight_parity ^= 1;
      }
    };

    const auto run_tile = [&]<bool kFirstTile>(int tile) {
    // Not for the product, which begins anew, but for the compiler: it would keep the last tile's until here.
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) d[i] = 0;
      if constexpr (kSplit) {
        const auto load_split = [&](uint32_t (&hi)[4][4], uint32_t (&lo)[4][4]) {
          load_next(hi);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float v = __uint_as_float(hi[k][i]);
              hi[k][i] = round_tf32(v);
              lo[k][i] = round_tf32(v - __uint_as_float(hi[k][i]));
            }
          }
        };
        float total[kColumns / 2];
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) total[i] = 0;
        const auto multiply = [&](int set, bool more) {
          const uint64_t b = weight_descriptor.template operator()<kFirstTile>();
          const uint64_t b_lo = b + (kColumns * kChunk >> 4);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) Mma::run(d, rest[set][k], b + 2 * k, k > 0);
#pragma unroll
          for (int k = 0; k < 4; ++k) Mma::run(d, fragments[set][k], b_lo + 2 * k, true);
#pragma unroll
          for (int k = 0; k < 4; ++k) Mma::run(d, fragments[set][k], b + 2 * k, true);
          wgmma_commit();
          if (more) load_split(fragments[set ^ 1], rest[set ^ 1]);
          wgmma_wait<0>();
          release_weights(weight_stage);
          next_weights();
#pragma unroll
          for (int i = 0; i < kColumns / 2; ++i) total[i] += d[i];
        };
        load_split(fragments[0], rest[0]);
        if constexpr (kFirstTile) has_started();
        for (int i = 0; i < steps; i += 2) {
          multiply(0, i + 1 < steps);
          if (i + 1 < steps) multiply(1, i + 2 < steps);
        }
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) d[i] = total[i];
      } else {
        const auto multiply = [&](uint32_t (&a)[4][4], bool first) {
          const uint64_t b = weight_descriptor.template operator()<kFirstTile>();
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) Mma::run(d, a[k], b + 2 * k, k > 0 || !first);
          wgmma_commit();
          wgmma_wait<1>();  // the group before this one is done with its fragments and its weights
          if (!first) release_weights(last_stage);
          next_weights();
        };
        if constexpr (kSide > 0) {
          // Unrolled over the taps; where their number is no multiple of the sets of fragments, these change roles from
          // chunk to chunk.
          constexpr int kTaps = kSide * kSide;
          constexpr int kSets = Traits::kSets;
          constexpr int kAhead = kSets - 1;
          static_assert(kTaps % kSets == 0 || (kSets == 2 && kTaps % 2 == 1));
          // Two copies of the taps, one for each role, leave two blocks of 64 columns too few registers: the compiler
          // then waits for every single product (C7512). So a chunk begins anew, with its first fragments in the first
          // set.
          constexpr bool kAnew = kLean > 0 && kTaps % kSets != 0 && Traits::kBlocks == 2;
          const auto multiply_chunk = [&]<int kFirst>(int chunk) {
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
              multiply(fragments[(kFirst + tap) % kSets], tap == 0 && chunk == 0);
              const int next = tap + kAhead;
              if (next == kTaps) {  // the chunk's last fragments are in registers
                release_input(input_stage);
                next_input();
              }
              if (next < kTaps) {
                load_tap(fragments[(kFirst + next) % kSets], next / kSide * halo_width + next % kSide);
              } else if (!kAnew && chunk + 1 < chunks) {
                if (next == kTaps) wait_for_input();
                load_tap(fragments[(kFirst + next) % kSets],
                         (next - kTaps) / kSide * halo_width + (next - kTaps) % kSide);
              }
            }
          };
          wait_for_input();
          if constexpr (kFirstTile) has_started();
#pragma unroll
          for (int tap = 0; tap < kAhead; ++tap) {
            load_tap(fragments[tap], tap / kSide * halo_width + tap % kSide);
          }
          for (int chunk = 0; chunk < chunks; ++chunk) {
            if constexpr (kAnew) {
              if (chunk > 0) {
                wgmma_wait<0>();
                wait_for_input();
                load_tap(fragments[0], 0);
              }
            }
            if (kAnew || kTaps % kSets == 0 || chunk % 2 == 0) {
              multiply_chunk.template operator()<0>(chunk);
            } else {
              multiply_chunk.template operator()<1>(chunk);
            }
          }
        } else {
          constexpr int kSets = Traits::kSets;
#pragma unroll
          for (int set = 0; set + 1 < kSets; ++set) {
            if (set < steps) load_next(fragments[set]);
          }
          if constexpr (kFirstTile) has_started();
          if constexpr (kSets == 2) {
            for (int i = 0; i < steps; i += 2) {
              multiply(fragments[0], i == 0);
              if (i + 1 < steps) {
                load_next(fragments[1]);
                multiply(fragments[1], false);
                if (i + 2 < steps) load_next(fragments[0]);
              }
            }
          } else {
            for (int i = 0; i < steps; i += kSets) {
#pragma unroll
              for (int set = 0; set < kSets; ++set) {
                if (i + set >= steps) break;
                multiply(fragments[set], set == 0 && i == 0);
                if (i + set + kSets - 1 < steps) load_next(fragments[(set + kSets - 1) % kSets]);
              }
            }
          }
        }
        wgmma_wait<0>();
        release_weights(last_stage);
      }

      // This lane's two pixels and their columns: d[4 i + {0, 1}] at x = lane / 4, d[4 i + {2, 3}] at x + 8.
      const ConvTileAt at = tile_at(tile);
      const int x = lane / 4;
      [[maybe_unused]] const bool row_valid = warp < at.rows;
      if (tile + 1 == end) {
        release_successor();
        if constexpr (kLean == 0) {
          if (s.resident) mbarrier_wait(&marked, 0);
        }
        // The rings are free: everything loaded has been multiplied, in every consumer warp after the barrier.
        named_barrier(kConsumerBarrier, Traits::kConsumers);
      }
      [[maybe_unused]] float kept[kShare > 1 ? kOut / 2 : 1];
      if constexpr (kShare > 1) {
        share_sums<kColumns, Traits::kConsumers>(d, kept, rank, ring + s.sums_offset, &shared_sums);
      }
      const auto sum = [&](int i) {
        if constexpr (kShare > 1) {
          return kept[i];
        } else {
          return d[i];
        }
      };
      unsigned char* own = stash(tile);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < kOut / 8; ++i) {
          const float pair[2] = {sum(4 * i + 2 * h), sum(4 * i + 2 * h + 1)};
          *reinterpret_cast<Vec<T, 2>*>(own + (x + 8 * h) * Traits::kStorePitch +
                                        (8 * i + 2 * (lane % 4)) * static_cast<int>(sizeof(T))) = rounded<T>(pair);
        }
      }

      // A column's moments go with those of the block's other tiles, and the last tile's to the others.
      [[maybe_unused]] const auto give = [&](int column, float2 moments) {
        if constexpr (!kFirstTile) {
          const float2 held = statistics[column];
          const float before = static_cast<float>((tile - begin) * Traits::kRows * ConvSchedule::kTileWidth);
          const float share = __fdividef(1.0f, static_cast<float>(tile - begin + 1));
          const float d = moments.x - held.x;
          moments.x = held.x + d * share;
          moments.y += held.y + d * d * (before * share);
        }
        if (tile + 1 == end) {
          publish(entry_of(block) + first_column + column, moments);
        } else {
          statistics[column] = moments;
        }
      };
      // Those of the warps' rows, for one thread a column to merge.
      using ListedMoments = TileMoments<T, kOut, Traits::kRows>;
      [[maybe_unused]] const auto list_moments = [&] {
        float2* parts = reinterpret_cast<float2*>(ring + s.parts_offset);
        named_barrier(kConsumerBarrier, Traits::kConsumers);
        ListedMoments::write_parts(own - warp * Traits::kStoreBytes, at, parts);
        named_barrier(kConsumerBarrier, Traits::kConsumers);
        return parts;
      };
      if constexpr (kMmaMoments) {
        using Moments = MmaMoments<T, kOut, Traits::kRows>;
        named_barrier(kConsumerBarrier, Traits::kConsumers);
        if (warp < Moments::kBusy) {
          float2 moments[Moments::kLists];
          Moments::find(own - warp * Traits::kStoreBytes, warp, lane, moments);
          if (tile + 1 == end) mbarrier_wait(&own_marked, 0);
          if (Moments::owns(lane)) {
#pragma unroll
            for (int list = 0; list < Moments::kLists; ++list) give(Moments::column(warp, lane, list), moments[list]);
          }
        }
      } else if constexpr (kLean > 0) {
        float2* parts = list_moments();
        const int column = threadIdx.x;
        if (tile + 1 == end) mbarrier_wait(&own_marked, 0);
        if (column < kOut) give(column, ListedMoments::merge(parts + column, at));
      } else if (p.moments != nullptr) {
        float2* parts = list_moments();
        const int column = threadIdx.x;
        if (column < kOut && first_column + column < p.out_channels) {
          const float2 whole = ListedMoments::merge(parts + column, at);
          float tile_mean = whole.x, tile_m2 = whole.y;
          if constexpr (!kFirstTile) {
            if (s.resident) {
              const float2 held = statistics[column];
              const float before = static_cast<float>(pixels_of(p, s, begin, tile));
              const float own = static_cast<float>(at.rows * at.columns);
              const float d_mean = tile_mean - held.x;
              const float share = own * __frcp_rn(before + own);
              tile_mean = held.x + d_mean * share;
              tile_m2 += held.y + d_mean * d_mean * (before * share);
            }
          }
          if (!s.resident || tile + 1 == end) {
            const int partial = s.resident ? block : tile;
            float2* to =
                p.moments + (static_cast<int64_t>(n) * partials(s) + partial) * p.out_channels + first_column + column;
            if (s.resident) {
              publish(to, make_float2(tile_mean, tile_m2));
            } else {
              *to = make_float2(tile_mean, tile_m2);
            }
          } else {
            statistics[column] = make_float2(tile_mean, tile_m2);
          }
        }
      }

      __syncwarp();
      if constexpr (kLean == 0) {
        if (!s.resident && p.out_channels % kFullWidth<T> == 0) {
          RowOut<T, kOut>(p, n, first_column, at, warp).write(p, own);
        } else if (!s.resident && row_valid) {  // out_channels is even
          const int columns = min(kOut, p.out_channels - first_column);
          const RowOut<T, kOut> out(p, n, first_column, at, warp);
          T* output = static_cast<T*>(p.output) + out.at - out.column;
#pragma unroll 1
          for (int i = lane; i < kOut / 2 * at.columns; i += 32) {
            const int pixel = i / (kOut / 2);
            const int column = i % (kOut / 2) * 2;
            if (column >= columns) continue;
            *reinterpret_cast<Vec<T, 2>*>(output + static_cast<int64_t>(pixel) * out.pixel_pitch + column) =
                *reinterpret_cast<const Vec<T, 2>*>(own + pixel * Traits::kStorePitch +
                                                    column * static_cast<int>(sizeof(T)));
          }
        }
      }
    };
    // The first tile apart: in a loop the compiler does not know that the warps' threads stay together, and brings each
    // descriptor to uniform registers anew, two instructions before every wgmma (8.8 -> 10.2 us on 1x128x32x32, TF32).
    run_tile.template operator()<true>(begin);
    if constexpr (kShare == 1) {  // who share have one
      for (int tile = begin + 1; tile < end; ++tile) run_tile.template operator()<false>(tile);
    }
    if (!is_resident()) return;
    if constexpr (kLean > 0) mbarrier_wait(&marked, 0);  // every thread, for what comes with it: the norm's parameters

    // Behind the last tile's list of moments, which other warps may still read.
    float2* sums = reinterpret_cast<float2*>(ring + s.parts_offset) + Traits::kRows * kOut;
    const auto barrier = [] { named_barrier(kConsumerBarrier, Traits::kConsumers); };
    using Out = RowOut<T, kOut>;
    using OutNchw = RowOutNchw<T, kOut>;
    [[maybe_unused]] const auto write_out = [&](int of, int columns, int tile, const unsigned char* from) {
      if (!norm.output_channels_last) {
        const OutNchw out(p, of, columns, tile_at(tile), warp);
        out.template write_runs<false>(norm, statistics, shifts, from);
        return;
      }
      const Out out(p, of, columns, tile_at(tile), warp);
      const typename Out::Affine affine(statistics, shifts, out.column);
      if constexpr (sizeof(T) == 2) {
        if (norm.activation == Activation::kRelu && norm.residual == nullptr) {
          out.normalize_relu(p, affine, from);
          return;
        }
      }
      out.template normalize<false>(p, norm, affine, from);
    };
    if constexpr (kMayBeGated) {
      if (is_gated() && called_off) {
#pragma unroll 1
        for (int tile = begin; tile < end; ++tile) {
          __syncwarp();
          if (norm.output_channels_last) {
            Out(p, n, first_column, tile_at(tile), warp).write(p, stash(tile));
          } else {
            OutNchw(p, n, first_column, tile_at(tile), warp).write(static_cast<T*>(p.output), stash(tile));
          }
        }
        __threadfence();
        barrier();
        if (threadIdx.x == 0) called_off = gate_leave(&gates[gate.place], all_blocks());
        barrier();
        if (!called_off) return;
        // The last one, for all.
        unsigned char* own = stash(end - 1);
#pragma unroll 1
        for (int of = 0; of < p.batch; ++of) {
#pragma unroll 1
          for (int columns = 0; columns < p.out_channels; columns += kOut) {
            barrier();
            if (threadIdx.x < kOut) {
              const int64_t param = of * norm.param_batch_stride + columns + threadIdx.x;
              scales[threadIdx.x] = load_param(norm.weight, norm.param_dtype, param, 1.0f);
              shifts[threadIdx.x] = load_param(norm.bias, norm.param_dtype, param, 0.0f);
            }
            barrier();
            if constexpr (!kLeanMerged) {
              merge_tiles<kOut, Traits::kConsumers, true>(p, s, norm, of, columns, scales[threadIdx.x % kOut], sums,
                                                          statistics, barrier);
            } else if (s.merge_apart) {
#pragma unroll 1
              for (int c = warp; c < kOut; c += Traits::kRows) {
                const float2 moments = merge_channel(p, s, norm, sample_blocks, of, columns + c);
                if (lane == 0) statistics[c] = moments;
              }
            } else {
              merge_pairs<kOut, Traits::kConsumers>(p, s, norm, sample_blocks, of, columns, scales, sums, statistics,
                                                    barrier);
            }
            barrier();
#pragma unroll 1
            for (int tile = 0; tile < s.entries; ++tile) {
              if (norm.output_channels_last) {
                Out(p, of, columns, tile_at(tile), warp).read(p, own);
              } else {
                OutNchw(p, of, columns, tile_at(tile), warp).read(static_cast<const T*>(p.output), own);
              }
              __syncwarp();
              write_out(of, columns, tile, own);
              __syncwarp();
            }
          }
        }
        if (threadIdx.x == 0) gate_reset(&gates[gate.place]);
        return;
      }
    }
    if constexpr (kLeanMerged) {
      const bool apart = s.merge_apart;
      if (!apart) {
        merge_pairs<kOut, Traits::kConsumers>(p, s, norm, sample_blocks, n, first_column, scales, sums, statistics,
                                              barrier);
      }
      // By few threads: everyone asks for the same few lines. What `statistics` held before is in these moments.
      if (apart && threadIdx.x < kOut / 2) {
        await_merged(merged(p, s, n) + first_column + 2 * threadIdx.x, statistics + 2 * threadIdx.x);
      }
      barrier();
#pragma unroll 1
      for (int tile = begin; tile < end; ++tile) write_out(n, first_column, tile, stash(tile));
    } else {
      if (s.merge_apart) {
        const int slices = p.out_channels / kMergeSlice;
        const int blocks = blocks_x * gridDim.y * gridDim.z;
        // A block has one slice, or none, but for large batches.
#pragma unroll 1
        for (int i = linear_block(); i < p.batch * slices; i += blocks) {
          const int of = i / slices;
          const int first = (i - of * slices) * kMergeSlice;
          const float scale = load_param(norm.weight, norm.param_dtype,
                                         of * norm.param_batch_stride + first + threadIdx.x % kMergeSlice, 1.0f);
          merge_tiles<kMergeSlice, Traits::kConsumers, true, true>(p, s, norm, of, first, scale, sums,
                                                                   merged(p, s, of) + first, barrier);
          barrier();
        }
        const int column = threadIdx.x;
        if (column < kOut && first_column + column < p.out_channels) {
          statistics[column] = await(merged(p, s, n) + first_column + column);
        }
      } else {
        merge_tiles<kOut, Traits::kConsumers, true>(p, s, norm, n, first_column, scales[threadIdx.x % kOut], sums,
                                                    statistics, barrier);
      }
      barrier();
#pragma unroll 1
      for (int tile = begin; tile < end; ++tile) {
        if constexpr (kLean > 0) {
          write_out(n, first_column, tile, stash(tile));
        } else {
          const ConvTileAt at = tile_at(tile);
          if (!norm.output_channels_last) {
            const OutNchw out(p, n, first_column, at, warp);
            if (p.out_width % kFullWidth<T> == 0) {
              out.template write_runs<true>(norm, statistics, shifts, stash(tile));
            } else {
              out.write_elements(norm, statistics, shifts, stash(tile));
            }
            continue;
          }
          const Out out(p, n, first_column, at, warp);
          const typename Out::Affine affine(statistics, shifts, out.column);
          if (is_piecewise(norm.activation)) {
            out.template normalize<false>(p, norm, affine, stash(tile));
          } else {
            out.template normalize<true>(p, norm, affine, stash(tile));
          }
        }
      }
    }
  }
#endif
}

}  // namespace
}  // namespace styleforge::cuda
