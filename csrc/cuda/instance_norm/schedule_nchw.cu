// How an instance norm of NCHW tensors is cut, and where the stream is chosen.
//
// What the choices rest on (H200, bench/tune.py):
// - 1x128x128x128 in half takes 4.5 us in single blocks, 5.3 in clusters of two, 6.1 in clusters of four (whose blocks
//   start together and wait for each other twice), and clusters of 16 cover 112 of 132 multiprocessors. Where a plane
//   fits one block there is no cluster.
// - Blocks of one cluster are packed onto few multiprocessors unless their shared memory keeps them apart (spread()).
// - Writing the parts into the other blocks, instead of reading them there, needs a second cluster barrier: slower,
//   unless the writes bring their arrival along (held_plane.cu).
#include "schedule.h"

namespace styleforge::cuda {
namespace {

// Three blocks of this size share a multiprocessor, so that one loads while another one stores.
constexpr int64_t kPreferredShare = 64 * 1024;
// By bulk copies: what a block has, and the smallest tensor.
constexpr int64_t kBulkShare = 32 * 1024;
constexpr int64_t kLeastBulkTensor = 12 << 20;
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
constexpr int64_t kLeastAgainstTwoPasses = 16 << 20;              // the same, planes of few tiles
constexpr int64_t kLeastAgainstPlane = 24 << 20;                  // where one does
constexpr int64_t kLargestHeldTensor = 9 << 20;                   // bytes, where a plane's blocks have it in registers
constexpr int64_t kLargestHeldByClusters = 17 << 20;              // where they are four or more
constexpr int64_t kHeldBytes = kHeldVectors * kHeldThreads * 16;  // of a block
constexpr int64_t kLargestEightfold = 12 << 20;                   // clusters of eight against two passes
constexpr int64_t kLine = 8;  // vectors of a cache line: tiles begin where the plane's lines do

}  // namespace

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
  // Measured (16x128x128x128 in half, of 2048 blocks): none 35.0 us, 132 34.3, 198 34.0, 264 34.2, 330 34.9, all 35.3;
  // in float none 66.9, 132 66.1, all others 66.5 to 66.9. Of 512 blocks (8x64x128x128 in float): none 18.4, 132 17.8,
  // more 18.5 to 18.9.
  const bool many = planes * cluster >= 8 * facts.multiprocessors;
  s.prefetched =
      static_cast<int>(overrides.tuned("prefetch", facts.multiprocessors * (many && element_bytes == 2 ? 3 : 2) / 2));
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

// Measured (H200, cold): parts of kBulkShare (4x64x256x256 in float 34.4 us, of twice as much 35.6, 2x64x256x256 18.3
// and 19.0), by clusters of 16 where it takes them (1x64x512x512 in half 18.4 us, 21.8 by the stream;
// 2x64x512x512 35.3, of twice as much in clusters of eight 39.7), which cover 112 of 132 multiprocessors and pay only
// there (4x64x256x256 in float 35.8); larger parts no more (1x64x512x512 in float 37.9, 37.1 by the stream). Half as
// much for tensors that are less than one such part for each block which finds a place (2x64x256x256 in half 10.2 us,
// of kBulkShare 12.7, by blocks of whole planes 11.7). What the L2 cache holds may stay there (4x64x256x256 in
// half 18.8 us, 19.9 where it is the first to go, 18.4 where two blocks of a multiprocessor ask for their part
// beforehand, 21.4 by the stream; in bfloat16 19.4, 20.8, 18.9, 21.5). `wanted`: as below.
bool schedule_bulk_plane(const InstanceNormParams& p, const DeviceFacts& facts, const Shape& shape,
                         const Overrides& overrides, bool wanted, InstanceNormSchedule& s) {
  if (!facts.has_cluster() || !shape.vectorized || p.channels_last || p.dtype == DType::kFloat64) return false;
  const int64_t vectors = p.pixels / shape.width;
  const int64_t bytes = vectors * shape.vector_bytes;
  const int64_t planes = p.batch * p.channels;
  const bool cached = planes * bytes <= facts.l2_bytes;
  const int64_t share = planes * bytes < kLeastAgainstPlane ? kBulkShare / 2 : kBulkShare;
  int cluster = 1;
  while (cluster < 16 && bytes > share * cluster) cluster *= 2;
  cluster = static_cast<int>(std::min<int64_t>(overrides.tuned("cluster", cluster), largest_cluster(facts, overrides)));
  s.share = ceil_div(ceil_div(vectors, cluster), kLine) * kLine;
  if (s.share * shape.vector_bytes > (wanted ? 2 * kBulkShare : kBulkShare)) return false;
  s.path = InstanceNormPath::kBulkPlane;
  s.cluster = cluster;
  s.threads = static_cast<int>(std::min<int64_t>(
      overrides.tuned("threads", round_threads(ceil_div(s.share, 16), 32, kBulkPlaneThreads)), kBulkPlaneThreads));
  s.shared_bytes = static_cast<size_t>(s.share * shape.vector_bytes);
  s.prefetched = static_cast<int>(overrides.tuned("prefetch", facts.multiprocessors * (cached ? 2 : 1)));
  const int64_t cache = overrides.tuned("cache", 4);
  s.read_once = (cache & 1) != 0;
  s.stream_stores = (cache & 2) != 0;
  s.name = "instance_norm:cuda:plane:bulk";
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

// Measured (H200, cold) where a block would hold a plane alone, clusters, or two passes be taken: 2x64x256x256 in
// half 10.2 us against 11.7, 3x32x256x256 8.7 (11.3), 2x48x300x300 11.8 (17.2), 1x32x512x512 11.3 (13.8), 1x64x256x256
// in float 9.5 (11.7), but in half, of 8 MB, 7.5 (6.6); smaller planes 9.1 (9.0: 4x64x128x128 in float).
bool prefers_bulk_plane(const InstanceNormParams& p, const Shape& shape, const InstanceNormSchedule* plane) {
  const int64_t bytes = p.pixels / shape.width * shape.vector_bytes;
  return p.batch * p.channels * bytes >= kLeastBulkTensor &&
         (plane == nullptr || plane->cluster > 1 || bytes > kPreferredShare);
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
    // us against 23.9, 8x64x192x192 32.3 against 24.7).
    return (plane->cluster > 1 || total / planes > kPreferredShare) && total >= kLeastAgainstPlane;
  }
  // Two passes keep up as long as the L2 cache holds the tensor and a plane has few tiles (1x16x512x512 in float 13.2
  // us against 11.5, in half 9.1 and 9.3; 1x3x1024x1024 in float 14.0 against 12.5).
  const bool few_tiles = total / planes <= kManyTiles * kStreamTile;
  return total >= (few_tiles ? kLeastAgainstTwoPasses : kLeastStreamTensor);
}

}  // namespace styleforge::cuda
