// channels_last tensors that the shared memory of all multiprocessors holds together: how they are cut, and how they
// get there (resident.cu, backward_resident.cu).
//
//   unit:     one sample, a slice of its channels (`lanes` vectors of 16 bytes), all pixels: what sums are taken of
//   block:    `share` pixels of a unit; a unit has `parts` blocks
//   thread:   lane = t % lanes owns a vector of channels; row = t / lanes owns pixels row, row + rows, ...
//
// Copies of all that a block holds leave at once (cp.async), in chunks, so that sums are taken of the first while the
// last is on its way. A thread copies what it reads, so nobody waits for the others' copies. What a block has of a
// channel is a pair of numbers that the unit's other blocks wait for; pairs say by themselves that they are there
// (common/grid.cuh), and the marks in their places are set while the copies are on their way. Launches are cooperative
// where units have several blocks.
//
// Clusters in place of the grid would hand the pairs over faster, but cover 112 to 120 of 132 multiprocessors, and
// their blocks are packed onto few of them.
#pragma once

#include "../common/cluster.cuh"
#include "../common/grid.cuh"
#include "../common/mma.cuh"
#include "channel_sums.cuh"
#include "kernels.h"

namespace styleforge::cuda {

struct ResidentCut {
  int lanes, share, parts;
  float2* pairs;  // [units, parts, channels of a slice]
};

template <int kWidth>
struct ResidentPlace {
  static constexpr int kMaxChannels = kResidentLanes * kWidth;

  int lane, row, rows;
  int part, slice, channels;  // channels of a slice, those beyond the tensor's included
  int vectors, vector;        // of a pixel, and this thread's
  bool active;
  int begin, count;  // pixels of this thread's lane in the block
  int per_chunk;     // a thread's rows in a chunk of the copies
  int64_t n, first;  // sample, and index of the lane's first vector
  float2* pairs;     // the unit's

  __device__ __forceinline__ ResidentPlace(const InstanceNormParams& p, const ResidentCut& cut) {
    lane = threadIdx.x % cut.lanes;
    row = threadIdx.x / cut.lanes;
    rows = blockDim.x / cut.lanes;
    vectors = static_cast<int>(p.channels / kWidth);
    const int slices = (vectors + cut.lanes - 1) / cut.lanes;
    const unsigned unit = blockIdx.x / static_cast<unsigned>(cut.parts);
    part = static_cast<int>(blockIdx.x - unit * cut.parts);
    n = unit / static_cast<unsigned>(slices);
    slice = static_cast<int>(unit - static_cast<unsigned>(n) * slices);
    vector = slice * cut.lanes + lane;
    active = vector < vectors;
    const int pixels = static_cast<int>(p.pixels);
    begin = min(part * cut.share, pixels);
    count = active ? min(cut.share, pixels - begin) : 0;
    per_chunk = (cut.share + rows * kChunks - 1) / (rows * kChunks);
    first = (n * p.pixels + begin) * vectors + vector;
    channels = cut.lanes * kWidth;
    pairs = cut.pairs + static_cast<int64_t>(unit) * cut.parts * channels;
  }

  static constexpr int kChunks = 4;

  // Of the thread's vector in the block's i-th pixel.
  __device__ __forceinline__ int64_t index(int i) const { return first + static_cast<int64_t>(i) * vectors; }
  // Pixels that the block of a part has.
  __device__ __forceinline__ int pixels_of(int of_part, int share, int pixels) const {
    return max(min(share, pixels - of_part * share), 0);
  }

#ifdef STYLEFORGE_HAS_CLUSTER
  // Asks for one chunk of a tensor; `held` has `lanes` vectors a pixel.
  template <typename V>
  __device__ __forceinline__ void copy(const V* held, const void* from, int chunk, int lanes) const {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(held));
#pragma unroll 2
    for (int j = 0; j < per_chunk; ++j) {
      const int i = row + (chunk * per_chunk + j) * rows;
      copy_async(to + static_cast<uint32_t>(i * lanes + lane) * sizeof(V), static_cast<const V*>(from) + index(i), true,
                 i < count);
    }
  }

  // The sums of a thread's channels over the rows of its warp, to where `sum_of_warps` finds them behind a barrier.
  __device__ __forceinline__ void sum_in_warp(float (&v)[kWidth], int lanes, float* scratch) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      for (int offset = kWarp / 2; offset >= lanes; offset /= 2) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
    }
    const int in_warp = static_cast<int>(threadIdx.x) % kWarp;
    if (in_warp >= lanes) return;
    float* to = scratch + (static_cast<int>(threadIdx.x) / kWarp * lanes + in_warp) * kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[k] = v[k];
  }
  // Of channel threadIdx.x, for the first `channels` threads; the warps in their order.
  __device__ __forceinline__ float sum_of_warps(const float* scratch) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    float sum = 0;
#pragma unroll 8
    for (int w = 0; w < warps; ++w) sum += scratch[w * channels + threadIdx.x];
    return sum;
  }

  // Calls body(chunk) for every chunk once this thread's copies of it are there.
  template <typename Body>
  __device__ __forceinline__ void chunks(Body&& body) const {
    static_assert(kChunks == 4);
    copy_wait<3>();
    body(0);
    copy_wait<2>();
    body(1);
    copy_wait<1>();
    body(2);
    copy_wait<0>();
    body(3);
  }

  // Marks this block's pairs as absent; what grid_wait takes comes back to the first thread.
  __device__ __forceinline__ uint32_t retract_pairs() const {
    if (threadIdx.x < channels) retract(&pairs[part * channels + threadIdx.x]);
    __syncthreads();
    return threadIdx.x == 0 ? grid_arrive() : 0;
  }

  // Visits the pairs of channel threadIdx.x % channels that this thread's group merges: parts by turns, several asked
  // for at a time, since each is a journey through the L2 cache.
  template <typename Visit>
  __device__ __forceinline__ void gather(int parts, Visit&& visit) const {
    constexpr int kAtOnce = 4;
    const int groups = static_cast<int>(blockDim.x) / channels;
    const int group = static_cast<int>(threadIdx.x) / channels;
    const float2* of_channel = pairs + (static_cast<int>(threadIdx.x) - group * channels);
    for (int other = group; other < parts; other += kAtOnce * groups) {
      float2 pair[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (other + u * groups < parts) pair[u] = look(of_channel + (other + u * groups) * channels);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int from = other + u * groups;
        if (from >= parts) break;
        visit(from, is_there(pair[u]) ? pair[u] : await(of_channel + from * channels));
      }
    }
  }
#endif
};

}  // namespace styleforge::cuda
