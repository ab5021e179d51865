// How a tile's input and weights come to shared memory: by the copy engine in boxes (sm_90), or by cp.async where the
// padding is index arithmetic.
#pragma once

#include "../common/mbarrier.cuh"
#include "../common/tensor_map.h"
#include "tiles.h"

namespace styleforge::cuda {

// The source coordinate of a reflected or replicated one; beyond the padding (tiles stand over) it stays inside.
__device__ __forceinline__ int padded_source(int position, int size, PaddingMode mode) {
  if (mode == PaddingMode::kReflect) position = position < 0 ? -position : min(position, 2 * (size - 1) - position);
  return min(max(position, 0), size - 1);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest of the 16 is zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
#endif

#ifdef STYLEFORGE_HAS_BULK_COPY

// Arrives once this thread's copies so far are there.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int channel, int x, int y, int n,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(channel), "r"(x), "r"(y), "r"(n), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void load_weights(uint32_t to, const CUtensorMap* map, int channel, int tap, int row,
                                             uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(map), "r"(channel), "r"(tap), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Only to the L2 cache, which all writers share: also of what another kernel still writes.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int channel, int x, int y, int n) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(channel),
               "r"(x), "r"(y), "r"(n)
               : "memory");
}

// The same for several blocks of the cluster, a bit each: to the same places in all of them, counted by their barriers.
__device__ __forceinline__ void load_box_for(uint32_t blocks, uint32_t to, const CUtensorMap* map, int channel, int x,
                                             int y, int n, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(channel), "r"(x), "r"(y), "r"(n), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// A box at the border of a reflected or replicated picture: the copy engine has left zeros where it lies outside, and
// what belongs there stands in the box, too.
struct HaloEdges {
  int top = 0, left = 0;                                // of the box, in the picture
  int above = 0, below = 0, on_left = 0, on_right = 0;  // rows and columns outside
  bool within = false;                                  // what the tile's valid pixels need stands in the box

  __device__ __forceinline__ void set(const ConvParams& p, const ConvSchedule& s, const ConvTileAt& at, int box_top,
                                      int box_left) {
    top = box_top;
    left = box_left;
    above = max(-top, 0);
    below = max(top + s.halo_height - p.height, 0);
    on_left = max(-left, 0);
    on_right = max(left + s.halo_width - p.width, 0);
    const int last_y = top + (at.rows - 1) * p.stride_h + p.kernel_h - 1;
    const int last_x = left + (at.columns - 1) * p.stride_w + p.kernel_w - 1;
    within = padded_source(top, p.height, p.mode) < top + s.halo_height &&
             padded_source(left, p.width, p.mode) < left + s.halo_width &&
             padded_source(last_y, p.height, p.mode) >= top && padded_source(last_x, p.width, p.mode) >= left;
  }

  // The i-th pixel outside and the one that belongs there: two offsets of pixels in the box, 16 bits each. kNone where
  // there is none that somebody needs.
  static constexpr uint32_t kNone = 0xffffffffu;
  __device__ __forceinline__ uint32_t find(const ConvParams& p, const ConvSchedule& s, int i) const {
    const int rows = s.halo_height - above - below;  // that are not outside as a whole
    const int whole = (above + below) * s.halo_width;
    const int sides = on_left + on_right;
    if (i >= whole + rows * sides) return kNone;
    int y, x;
    if (i < whole) {
      y = __umulhi(i, s.halo_divisor);
      x = i - y * s.halo_width;
      y += y < above ? 0 : rows;
    } else {
      y = (i - whole) / sides;
      x = i - whole - y * sides;
      x += x < on_left ? 0 : s.halo_width - sides;
      y += above;
    }
    const int from_y = padded_source(top + y, p.height, p.mode) - top;
    const int from_x = padded_source(left + x, p.width, p.mode) - left;
    if (from_y < 0 || from_x < 0 || from_y >= s.halo_height || from_x >= s.halo_width) return kNone;
    return static_cast<uint32_t>((y * s.halo_width + x) << 16 | (from_y * s.halo_width + from_x));
  }
  __device__ __forceinline__ int outside(const ConvSchedule& s) const {
    return (above + below) * s.halo_width + (s.halo_height - above - below) * (on_left + on_right);
  }
  // Its 16-byte piece `piece`, swizzled as the copy engine does it.
  static __device__ __forceinline__ void copy(unsigned char* box, uint32_t found, int piece) {
    if (found == kNone) return;
    const uint32_t to = found >> 16, from = found & 0xffff;
    *reinterpret_cast<uint4*>(box + to * 128 + ((piece ^ (to & 7)) << 4)) =
        *reinterpret_cast<const uint4*>(box + from * 128 + ((piece ^ (from & 7)) << 4));
  }
};

#endif  // STYLEFORGE_HAS_BULK_COPY

}  // namespace styleforge::cuda
