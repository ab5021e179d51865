// How a block of wide_sm90.cuh is made up, and which tiles it takes (that of wide_gradient_sm90.cuh as well).
#pragma once

#include "../common/launch.h"
#include "boxes.cuh"
#include "launch.h"

namespace styleforge::cuda {

constexpr int kWideRows = 128;
constexpr int kNarrowColumns = 64;  // of the last tiles, where they are cut up
// Stages of a tile that the first half of its columns is multiplied with while the second half of the tile before it
// goes through GELU (kGelu).
constexpr int kGeluAhead = 2;
constexpr int kWideABytes = kWideRows * kBoxRowBytes;

// How a block is made up, by the warps of the way out. 3: a fourth one loads, and a tile's columns are one instruction,
// which is not to be had with more than 384 threads. 4: another warpgroup loads, and 256 columns are two instructions,
// which read a twice.
template <typename T, int kColumns, int kLinesWarps>
struct Wide {
  static constexpr int kWayOut = 256;  // its first thread
  static constexpr int kLoader = kWayOut / 32 + kLinesWarps;
  static constexpr int kThreads = kLinesWarps == 3 ? 384 : 512;
  static constexpr int kHalves = kLinesWarps == 3 ? 1 : 2;  // of a tile's columns, an instruction each
  // Registers: all together no more than the threads have at the launch, at most 65536.
  static constexpr int kConsumerRegisters = kLinesWarps == 3 ? 184 : 160;
  static constexpr int kLinesRegisters = kLinesWarps == 3 ? 136 : 152;
  static constexpr int kLoaderRegisters = 40;  // of a warpgroup of its own

  static constexpr int kStageBytes = kWideABytes + kColumns * kBoxRowBytes;
  static constexpr int kBoxes = kColumns / kBoxNumbers<T>;  // of a tile's 64 rows
  static constexpr int kNarrowBoxes = kNarrowColumns / kBoxNumbers<T>;
  // Boxes of products that find room on their way out. With four warps there each warpgroup has places, and two of the
  // warps, of its own: one fills a place and one empties it, in turns, an even number of times a tile, so that a
  // barrier's phase follows from the box (of a block's narrow tile, its last one, as well). Else there are as many
  // places as 64 rows have boxes, for the upper rows of a tile and then for the lower ones. Then every box has barriers
  // of its own, those of a narrow tile too, which lie in other places: where two warpgroups use one barrier by turns,
  // one of them may come two phases late or early, and takes that for the right one.
  static constexpr bool kOwnPlaces = kHalves == 2;
  static constexpr int kOwn = 2;
  static constexpr int kPlaces = kOwnPlaces ? 2 * kOwn : kBoxes;
  static constexpr int kBarriers = kOwnPlaces ? kPlaces : 2 * (kBoxes + kNarrowBoxes);
  static_assert(!kOwnPlaces || (kLinesWarps == 4 && kBoxes % (2 * kOwn) == 0));
  static_assert(kOwnPlaces || (kBoxes % kLinesWarps == 0 && kBoxes >= 2 * kNarrowBoxes));
  static constexpr bool kSharedBias = kHalves == 2 && sizeof(T) == 2;  // biases of a tile in shared memory
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

// The loader's way through a block's tiles: boxes of b by `load_b`, of a here, into a ring of stages.
template <typename TileOf, typename LoadB>
__device__ __forceinline__ void load_wide_tiles(const GemmParams& p, const GemmSchedule& s, const CUtensorMap* a_map,
                                                uint32_t ring, int stage_bytes, uint32_t full_at, uint32_t empty_at,
                                                int tiles, int chunks, int width, const TileOf& tile_of,
                                                const LoadB& load_b) {
  const int first_tile = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
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
      load_box(ring + stage * stage_bytes, a_map, chunk * width, tile.row, full_at + 8 * stage);
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
  release_successor();
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  const uint4 v = load_shared16(address);
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_two(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
