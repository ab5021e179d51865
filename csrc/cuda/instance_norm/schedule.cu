// Which path a call takes, and how it is cut. Everything here is a function of the shape and the device.
//
// What the choices rest on (H200, bench/tune.py):
// - 1x128x128x128 in half takes 4.5 us in single blocks, 5.3 in clusters of two, 6.1 in clusters of four (whose blocks
//   start together and wait for each other twice), and clusters of 16 cover 112 of 132 multiprocessors. Where a plane
//   fits one block there is no cluster.
// - Blocks of one cluster are packed onto few multiprocessors unless their shared memory keeps them apart (spread()).
// - Small channels_last tensors are bound by the chain of dependent steps, not by memory: four channels a thread, also
//   where 16 bytes hold eight; reads of the other blocks' parts all in flight; no division in the merge.
// - Writing the parts into the other blocks, instead of reading them there, needs a second cluster barrier: slower,
//   unless the writes bring their arrival along (held_plane.cu).
// - Two passes: pass 2 loads its tile before it waits for pass 1 (dependent launch), 6.2 -> 5.1 us on 1x3x512x512.
#include <algorithm>
#include <bit>
#include <limits>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "channel_sums.cuh"
#include "channel_tiles.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

// Shared memory that plane and slab declare statically (reductions, the parts of a cluster); the rest holds the data.
constexpr int64_t kStaticShared = 12 * 1024;
// Three blocks of this size share a multiprocessor, so that one loads while another one stores.
constexpr int64_t kPreferredShare = 64 * 1024;
constexpr int64_t kLeastShare = 2 * 1024;
constexpr int64_t kLargestSlabTensor = 12 << 20;  // bytes of one sample
// Stream: what a block's ring holds at most, what of it is loaded before a ticket is drawn, what of that the L2 cache
// gets before the predecessor is through, and the tensors and planes it is for. Measured: smaller tiles, and more of
// them, pay for planes of more than kManyTiles.
constexpr int64_t kStreamRing = 224 * 1024;
constexpr int64_t kStreamFirst = 160 * 1024;
constexpr int64_t kStreamPrefetched = 64 * 1024;
constexpr int64_t kManyTiles = 64;
constexpr int64_t kManyTilesRing = 208 * 1024;
constexpr int64_t kStreamStatic = 3 * 1024;  // barriers and statistics, declared statically
constexpr int64_t kLeastStreamTile = 4 * 1024;
constexpr int64_t kLeastStreamTensor = 8 << 20;                   // bytes, where no cluster holds a plane
constexpr int64_t kLeastAgainstPlane = 24 << 20;                  // where one does
constexpr int64_t kLargestHeldTensor = 9 << 20;                   // bytes, where a plane's blocks have it in registers
constexpr int64_t kLargestHeldByClusters = 17 << 20;              // where they are four or more
constexpr int64_t kHeldBytes = kHeldVectors * kHeldThreads * 16;  // of a block
constexpr int64_t kLargestEightfold = 12 << 20;                   // clusters of eight against two passes
constexpr int64_t kMostStreamTiles = 1 << 28;
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
constexpr int64_t kFewChannels = 6;
constexpr int64_t kTilesAhead = 3;
constexpr int64_t kLine = 8;  // vectors of a cache line: tiles begin where the plane's lines do
// Resident in channels_last (tuned by lanes, threads and least): vectors that a block has at least, and a thread about.
constexpr int64_t kLeastResidentVectors = 256;
constexpr int64_t kResidentVectors = 4;
constexpr int64_t kLeastResident = 4 << 20;  // bytes of the tensor, where slabs would do
// The same in registers. Measured (H200) against slabs: 1x128x64x64 in half 5.7 -> 4.4 us, 1x64x128x128 7.1 -> 4.9,
// 64x64x32x32, of which blocks have whole slices, 10.1 -> 7.2; 1x64x64x64 is half a megabyte, where clusters are as
// good.
constexpr int64_t kLeastHeld = 1 << 20;
constexpr int64_t kMostGridRows = 65535;  // slices in the grid's third dimension
constexpr int kForwardTiles = 3;          // channels_last in two passes: blocks of a multiprocessor
constexpr int kSplitThreads = 256;
constexpr int64_t kSplitShare = kSplitThreads * 8;  // vectors of one NCHW tile

int round_threads(int64_t wanted, int least, int most) {
  return static_cast<int>(
      std::clamp<int64_t>(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(wanted))), least, most));
}

// STYLEFORGE_TUNE="cluster=8,lanes=4,threads=256,shared=120000,lead=500". Of the stream path: bytes (of a tile),
// stages, grid (blocks), first (tiles of a block by its number, before it draws tickets), order (1: all by number, 2:
// as first says), prefetch (bytes of a block's first tiles), cache (1: input leaves the L2 cache first, 2: output, 3:
// both, 4: neither). In channels_last also lanes (vectors of a slice), held (tiles of a unit that a block keeps), ahead
// (tiles on their way at a time), direct (2: every block merges all statistics for itself, 1: not), units (2: units
// that a cluster holds wherever there are such, with cluster, lanes, stages, ahead, cache and grid (clusters), 1:
// never). Of the plane path: prefetch (blocks that do so), registers (2: held in registers, 1: in shared memory),
// copies (clusters of a plane, 1 or 2, where in registers). Few channels: each (vectors of a thread).
constexpr const char* kTuneVariable = "STYLEFORGE_TUNE";

int largest_cluster(const DeviceFacts& facts, const Overrides& overrides) {
  if (!facts.has_cluster() || overrides.forced("portable")) return 1;
  return facts.major == 9 || facts.major == 10 ? 16 : 8;  // 16 is the non-portable size of the data-centre chips
}

// NCHW: planes are numbered in 32 bits, and each has a block of the grid at least. More of them would be cut off.
bool too_many_planes(const InstanceNormParams& p) {
  return !p.channels_last && p.batch * p.channels > std::numeric_limits<int32_t>::max();
}

bool all_aligned(const InstanceNormParams& p) {
  return aligned16(p.input) && aligned16(p.output) && aligned16(p.residual);
}

struct Shape {
  int64_t width;  // elements of a vector
  int64_t vector_bytes;
  bool vectorized;
};

Shape shape_of(const InstanceNormParams& p, bool aligned) {
  const int64_t element = static_cast<int64_t>(size_of(p.dtype));
  const int64_t full = p.channels_last ? std::min<int64_t>(4, 16 / element) : 16 / element;
  const bool vectorized = aligned && (p.channels_last ? p.channels : p.pixels) % full == 0;
  return {vectorized ? full : 1, vectorized ? full * element : element, vectorized};
}

// Clusters of which every block has a multiprocessor to itself.
int64_t clusters_at_once(int cluster, const DeviceFacts& facts) {
  const int64_t with_cluster = cluster >= 16 ? facts.multiprocessors * 5 / 6 : facts.multiprocessors * 10 / 11;
  return with_cluster / cluster;
}

// Blocks of a cluster are packed onto few multiprocessors if they fit. Where all blocks of the grid could have one
// each, asking for more than half of its shared memory makes them.
int64_t spread(int64_t blocks, int cluster, const DeviceFacts& facts, const Overrides& overrides) {
  const bool fits = cluster > 1 && blocks <= clusters_at_once(cluster, facts) * cluster;
  return overrides.tuned("shared", fits ? facts.max_shared_per_block / 2 + 1024 : 0);
}

bool schedule_plane(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                    const Overrides& overrides, InstanceNormSchedule& s) {
  const int64_t vectors = p.pixels / shape.width;
  const int64_t bytes = vectors * shape.vector_bytes;
  const int64_t planes = p.batch * p.channels;
  const int most = largest_cluster(facts, overrides);
  // Measured (bench/tune.py): no cluster up to twice the preferred share, which costs less than the cluster's barriers;
  // as many blocks as there are multiprocessors where planes are few.
  int cluster = 1;
  while (cluster < most && bytes > kPreferredShare * (cluster == 1 ? 2 : cluster)) cluster *= 2;
  while (cluster < most && planes * cluster * 2 <= facts.multiprocessors && bytes >= 4 * kLeastShare * cluster * 2) {
    cluster *= 2;
  }
  // In registers: blocks of half as much where that needs a larger cluster only, since loads and stores of a block do
  // not overlap (1x16x512x512 in half 8.8 us in clusters of eight, 7.3 of 16; 1x64x256x256 in float 11.0 of four, 9.5
  // of eight), but not where two blocks have a plane (1x64x256x256 in half 5.7 of two, 6.8 of four).
  const auto element_bytes = size_of(p.dtype);
  const bool registers = shape.vectorized && element_bytes <= 4 &&
                         planes * bytes <= (cluster >= 4 ? kLargestHeldByClusters : kLargestHeldTensor);
  if (registers && cluster >= 4) {
    while (cluster < most && ceil_div(vectors, cluster) * shape.vector_bytes > kHeldBytes / 2) cluster *= 2;
  }
  cluster = static_cast<int>(overrides.tuned("cluster", cluster));
  s.share = ceil_div(vectors, cluster);
  if (s.share * shape.vector_bytes > facts.max_shared_per_block - kStaticShared) return false;
  // Full blocks in clusters: where there are several planes, and all at once (2x3x512x512 in float 5.3 us against 5.8
  // in two passes, 1x8x512x512 9.3 against 7.6, a single one 4.1 against 3.7).
  const int64_t share_bytes = s.share * shape.vector_bytes;
  const bool pays =
      cluster <= 2 || share_bytes <= kHeldBytes / 2 || (planes > 1 && planes <= clusters_at_once(cluster, facts));
  const bool held = shape.vectorized && element_bytes <= 4 && share_bytes <= kHeldBytes &&
                    overrides.tuned("registers", registers && pays ? 2 : 1) == 2;
  // Measured (bench/tune.py): 16 blocks to a plane that they have in shared memory lose against two passes, eight do
  // where all planes together are not small.
  const bool loses = !held && (cluster == 16 || (cluster == 8 && planes * bytes > kLargestEightfold));
  if (loses && !overrides.forced("plane")) return false;
  s.path = InstanceNormPath::kPlane;
  s.cluster = cluster;
  s.threads = static_cast<int>(overrides.tuned(
      "threads", round_threads(ceil_div(s.share, cluster > 1 && element_bytes > 2 ? 16 : 8), 64, 1024)));
  s.shared_bytes =
      static_cast<size_t>(std::max(s.share * shape.vector_bytes, spread(planes * cluster, cluster, facts, overrides)));
  // Measured (16x128x128x128 in half, of 2048 blocks): none 35.8 us, 132 35.5, all 35.0; in float 67.6, 66.9, 66.4. Of
  // 512 blocks (8x64x128x128 in float): none 19.3, 132 18.5, 264 19.1.
  const bool many = planes * cluster >= 8 * facts.multiprocessors;
  s.prefetched = static_cast<int>(overrides.tuned("prefetch", many ? planes * cluster : facts.multiprocessors));
  // Measured: a tenth to a quarter less for small tensors (4x64x64x64 in half 3.5 -> 2.8 us, 1x64x256x256 7.3 -> 6.7),
  // more for others.
  if (held) {
    s.path = InstanceNormPath::kHeldPlane;
    const int least = round_threads(ceil_div(s.share, kHeldVectors), 32, kHeldThreads);
    // Measured, where a block has the whole plane: four vectors a thread, but two to four warps (of 128 planes of
    // 64x64 in half 2.4 us with 128 threads, 2.7 with 64; of 32x32 1.54 with 64, 1.67 with 32); none without any.
    const int wanted = cluster > 1 ? 64 : round_threads(ceil_div(s.share, 4), s.share > 32 ? 64 : 32, 128);
    s.threads = std::clamp(static_cast<int>(overrides.tuned("threads", wanted)), least, kHeldThreads);
    // Not in place: the copy that is done first would store over what the other may not have read.
    const bool apart = p.input != p.output;
    const int copies = cluster > 1 && 2 * planes <= clusters_at_once(cluster, facts) ? 2 : 1;
    s.copies_log2 = apart && overrides.tuned("copies", copies) == 2 ? 1 : 0;
    s.shared_bytes = static_cast<size_t>(spread((planes * cluster) << s.copies_log2, cluster, facts, overrides));
  }
  s.name = cluster > 1 ? "instance_norm:cuda:plane:cluster" : "instance_norm:cuda:plane:block";
  return true;
}

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

// `wanted`: asked for by name, so whether it pays is not looked at.
bool schedule_stream(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                     const Overrides& overrides, bool wanted, InstanceNormSchedule& s) {
  if (!facts.has_cluster() || !shape.vectorized || p.channels_last) return false;
  const int64_t vectors = p.pixels / shape.width;
  const int64_t planes = p.batch * p.channels;
  const int64_t plane_bytes = vectors * shape.vector_bytes;
  const int64_t total = planes * plane_bytes;
  // One tile for each multiprocessor where that is enough, else tiles of full size.
  const bool many = plane_bytes > kManyTiles * kStreamTile;
  int64_t parts = ceil_div(plane_bytes, many ? kStreamTile / 2 : kStreamTile);
  if (planes <= facts.multiprocessors && plane_bytes <= facts.multiprocessors / planes * kStreamTile) {
    parts = std::max(parts, std::min(facts.multiprocessors / planes, ceil_div(plane_bytes, kLeastStreamTile)));
  }
  const int64_t tile_bytes = std::min<int64_t>(overrides.tuned("bytes", ceil_div(plane_bytes, parts)), kStreamTile);
  s.share = ceil_div(ceil_div(vectors, ceil_div(plane_bytes, tile_bytes)), kLine) * kLine;
  s.parts = ceil_div(vectors, s.share);
  const int64_t tiles = planes * s.parts;
  if (tiles > kMostStreamTiles || vectors > kMostStreamTiles) return false;
  const int64_t stage_bytes = s.share * shape.vector_bytes;
  s.blocks = static_cast<int>(std::min<int64_t>(tiles, overrides.tuned("grid", facts.multiprocessors)));
  const int64_t room = std::min<int64_t>((facts.max_shared_per_block - kStreamStatic) / stage_bytes, kStreamStages);
  const int64_t stages =
      overrides.tuned("stages", std::min<int64_t>((many ? kManyTilesRing : kStreamRing) / stage_bytes, kStreamStages));
  // Where tiles are drawn, a fast block may hold one more than its share.
  const int64_t useful = tiles <= s.blocks ? 1 : ceil_div(tiles, s.blocks) + 1;
  s.stages = static_cast<int>(std::clamp<int64_t>(std::min(stages, useful), 1, room));
  // The rings must hold a plane with room to spare; see stream.cu for what happens where they do not.
  if (!wanted && s.parts * 2 > static_cast<int64_t>(s.stages) * s.blocks) return false;
  // What every block gets for certain: loaded without a ticket, or with one draw. A plane of one tile needs nothing
  // from other blocks, so nothing is zeroed for it; with tickets, something would be.
  const int64_t certain = std::clamp<int64_t>(tiles / s.blocks, 1, s.stages);
  const bool by_number = overrides.tuned("order", tiles <= s.blocks || s.parts == 1 ? 1 : 2) == 1;
  const int64_t first = overrides.tuned("first", std::max<int64_t>(1, kStreamFirst / stage_bytes));
  s.first = by_number ? 0 : static_cast<int>(std::min(first, certain));
  s.fill = static_cast<int>(std::max<int64_t>(1, certain - s.first));
  s.prefetched = static_cast<int>(overrides.tuned("prefetch", kStreamPrefetched) / stage_bytes);
  const int64_t cache = overrides.tuned("cache", total > facts.l2_bytes / 2 ? 3 : 4);
  s.read_once = (cache & 1) != 0;
  s.stream_stores = (cache & 2) != 0;
  s.shared_bytes = static_cast<size_t>(s.stages * stage_bytes);
  const size_t acc = p.dtype == DType::kFloat64 ? 8 : 4;
  const bool alone = s.parts == 1 && by_number;
  s.workspace_bytes = alone ? 0 : (kStreamHead + static_cast<size_t>(tiles) * 2 * acc + 15) / 16 * 16;
  s.path = InstanceNormPath::kStream;
  s.name = "instance_norm:cuda:stream";
  return true;
}

// Measured (H200): the stream path's two launches and its way through three kinds of warps cost microseconds, which
// single blocks and the L2 cache do not; large tensors earn them back. So not where a plane fits one block
// (8x64x128x128 in float 21.9 us against 24.8), nor for small tensors (1x3x512x512 two passes 5.3 against 6.3;
// 1x64x256x256 in half clusters of two 8.6 against 12.0).
bool prefers_stream(const InstanceNormParams& p, const Shape& shape, const InstanceNormSchedule* plane) {
  if (p.dtype == DType::kFloat64) return false;  // for checks, not for speed: the plainer kernels
  const int64_t total = p.batch * p.channels * (p.pixels / shape.width * shape.vector_bytes);
  const int64_t planes = p.batch * p.channels;
  if (plane != nullptr) {
    // One block a multiprocessor, which holds a large plane alone, loads and stores by turns (4x64x256x256 in half 25.3
    // us against 23.9).
    return (plane->cluster > 1 || total / planes > kPreferredShare * 3 / 2) && total >= kLeastAgainstPlane;
  }
  // Two passes keep up as long as the L2 cache holds the tensor and a plane has few tiles (1x32x512x512 in half 13.2 us
  // against 16.6; 1x3x1024x1024 in float 14.0 against 12.5).
  const bool few_tiles = total / planes <= kManyTiles * kStreamTile;
  return total >= (few_tiles ? kLeastAgainstPlane : kLeastStreamTensor);
}

int lanes_for(int64_t vectors) {
  return static_cast<int>(
      std::min<int64_t>(kMaxLanes, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(vectors)))));
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
  if (overrides.forced("stream") && (schedule_channel_stream(params, facts, overrides, schedule) ||
                                     schedule_stream(params, facts, shape, overrides, true, schedule))) {
    return cudaSuccess;
  }
  const bool free = !overrides.forced("plane") && !overrides.forced("split") && !overrides.forced("ticket") &&
                    !overrides.forced("portable");
  if (free && schedule_few_channels(params, facts, overrides, schedule)) return cudaSuccess;
  if (free && params.channels_last) {
    InstanceNormSchedule other;
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
    if (!overrides.forced("plane") && !overrides.forced("portable") &&
        prefers_stream(params, shape, fits ? &schedule : nullptr)) {
      InstanceNormSchedule other;
      other.vectorized = shape.vectorized;
      if (schedule_stream(params, facts, shape, overrides, false, other)) {
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
    case InstanceNormPath::kChannelStream:
      return launch_channel_stream(params, schedule, workspace, stream);
    case InstanceNormPath::kChannelCluster:
      return launch_channel_cluster(params, schedule, stream);
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
