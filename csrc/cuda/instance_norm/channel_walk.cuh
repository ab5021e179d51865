// How the stream path in channels_last (stream_channels_last.cu) cuts a tensor, and the way of a block through its
// tiles.
#pragma once

#include <cstdint>

#include "../common/mbarrier.cuh"
#include "../common/reduce.cuh"
#include "kernels.h"

namespace styleforge::cuda {

struct ChannelCut {
  int vectors;   // 16 bytes each, of a (combined) pixel
  int lanes;     // of a slice
  int slices;    // of a sample
  int units;     // samples x slices
  int channels;  // of a slice, the last one may have fewer
  int rows;      // (combined) pixels of a sample
  int share;     // of a tile, a unit's last one may have fewer
  int tiles;     // of a unit
  int slots;     // parts of a unit: blocks that have tiles of it
  int copies_log2;
  int stages;
  int held;   // tiles of a unit that a block keeps
  int ahead;  // tiles on their way at a time
  int stage_bytes;
  bool direct;         // blocks merge all channels for themselves
  bool read_once;      // what is loaded for the last time is the first that the L2 cache lets go
  bool keep;           // what is loaded for the first of two times is the last
  bool stream_stores;  // stores are the first, too
};

#ifdef STYLEFORGE_HAS_BULK_COPY

// The block's tiles in the order in which they are loaded. Every role walks along.
struct Walk {
  const ChannelCut& cut;
  int blocks, base, extra, turn;
  int unit = -1, sample = 0, slice = -1;
  int slot;       // of the block in the unit: the number of its first tile
  int owned = 0;  // tiles that the block has of the unit
  int step = -1, again = 0;
  // the current one
  int tile = 0;
  bool counts = false, finishes = false;
  bool closes = false;  // the block's last tile of the unit that counts
  int stage = 0;
  uint32_t parity = 0;
  int used = 0;

  __device__ __forceinline__ explicit Walk(const ChannelCut& cut)
      : cut(cut),
        blocks(static_cast<int>(gridDim.x)),
        base(cut.tiles / blocks),
        extra(cut.tiles - base * blocks),
        slot(static_cast<int>(blockIdx.x) + extra) {
    if (slot >= blocks) slot -= blocks;
  }

  // The next unit; false: no more. The block may have no tiles of it.
  __device__ __forceinline__ bool next_unit() {
    if (unit + 1 >= cut.units) return false;
    ++unit;
    if (++slice == cut.slices) {
      slice = 0;
      ++sample;
    }
    slot -= extra;
    if (slot < 0) slot += blocks;
    owned = base + (slot < extra ? 1 : 0);
    again = max(owned - cut.held, 0);
    step = -1;
    return true;
  }
  // The next of its tiles; false: no more.
  __device__ __forceinline__ bool next_tile() {
    if (step + 1 >= owned + again) return false;
    ++step;
    if (used++ > 0 && ++stage == cut.stages) {
      stage = 0;
      parity ^= 1;
    }
    counts = step < owned;
    finishes = step >= again;
    closes = step == owned - 1;
    tile = slot + (counts ? step : again - 1 - (step - owned)) * blocks;
    return true;
  }
  __device__ __forceinline__ int first_row() const { return tile * cut.share; }
  __device__ __forceinline__ int row_count() const { return min(cut.share, cut.rows - first_row()); }
  // of the slice
  __device__ __forceinline__ int lanes() const { return min(cut.lanes, cut.vectors - slice * cut.lanes); }
};

__device__ __forceinline__ uint64_t cache_policy(bool first, bool last) {
  uint64_t policy;
  if (first) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else if (last) {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}
__device__ __forceinline__ void store_hinted(uint4* to, const uint4& v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void load_span(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void load_slice(void* to, const CUtensorMap* map, int channel, int pixel, int sample,
                                           uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(channel), "r"(pixel), "r"(sample), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

#endif  // STYLEFORGE_HAS_BULK_COPY

}  // namespace styleforge::cuda
