// What the files of the instance norm's schedule have in common: schedule.cu chooses a path, schedule_nchw.cu and
// schedule_channels_last.cu cut the tensor for it. Functions of the shape and the device. They return false where their
// path does not take the tensor, and may have written to the schedule then.
#pragma once

#include <algorithm>
#include <bit>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "channel_sums.cuh"
#include "kernels.h"

namespace styleforge::cuda {

// STYLEFORGE_TUNE="cluster=8,lanes=4,threads=256,shared=120000,lead=500". Of the stream path: bytes (of a tile),
// stages, grid (blocks), first (tiles of a block by its number, before it draws tickets), order (1: all by number, 2:
// as first says), prefetch (bytes of a block's first tiles), cache (1: input leaves the L2 cache first, 2: output, 3:
// both, 4: neither). In channels_last also lanes (vectors of a slice), held (tiles of a unit that a block keeps), ahead
// (tiles on their way at a time), direct (2: every block merges all statistics for itself, 1: not), units (2: units
// that a cluster holds wherever there are such, with cluster, lanes, stages, ahead, cache and grid (clusters), 1:
// never), teams (blocks in teams, this many, with lanes, stages, ahead, cache and grid (blocks)). Of the plane path:
// prefetch (blocks that do so), by bulk copies also cache, registers (2: held in registers, 1: in shared memory),
// copies (clusters of a plane, 1 or 2, where in registers). Few channels: each (vectors of a thread).
inline constexpr const char* kTuneVariable = "STYLEFORGE_TUNE";

// Shared memory that plane and slab declare statically (reductions, the parts of a cluster); the rest holds the data.
inline constexpr int64_t kStaticShared = 12 * 1024;
inline constexpr int64_t kLeastShare = 2 * 1024;

inline constexpr int64_t kMostStreamTiles = 1 << 28;

inline int round_threads(int64_t wanted, int least, int most) {
  return static_cast<int>(
      std::clamp<int64_t>(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(wanted))), least, most));
}

inline int largest_cluster(const DeviceFacts& facts, const Overrides& overrides) {
  if (!facts.has_cluster() || overrides.forced("portable")) return 1;
  return facts.major == 9 || facts.major == 10 ? 16 : 8;  // 16 is the non-portable size of the data-centre chips
}

inline bool all_aligned(const InstanceNormParams& p) {
  return aligned16(p.input) && aligned16(p.output) && aligned16(p.residual);
}

struct Shape {
  int64_t width;  // elements of a vector
  int64_t vector_bytes;
  bool vectorized;
};

inline Shape shape_of(const InstanceNormParams& p, bool aligned) {
  const int64_t element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t full = p.channels_last ? std::min<int64_t>(4, 16 / element) : 16 / element;
  const bool vectorized = aligned && (p.channels_last ? p.channels : p.pixels) % full == 0;
  return {vectorized ? full : 1, vectorized ? full * element : element, vectorized};
}

// Clusters of which every block has a multiprocessor to itself.
inline int64_t clusters_at_once(int cluster, const DeviceFacts& facts) {
  const int64_t with_cluster = cluster >= 16 ? facts.multiprocessors * 5 / 6 : facts.multiprocessors * 10 / 11;
  return with_cluster / cluster;
}

// Blocks of a cluster are packed onto few multiprocessors if they fit. Where all blocks of the grid could have one
// each, asking for more than half of its shared memory makes them.
inline int64_t spread(int64_t blocks, int cluster, const DeviceFacts& facts, const Overrides& overrides) {
  const bool fits = cluster > 1 && blocks <= clusters_at_once(cluster, facts) * cluster;
  return overrides.tuned("shared", fits ? facts.max_shared_per_block / 2 + 1024 : 0);
}

inline int lanes_for(int64_t vectors) {
  return static_cast<int>(
      std::min<int64_t>(kMaxLanes, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(vectors)))));
}

// schedule_nchw.cu
bool schedule_plane(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                    const Overrides& overrides, InstanceNormSchedule& s);

// `wanted`: asked for by name, so whether it pays is not looked at.
bool schedule_bulk_plane(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                         const Overrides& overrides, bool wanted, InstanceNormSchedule& s);
bool prefers_bulk_plane(const InstanceNormParams& p, const Shape& shape, const InstanceNormSchedule* plane);
bool schedule_stream(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                     const Overrides& overrides, bool wanted, InstanceNormSchedule& s);

bool prefers_stream(const InstanceNormParams& p, const Shape& shape, const InstanceNormSchedule* plane);

// schedule_channels_last.cu
bool schedule_channel_stream(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                             InstanceNormSchedule& s);
bool schedule_channel_cluster(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                              InstanceNormSchedule& s);
bool schedule_channel_team(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                           InstanceNormSchedule& s);
bool prefers_channel_team(const InstanceNormParams& p, const InstanceNormSchedule& s);
bool prefers_channel_cluster(const InstanceNormParams& p, const InstanceNormSchedule& s);
bool prefers_channel_stream(const InstanceNormParams& p, const InstanceNormSchedule& s);
bool schedule_few_channels(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                           InstanceNormSchedule& s);
bool schedule_slab(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                   const Overrides& overrides, InstanceNormSchedule& s);

// `tensors` of them held by all multiprocessors together.
bool schedule_resident(const InstanceNormParams& p, int tensors, const DeviceFacts& facts, const Overrides& overrides,
                       InstanceNormSchedule& s);

// The same in registers, where threads have enough of them.
bool schedule_held_channels(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                            InstanceNormSchedule& s);

// Backward: where the gradient before the norm needs no place of its own.
bool schedule_held_backward(const InstanceNormBackwardParams& p, const DeviceFacts& facts, const Overrides& overrides,
                            InstanceNormSchedule& s);

}  // namespace styleforge::cuda
