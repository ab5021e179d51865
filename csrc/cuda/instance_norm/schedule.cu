// Which path a call takes. A function of the shape and the device; how a path cuts the tensor: schedule_nchw.cu and
// schedule_channels_last.cu.
//
// Two passes: pass 2 loads its tile before it waits for pass 1 (dependent launch), 6.2 -> 5.1 us on 1x3x512x512 (H200).
#include "schedule.h"

#include <limits>

#include "channel_tiles.cuh"

namespace styleforge::cuda {
namespace {

constexpr int64_t kLeastResident = 4 << 20;  // bytes of the tensor, where slabs would do
// The same in registers. Measured (H200) against slabs: 1x128x64x64 in half 5.7 -> 4.4 us, 1x64x128x128 7.1 -> 4.9,
// 64x64x32x32, of which blocks have whole slices, 10.1 -> 7.2; 1x64x64x64 is half a megabyte, where clusters are as
// good.
constexpr int64_t kLeastHeld = 1 << 20;
constexpr int kForwardTiles = 3;  // channels_last in two passes: blocks of a multiprocessor
constexpr int kSplitThreads = 256;
constexpr int64_t kSplitShare = kSplitThreads * 8;  // vectors of one NCHW tile

// NCHW: planes are numbered in 32 bits, and each has a block of the grid at least. More of them would be cut off.
bool too_many_planes(const InstanceNormParams& p) {
  return !p.channels_last && p.batch * p.channels > std::numeric_limits<int32_t>::max();
}

void schedule_tiles(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape, int at_once,
                    const Overrides& overrides, InstanceNormSchedule& s) {
  const size_t acc = p.dtype == DType::kFloat64 ? 8 : 4;
  s.path = InstanceNormPath::kSplit;
  s.threads = kSplitThreads;
  if (!p.channels_last) {
    const int64_t vectors = p.pixels / shape.width;
    // Full tiles where they reach half of the device, else half ones.
    const bool many = p.batch * p.channels * ceil_div(vectors, kSplitShare) * 2 >= facts.multiprocessors;
    s.share = std::min(overrides.tuned("tile", many ? kSplitShare : kSplitShare / 2), vectors);
    s.parts = ceil_div(vectors, s.share);
    s.workspace_bytes = static_cast<size_t>(2 * p.batch * p.channels * s.parts) * acc;
    return;
  }
  const int64_t vectors = p.channels / shape.width;
  s.lanes = std::min(lanes_for(vectors), static_cast<int>(128 / shape.vector_bytes));
  const int64_t blocks = p.batch * ceil_div(vectors, s.lanes);
  const int64_t rows = kTileThreads / s.lanes;
  // As many blocks as are there at once, each with at least eight loads a thread.
  const int64_t wanted = std::max<int64_t>(1, overrides.tuned("tiles", at_once * facts.multiprocessors) / blocks);
  s.share = std::max(rows * 8, ceil_div(ceil_div(p.pixels, wanted), rows * 4) * rows * 4);
  s.parts = ceil_div(p.pixels, s.share);
  s.workspace_bytes = static_cast<size_t>(2 * p.batch * p.channels * (s.parts + 1)) * acc;
}

}  // namespace

cudaError_t schedule_instance_norm(const InstanceNormParams& params, InstanceNormSchedule& schedule, bool clusters) {
  if (too_many_planes(params)) return cudaErrorInvalidConfiguration;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  facts.clusters = facts.clusters && clusters;
  const Shape shape = shape_of(params, all_aligned(params));
  const Overrides overrides(kTuneVariable);
  schedule = {};
  schedule.vectorized = shape.vectorized;
  const int64_t by_clusters = overrides.tuned("units", 0);
  if (by_clusters == 2 && schedule_channel_cluster(params, facts, overrides, schedule)) return cudaSuccess;
  if (overrides.tuned("teams", 0) > 0 && schedule_channel_team(params, facts, overrides, schedule)) return cudaSuccess;
  if (overrides.forced("stream") && (schedule_channel_stream(params, facts, overrides, schedule) ||
                                     schedule_stream(params, facts, shape, overrides, true, schedule))) {
    return cudaSuccess;
  }
  if (overrides.forced("bulk") && schedule_bulk_plane(params, facts, shape, overrides, true, schedule))
    return cudaSuccess;
  const bool free = !overrides.forced("plane") && !overrides.forced("split") && !overrides.forced("ticket") &&
                    !overrides.forced("portable");
  if (free && schedule_few_channels(params, facts, overrides, schedule)) return cudaSuccess;
  if (free && params.channels_last) {
    InstanceNormSchedule other;
    other.vectorized = shape.vectorized;
    if (by_clusters == 0 && schedule_channel_team(params, facts, overrides, other) &&
        prefers_channel_team(params, other)) {
      schedule = other;
      return cudaSuccess;
    }
    other = {};
    other.vectorized = shape.vectorized;
    if (by_clusters != 1 && schedule_channel_cluster(params, facts, overrides, other) &&
        prefers_channel_cluster(params, other)) {
      schedule = other;
      return cudaSuccess;
    }
    other = {};
    other.vectorized = shape.vectorized;
    if (schedule_channel_stream(params, facts, overrides, other) && prefers_channel_stream(params, other)) {
      schedule = other;
      return cudaSuccess;
    }
  }
  const int64_t total = params.batch * params.channels * params.pixels * static_cast<int64_t>(size_of(params.dtype));
  const bool by_name = overrides.forced("resident") || overrides.forced("held");
  if (all_aligned(params) && (by_name || (free && total >= overrides.tuned("least", kLeastHeld)))) {
    InstanceNormSchedule other;
    other.vectorized = shape.vectorized;
    if (!overrides.forced("resident") && schedule_held_channels(params, facts, overrides, other)) {
      schedule = other;
      schedule.name = "instance_norm:cuda:held";
      return cudaSuccess;
    }
    // In shared memory, slices that one block holds need no exchange: slabs.
    if ((by_name || total >= kLeastResident) && schedule_resident(params, 1, facts, overrides, other) &&
        (by_name || other.parts > 1)) {
      schedule = other;
      schedule.name = "instance_norm:cuda:resident";
      return cudaSuccess;
    }
  }
  if (!overrides.forced("split") && !overrides.forced("ticket")) {
    const bool fits = params.channels_last ? schedule_slab(params, facts, shape, overrides, schedule)
                                           : schedule_plane(params, facts, shape, overrides, schedule);
    if (!overrides.forced("plane") && !overrides.forced("portable")) {
      const InstanceNormSchedule* held = fits ? &schedule : nullptr;
      InstanceNormSchedule other;
      other.vectorized = shape.vectorized;
      if ((prefers_bulk_plane(params, shape, held) &&
           schedule_bulk_plane(params, facts, shape, overrides, false, other)) ||
          (prefers_stream(params, shape, held) && schedule_stream(params, facts, shape, overrides, false, other))) {
        schedule = other;
        return cudaSuccess;
      }
    }
    if (fits) return cudaSuccess;
  }
  if (schedule_few_channels(params, facts, overrides, schedule)) return cudaSuccess;
  schedule_tiles(params, facts, shape, kForwardTiles, overrides, schedule);
  if (params.channels_last) {
    schedule.name = "instance_norm:cuda:split:channels_last";
    return cudaSuccess;
  }
  schedule.name = "instance_norm:cuda:split:nchw";
  const int64_t bytes = params.batch * params.channels * params.pixels * static_cast<int64_t>(size_of(params.dtype));
  if (bytes > facts.l2_bytes / 2 || overrides.forced("ticket")) {
    schedule.lead = std::min(params.batch * params.channels * schedule.parts,
                             std::max<int64_t>(schedule.parts, overrides.tuned("lead", 2 * facts.multiprocessors)));
    const size_t planes = static_cast<size_t>(params.batch * params.channels);
    schedule.workspace_bytes *= 2;  // at least as many bytes again as the moments of the tiles: the planes' statistics
    schedule.workspace_bytes += sizeof(unsigned) * (1 + planes);
    schedule.name = "instance_norm:cuda:split:nchw:ticket";
  }
  return cudaSuccess;
}

cudaError_t launch_instance_norm(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream) {
  switch (schedule.path) {
    case InstanceNormPath::kPlane:
      return launch_plane(params, schedule, stream);
    case InstanceNormPath::kHeldPlane:
      return launch_held_plane(params, schedule, stream);
    case InstanceNormPath::kBulkPlane:
      return launch_bulk_plane(params, schedule, stream);
    case InstanceNormPath::kChannelStream:
      return launch_channel_stream(params, schedule, workspace, stream);
    case InstanceNormPath::kChannelCluster:
      return launch_channel_cluster(params, schedule, stream);
    case InstanceNormPath::kChannelTeam:
      return launch_channel_team(params, schedule, workspace, stream);
    case InstanceNormPath::kStream:
      return launch_stream(params, schedule, workspace, stream);
    case InstanceNormPath::kSlab:
      return launch_slab(params, schedule, stream);
    case InstanceNormPath::kFewChannels:
      return launch_few_channels(params, schedule, workspace, stream);
    case InstanceNormPath::kResident:
      return launch_resident(params, schedule, workspace, stream);
    case InstanceNormPath::kHeldChannels:
      return launch_held_channels(params, schedule, workspace, stream);
    case InstanceNormPath::kSplit:
      return params.channels_last ? launch_split_channels_last(params, schedule, workspace, stream)
                                  : launch_split_nchw(params, schedule, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t schedule_instance_norm_backward(const InstanceNormBackwardParams& params, InstanceNormSchedule& schedule,
                                            bool resident) {
  if (too_many_planes(params)) return cudaErrorInvalidConfiguration;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool aligned = aligned16(params.input) && aligned16(params.residual) && aligned16(params.saved_output) &&
                       aligned16(params.grad_output) && aligned16(params.grad_input) && aligned16(params.grad_residual);
  const Shape shape = shape_of(params, aligned);
  const int64_t full = 16 / static_cast<int64_t>(size_of(params.dtype));
  const Overrides overrides(kTuneVariable);
  schedule = {};
  schedule.vectorized = shape.vectorized;
  const bool free = resident && aligned && !overrides.forced("split") && !overrides.forced("portable");
  if (free && !overrides.forced("resident") && schedule_held_backward(params, facts, overrides, schedule)) {
    schedule.name = "instance_norm_backward:cuda:held";
    return cudaSuccess;
  }
  if (free && schedule_resident(params, 2, facts, overrides, schedule)) {
    schedule.name = "instance_norm_backward:cuda:resident";
    return cudaSuccess;
  }
  Shape wide = shape;
  if (params.channels_last && shape.vectorized && params.channels % full == 0) wide = {full, 16, true};
  schedule.width = static_cast<int>(wide.width);
  schedule_tiles(params, facts, wide, kTileBlocks, overrides, schedule);
  schedule.name = params.channels_last ? "instance_norm_backward:cuda:split:channels_last"
                                       : "instance_norm_backward:cuda:split:nchw";
  return cudaSuccess;
}

cudaError_t launch_instance_norm_backward(const InstanceNormBackwardParams& params,
                                          const InstanceNormSchedule& schedule, void* workspace, cudaStream_t stream) {
  if (schedule.path == InstanceNormPath::kHeldChannels) {
    return launch_backward_held(params, schedule, workspace, stream);
  }
  if (schedule.path == InstanceNormPath::kResident) {
    return launch_backward_resident(params, schedule, workspace, stream);
  }
  return params.channels_last ? launch_backward_channels_last(params, schedule, workspace, stream)
                              : launch_backward_nchw(params, schedule, workspace, stream);
}

}  // namespace styleforge::cuda
