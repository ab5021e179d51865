// How an instance norm of channels_last tensors is cut, and which of the streams is chosen.
//
// Small tensors are bound by the chain of dependent steps, not by memory (H200, bench/tune.py): four channels a thread,
// also where 16 bytes hold eight; reads of the other blocks' parts all in flight; no division in the merge.
#include "schedule.h"

namespace styleforge::cuda {
namespace {

constexpr int64_t kLargestSlabTensor = 12 << 20;  // bytes of one sample
// Stream in channels_last: what all rings together hold comfortably, the narrowest slice (vectors: whole lines of the
// cache), the smallest tensor and unit that it is chosen for, shared memory that is declared statically, channels
// whose statistics every block merges for itself, and tiles of 16 KB that a block has on their way at a time.
constexpr int64_t kLargestUnit = 12 << 20;
constexpr int64_t kLeastLanes = 8;
constexpr int64_t kLeastChannelStream = 32 << 20;
constexpr int64_t kLeastUnit = 4 << 20;
constexpr int64_t kChannelStreamStatic = 35 * 1024;
// In clusters: the smallest unit that it is chosen for, and shared memory that is declared statically.
constexpr int64_t kLeastClusterUnit = 1 << 20;
constexpr int64_t kChannelClusterStatic = 30 * 1024;
// By teams of blocks: the smallest unit, shared memory that is declared statically, and the most teams.
constexpr int64_t kLeastTeamUnit = 512 << 10;
constexpr int64_t kChannelTeamStatic = 11 * 1024;
constexpr int64_t kMostTeams = 16;
constexpr int64_t kFewChannels = 6;
constexpr int64_t kTilesAhead = 3;
// Resident in channels_last (tuned by lanes, threads and least): vectors that a block has at least, and a thread about.
constexpr int64_t kLeastResidentVectors = 256;
constexpr int64_t kResidentVectors = 4;
constexpr int64_t kMostGridRows = 65535;  // slices in the grid's third dimension

}  // namespace

// channels_last. See stream_channels_last.cu.
bool schedule_channel_stream(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                             InstanceNormSchedule& s) {
  if (!facts.has_cluster() || !p.channels_last || p.dtype == DType::kFloat64 || p.phase_width != 0 || !all_aligned(p)) {
    return false;
  }
  const auto element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t width = 16 / element;
  int64_t copies = 1;
  while (p.channels * copies % width != 0) copies *= 2;
  const int64_t vectors = p.channels * copies / width;
  const int64_t rows = p.pixels / copies;
  const int64_t most_lanes = kChannelStreamChannels / width;
  if (p.pixels % copies != 0 || rows > kMostStreamTiles || (copies > 1 && vectors > most_lanes)) return false;
  int64_t lanes = ceil_div(vectors, ceil_div(vectors, most_lanes));
  // Slices where that makes units which are read once.
  int64_t narrow = lanes;
  while (narrow > kLeastLanes && rows * narrow * 16 > kLargestUnit) narrow = ceil_div(narrow, 2);
  if (rows * narrow * 16 <= kLargestUnit) lanes = narrow;
  lanes = std::min(overrides.tuned("lanes", lanes), vectors);
  if (copies > 1) lanes = vectors;
  const int64_t slices = ceil_div(vectors, lanes);
  const int64_t units = p.batch * slices;
  // Tiles that every thread has a full batch of, or, where the blocks have only few, that all have the same number of.
  int64_t share = kChannelStreamThreads / lanes * kChannelStreamRows;
  if (slices > 1) share = std::min<int64_t>(share, 256);  // of a TMA box
  const int64_t grid = overrides.tuned("grid", facts.multiprocessors);
  int64_t tiles = ceil_div(rows, share);
  const int64_t rounds = ceil_div(units * tiles, grid);
  if (rounds <= 4) {
    share = ceil_div(rows, std::max(tiles, grid * rounds / units));
    tiles = ceil_div(rows, share);
  }
  if (units * tiles > kMostStreamTiles) return false;
  s.lanes = static_cast<int>(lanes);
  s.share = share;
  s.parts = tiles;
  s.blocks = static_cast<int>(std::min(units * tiles, grid));
  const int64_t stage_bytes = ceil_div(share * lanes * 16, 128) * 128;
  const int64_t room = std::min<int64_t>((facts.max_shared_per_block - kChannelStreamStatic) / stage_bytes,
                                         std::min<int64_t>(kStreamStages, ceil_div(units * tiles, s.blocks)));
  s.stages = static_cast<int>(std::clamp<int64_t>(overrides.tuned("stages", room), 1, room));
  const bool fits = ceil_div(tiles, s.blocks) <= s.stages;
  s.held = static_cast<int>(overrides.tuned("held", fits ? s.stages : std::max(1, s.stages - 2)));
  s.held = std::min(s.held, s.stages);
  s.ahead = static_cast<int>(overrides.tuned("ahead", kTilesAhead));
  const int64_t channels = std::min(p.channels, lanes * width);
  s.direct = overrides.tuned("direct", channels <= kFewChannels ? 2 : 1) == 2;
  const int64_t total = p.batch * p.channels * p.pixels * element;
  const int64_t cache = overrides.tuned("cache", total > facts.l2_bytes / 2 ? 3 : 8);
  s.read_once = (cache & 1) != 0;
  s.stream_stores = (cache & 2) != 0;
  s.keep = (cache & 4) != 0;
  // With what is declared statically more than 48 KB: as much as the launch takes for that.
  s.shared_bytes = static_cast<size_t>(std::max<int64_t>(s.stages * stage_bytes, 33 * 1024));
  const int64_t slots = std::min<int64_t>(tiles, s.blocks);
  s.workspace_bytes = static_cast<size_t>(ceil_div(units * channels * (slots + 1) * 8, 16) * 16);
  s.path = InstanceNormPath::kChannelStream;
  s.name = "instance_norm:cuda:stream:channels_last";
  return true;
}

// channels_last in clusters: see cluster_channels.cu.
bool schedule_channel_cluster(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                              InstanceNormSchedule& s) {
  if (!p.channels_last || p.dtype == DType::kFloat64 || p.phase_width != 0 || !all_aligned(p)) return false;
  const auto element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t width = 16 / element;
  if (p.channels % width != 0) return false;
  const int64_t vectors = p.channels / width;
  const int64_t lanes = overrides.tuned("lanes", kLeastLanes);
  if (lanes > 16 || (lanes & (lanes - 1)) != 0 || vectors % lanes != 0 || lanes * width > kClusterChannels)
    return false;
  const int cluster =
      static_cast<int>(std::min<int64_t>(overrides.tuned("cluster", 16), largest_cluster(facts, overrides)));
  if (cluster < 2 || (cluster & (cluster - 1)) != 0) return false;
  const int64_t tile = std::min<int64_t>(256, kChannelStreamThreads / lanes * kChannelStreamRows);
  s.parts = ceil_div(ceil_div(p.pixels, cluster), tile);
  s.share = tile;
  const int64_t stage_bytes = tile * lanes * 16;
  const int64_t room = std::min<int64_t>((facts.max_shared_per_block - kChannelClusterStatic) / stage_bytes, 32);
  s.stages = static_cast<int>(std::min(overrides.tuned("stages", room), room));
  if (s.parts > s.stages || p.pixels > kMostStreamTiles) return false;
  const int64_t units = p.batch * (vectors / lanes);
  s.cluster = cluster;
  s.lanes = static_cast<int>(lanes);
  s.ahead = static_cast<int>(overrides.tuned("ahead", 4));
  // What finds room at the same time; others would come after them.
  const int64_t clusters = overrides.tuned("grid", std::max(1, facts.multiprocessors * 7 / 8 / cluster));
  s.blocks = static_cast<int>(std::min(units, clusters)) * cluster;
  const int64_t cache =
      overrides.tuned("cache", p.batch * p.channels * p.pixels * element > facts.l2_bytes / 2 ? 3 : 8);
  s.read_once = (cache & 1) != 0;
  s.stream_stores = (cache & 2) != 0;
  s.shared_bytes =
      static_cast<size_t>(std::max<int64_t>(s.stages * stage_bytes, facts.max_shared_per_block / 2 + 1024));
  s.path = InstanceNormPath::kChannelCluster;
  s.name = "instance_norm:cuda:stream:channels_last:cluster";
  return true;
}

// channels_last by teams of blocks: see team_channels.cu. Four or eight teams (measured; others take slices of the same
// pixels at different times): what a round of units takes, in nanoseconds, is its bytes or its exchange.
bool schedule_channel_team(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                           InstanceNormSchedule& s) {
  if (!facts.has_cluster() || !p.channels_last || p.dtype == DType::kFloat64 || p.phase_width != 0 || !all_aligned(p))
    return false;
  const auto element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t width = 16 / element;
  if (p.channels % width != 0 || p.pixels > kMostStreamTiles) return false;
  const int64_t vectors = p.channels / width;
  const int64_t wanted_lanes = overrides.tuned("lanes", 0), wanted_teams = overrides.tuned("teams", 0);
  const int64_t grid = overrides.tuned("grid", facts.multiprocessors);
  const int64_t room = facts.max_shared_per_block - kChannelTeamStatic;
  const int64_t total = p.batch * p.channels * p.pixels * element;
  int64_t least = 0;
  for (int64_t lanes = kLeastLanes; lanes > 0 && least == 0; lanes /= 2) {
    if (vectors % lanes != 0 || (wanted_lanes == 0 ? lanes < kLeastLanes / 2 : lanes != wanted_lanes)) continue;
    const int64_t units = p.batch * (vectors / lanes);
    const int64_t share = std::min<int64_t>(256, kChannelStreamThreads / lanes * kChannelStreamRows);
    const int64_t stage_bytes = share * lanes * 16;
    const int64_t most = std::min<int64_t>(room / stage_bytes, 32);
    const int64_t stages = std::clamp<int64_t>(overrides.tuned("stages", most), 1, most);
    for (int64_t teams = 1; teams <= std::min(grid, kMostTeams); ++teams) {
      if (wanted_teams == 0 ? teams != 4 && teams != 8 : teams != wanted_teams) continue;
      const int64_t blocks = grid / teams;
      const int64_t tiles = ceil_div(ceil_div(p.pixels, blocks), share);
      // Room for half of the next unit; hardly a team without a unit in the last round.
      const int64_t rounds = ceil_div(units, teams);
      if (wanted_teams > 0 ? tiles > stages : tiles * 3 / 2 > stages || units * 20 < rounds * teams * 17) continue;
      const int64_t bytes = tiles * stage_bytes / 15;
      const int64_t cost = rounds * std::max(bytes, 1600 + 40 * blocks) + bytes / 2;
      if (least > 0 && cost >= least) continue;
      least = cost;
      s.lanes = static_cast<int>(lanes);
      s.teams = static_cast<int>(teams);
      s.blocks = static_cast<int>(blocks * teams);
      s.parts = tiles;
      s.share = share;
      s.stages = static_cast<int>(stages);
      s.shared_bytes =
          static_cast<size_t>(std::max<int64_t>(stages * stage_bytes, facts.max_shared_per_block / 2 + 1024));
      s.workspace_bytes = static_cast<size_t>(units * blocks * lanes * width * 8);
    }
  }
  if (least == 0) return false;
  s.ahead = static_cast<int>(overrides.tuned("ahead", kTilesAhead));
  const int64_t cache = overrides.tuned("cache", total > facts.l2_bytes ? 4 : 1);
  s.read_once = (cache & 1) != 0;
  s.stream_stores = (cache & 2) != 0;
  s.path = InstanceNormPath::kChannelTeam;
  s.name = "instance_norm:cuda:stream:channels_last:team";
  return true;
}

// Measured (H200, cold) against clusters, the stream of all blocks and what holds the tensor: see team_channels.cu.
// Slices of half a line only where the whole tensor is nearly in the L2 cache: 8x64x256x256 in float 93 us, 101 so.
bool prefers_channel_team(const InstanceNormParams& p, const InstanceNormSchedule& s) {
  const int64_t total = p.batch * p.channels * p.pixels * static_cast<int64_t>(size_of(p.dtype));
  return total >= kLeastChannelStream && p.pixels * s.lanes * 16 >= kLeastTeamUnit &&
         (s.lanes == kLeastLanes || total <= 2 * kLeastChannelStream);
}

// Measured (H200) against the stream of all blocks: 16x128x128x128 in half 58.8 -> 48.2 us, in float 96.1 -> 81.3;
// 8x128x128x128 in half 34.6 -> 29.8, 16x64x128x128 in float 50.5 -> 45.8; slices of half a line are no better. Against
// slabs, where samples are smaller: 16x128x96x96 in half 46.4 -> 30.6, 32x64x128x128 82.6 -> 46.0.
bool prefers_channel_cluster(const InstanceNormParams& p, const InstanceNormSchedule& s) {
  const auto element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t units = p.batch * (p.channels * element / 16 / s.lanes);
  return s.cluster == 16 && units * s.cluster >= 2 * s.blocks && p.pixels * s.lanes * 16 >= kLeastClusterUnit &&
         p.batch * p.channels * p.pixels * element >= kLeastChannelStream;
}

// Measured (H200): 4x64x256x256 in float 64 -> 50 us, in half 48 -> 32; 16x128x128x128 120 -> 98 and 73 -> 60;
// 1x64x1024x1024, of which most is read twice, 236 -> 206 and 129 -> 109. Every unit costs about a microsecond and a
// half besides its bytes: 16x128x128x128 in half in units of 2 MB takes 82 us.
bool prefers_channel_stream(const InstanceNormParams& p, const InstanceNormSchedule& s) {
  const auto element = static_cast<int64_t>(size_of(p.dtype));
  if (p.channels * element % 16 != 0) return false;
  return p.batch * p.channels * p.pixels * element >= kLeastChannelStream && p.pixels * s.lanes * 16 >= kLeastUnit;
}

// Pictures, whose pixels are no whole vectors. Measured against the other ways: 1x3x512x512 in float 14.2 -> 5.6 us, in
// half 23.5 -> 4.7.
bool schedule_few_channels(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                           InstanceNormSchedule& s) {
  const int64_t width = 16 / static_cast<int64_t>(size_of(p.dtype));
  const bool few = p.channels == 2 || p.channels == 3;
  if (!p.channels_last || !few || p.dtype == DType::kFloat64 || p.phase_width != 0 || !all_aligned(p)) return false;
  if (p.pixels % width != 0 || p.pixels > (int64_t{1} << 28)) return false;
  const int64_t vectors = p.pixels / width * p.channels;
  // One block for each multiprocessor, where its threads can have as many vectors.
  const int64_t blocks = p.batch * ceil_div(vectors, int64_t{kFewThreads});
  s.held = round_threads(overrides.tuned("each", ceil_div(blocks, facts.multiprocessors)), 1, kFewVectors);
  s.parts = ceil_div(vectors, int64_t{kFewThreads} * s.held);
  s.workspace_bytes = static_cast<size_t>(ceil_div(p.batch * p.channels * s.parts * 8, 16) * 16);
  s.path = InstanceNormPath::kFewChannels;
  s.name = "instance_norm:cuda:split:few_channels";
  return true;
}

bool schedule_slab(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                   const Overrides& overrides, InstanceNormSchedule& s) {
  const int64_t vectors = p.channels / shape.width;
  const int most = largest_cluster(facts, overrides);
  // Measured (bench/tune.py): four lanes; the largest cluster where there are few slabs, else as many blocks as there
  // are multiprocessors; the two-pass kernels where a sample is large for its few blocks.
  if (p.pixels * p.channels * static_cast<int64_t>(size_of(p.dtype)) > kLargestSlabTensor) return false;
  const int64_t room = facts.max_shared_per_block - kStaticShared;
  int lanes = std::min(4, lanes_for(vectors));
  lanes = static_cast<int>(overrides.tuned("lanes", lanes));
  const int64_t units = p.batch * ceil_div(vectors, lanes);
  const int64_t slab_bytes = p.pixels * lanes * shape.vector_bytes;
  int cluster = 1;
  while (cluster < most &&
         (slab_bytes > room * cluster || (slab_bytes >= kLeastShare * cluster * 2 &&
                                          (units <= 16 || units * cluster < facts.multiprocessors * 7 / 8)))) {
    cluster *= 2;
  }
  cluster = static_cast<int>(overrides.tuned("cluster", cluster));
  s.share = ceil_div(p.pixels, cluster);
  const int64_t bytes = s.share * lanes * shape.vector_bytes;
  if (bytes > room) return false;
  s.path = InstanceNormPath::kSlab;
  s.cluster = cluster;
  s.lanes = lanes;
  s.threads = static_cast<int>(overrides.tuned("threads", round_threads(ceil_div(s.share * lanes, 16), 128, 512)));
  s.shared_bytes = static_cast<size_t>(std::max(bytes, spread(units * cluster, cluster, facts, overrides)));
  s.name = cluster > 1 ? "instance_norm:cuda:slab:cluster" : "instance_norm:cuda:slab:block";
  return true;
}

// `tensors` of them held by all multiprocessors together: slices as wide as leave nearly no multiprocessor out.
bool schedule_resident(const InstanceNormParams& p, int tensors, const DeviceFacts& facts, const Overrides& overrides,
                       InstanceNormSchedule& s) {
  const int64_t width = 16 / static_cast<int64_t>(size_of(p.dtype));
  if (!p.channels_last || !facts.has_cluster() || p.dtype == DType::kFloat64 || p.channels % width != 0) return false;
  if (p.pixels > (int64_t{1} << 24) || p.phase_width != 0 || !p.output_channels_last) return false;
  const int64_t vectors = p.channels / width;
  const int64_t room = facts.max_shared_per_block - kStaticShared;
  const auto wanted = static_cast<int>(overrides.tuned("lanes", 0));
  int64_t most_blocks = 0;
  for (int lanes = std::min(kResidentLanes, lanes_for(vectors)); lanes > 0; lanes /= 2) {
    if (wanted != 0 && lanes != wanted) continue;
    const int64_t units = p.batch * ceil_div(vectors, lanes);
    int64_t parts = units >= facts.multiprocessors ? 1 : facts.multiprocessors / units;
    parts = std::min(parts, ceil_div(p.pixels * lanes, kLeastResidentVectors));
    const int64_t share = ceil_div(p.pixels, parts);
    parts = ceil_div(p.pixels, share);
    const int64_t bytes = share * lanes * 16 * tensors;
    // Those that find no multiprocessor at once do not count: wider slices are whole sectors and lines.
    const int64_t blocks = std::min<int64_t>(units * parts, facts.multiprocessors);
    if (bytes > room || blocks <= most_blocks * 9 / 8) continue;
    most_blocks = blocks;
    s.lanes = lanes;
    s.share = share;
    s.parts = parts;
    s.shared_bytes = static_cast<size_t>(bytes);
    s.workspace_bytes = parts == 1 ? 0 : static_cast<size_t>(units * parts * lanes * width * 8);
  }
  if (most_blocks == 0) return false;
  s.threads = static_cast<int>(
      overrides.tuned("threads", round_threads(ceil_div(s.share * s.lanes, kResidentVectors), 128, kResidentThreads)));
  s.path = InstanceNormPath::kResident;
  return true;
}

// The same in registers, where threads have enough of them.
bool schedule_held_channels(const InstanceNormParams& p, const DeviceFacts& facts, const Overrides& overrides,
                            InstanceNormSchedule& s) {
  InstanceNormSchedule one;
  one.vectorized = s.vectorized;
  if (overrides.tuned("registers", 2) != 2 || !schedule_resident(p, 1, facts, overrides, one)) return false;
  const auto width = 16 / static_cast<int64_t>(size_of(p.dtype));
  const int64_t vectors = one.share * one.lanes;
  if (ceil_div(p.channels / width, one.lanes) > kMostGridRows) return false;
  // Four vectors a thread where that is enough, and four of the pairs that the unit's blocks exchange.
  const int64_t pairs = one.parts > 1 ? one.parts * one.lanes * width : 0;
  const int64_t warps = ceil_div(std::max(vectors, pairs), kResidentVectors * 32);
  one.threads = static_cast<int>(std::clamp<int64_t>(overrides.tuned("threads", warps * 32), 64, kHeldChannelThreads));
  one.held = static_cast<int>(ceil_div(one.share, one.threads / one.lanes));
  if (one.held > kHeldChannelVectors) return false;
  one.path = InstanceNormPath::kHeldChannels;
  s = one;
  return true;
}

// Backward: where the gradient before the norm needs no place of its own.
bool schedule_held_backward(const InstanceNormBackwardParams& p, const DeviceFacts& facts, const Overrides& overrides,
                            InstanceNormSchedule& s) {
  const bool relu = p.activation == Activation::kRelu && (p.saved_output != nullptr || p.residual == nullptr);
  return (p.activation == Activation::kNone || relu) && schedule_held_channels(p, facts, overrides, s);
}

}  // namespace styleforge::cuda
