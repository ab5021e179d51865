// Which convolutions the fused kernels take, and how they are cut: a function of the shape and the device.
#include <algorithm>
#include <utility>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "kernels.h"
#include "shared_sums.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kChunk = 128;                 // bytes of input channels of a stage
constexpr int kShared = 227 * 1024 - 2048;  // of a block, less what is declared statically
constexpr int kAlignment = 1024 + 128;      // lost to the starts of the rings and of what lies behind them
constexpr int kMaxTiles = 4;                // of a block of a resident grid
constexpr int kMaxTilesInTurn = 64;         // of one that is not
constexpr int kMaxMerged = 32;              // moments that a thread loads where every block merges for itself

// STYLEFORGE_CONV_TUNE="columns=64,height=4,inputs=2,weights=6,tiles=2,share=2,same_input=1,split=2"
// lean=1 or 2: tiles.h, 3: never; prefetch, spare, early, gate=1: never, 2; gate=3, patience=1000: gate.h;
// boxes=2,ahead=4: first_boxes, first_weights; once=4: most chunks of same_input
constexpr const char* kTuneVariable = "STYLEFORGE_CONV_TUNE";

// Whether two blocks can share tiles of this size: conv_sm90_shared.cu.
bool takes_share(const ConvParams& p, int columns, int tile_height) {
  const int64_t chunks = ceil_div(p.in_channels * 4, kChunk);
  return p.dtype == DType::kFloat32 && chunks % 2 == 0 && (columns == 64 || (columns == 32 && tile_height == 4));
}

void schedule_conv_sm90(const ConvParams& p, const DeviceFacts& facts, const Overrides& overrides, ConvSchedule& s,
                        bool& supported) {
  const bool two_passes = overrides.forced("sm90:two_pass");
  const bool wanted =
      !overrides.forced() || overrides.forced("sm90") || overrides.forced("sm90:one_pass") || two_passes;
  const int element = static_cast<int>(size_of(p.dtype));
  if (!wanted || facts.major != 9 || !facts.has_cluster() || p.dtype == DType::kFloat64) return;
  if (p.in_channels * element % 16 != 0 || p.out_channels % 2 != 0) return;
  // A chunk is always computed whole: not where most of it would be zeros.
  if (p.in_channels * element * 2 < kChunk) return;
  if (p.batch > 65535 || int64_t{p.height} * p.width * p.in_channels > INT32_MAX) return;
  if (weights_of(p) > kMaxWeights) return;

  const int height = p.phases == 1 ? p.out_height : p.height;
  const int width = p.phases == 1 ? p.out_width : p.width;
  const bool split = p.precision == ConvPrecision::kIeee;
  const auto blocks = [&](int rows, int columns) {
    return int64_t{p.batch} * p.phases * ceil_div(width, s.kTileWidth) * ceil_div(height, rows) *
           ceil_div(p.out_channels, columns);
  };
  const auto tuned = [&](const char* key, int chosen) { return static_cast<int>(overrides.tuned(key, chosen)); };
  s = {};
  s.columns = p.out_channels > 64 ? 128 : p.out_channels > 32 ? 64 : 32;
  s.tile_height = 8;
  // Smaller tiles while half of the multiprocessors would have none.
  const auto idle = [&] { return blocks(s.tile_height, s.columns) * 2 <= facts.multiprocessors; };
  if (idle() && s.columns > 64) s.columns = 64;
  if (idle()) s.tile_height = 4;
  if (idle() && s.columns > 32) s.columns /= 2;
  if (idle() && s.columns > 32) s.columns /= 2;
  // Larger ones that two blocks share, where these fill the GPU: they read less for each product, and split less of it
  // in 3xTF32. 1x64x128x128 to 128 channels with stride 2: 10.4 instead of 12.1 us in TF32, 15.1 instead of 17.6 in
  // 3xTF32; 1x128x32x32: 6.9 instead of 8.4 and 12.7 instead of 18.8.
  for (const auto& [columns, rows] : {std::pair{64, 8}, {64, 4}, {32, 4}}) {
    const int64_t sharing = 2 * blocks(rows, columns);
    if (s.share > 1 || columns > std::max(p.out_channels, 32) || !takes_share(p, columns, rows)) continue;
    if (sharing > facts.multiprocessors || (sharing * 2 <= facts.multiprocessors && columns > 32)) continue;
    s.share = 2;
    s.columns = columns;
    s.tile_height = rows;
  }
  if (tuned("columns", 0) + tuned("height", 0) > 0) s.share = 1;
  s.columns = tuned("columns", s.columns);
  s.tile_height = tuned("height", s.tile_height);
  if (s.columns == 128) s.tile_height = 8;
  s.share = takes_share(p, s.columns, s.tile_height) ? tuned("share", s.share) : 1;
  s.tiles_x = static_cast<int>(ceil_div(width, s.kTileWidth));
  s.tiles_y = static_cast<int>(ceil_div(height, s.tile_height));
  s.entries = p.phases * s.tiles_x * s.tiles_y;

  s.halo_height = (s.tile_height - 1) * p.stride_h + p.kernel_h;
  s.halo_width = (s.kTileWidth - 1) * p.stride_w + p.kernel_w;
  if (s.halo_height > 256 || s.halo_width > 256) return;  // of a TMA box
  s.halo_divisor = rounded_reciprocal(s.halo_width);
  s.tiles_x_divisor = rounded_reciprocal(s.tiles_x);
  s.halo_bytes = (s.halo_height * s.halo_width * kChunk + 1023) / 1024 * 1024;
  const int columns_out = s.columns / s.share;
  const int weight_bytes = s.columns * kChunk * (split ? 2 : 1);
  const int chunks = static_cast<int>(ceil_div(p.in_channels * element, kChunk)) / s.share;  // of a block
  const int steps = chunks * p.kernel_h * p.kernel_w;
  if (int64_t{s.entries} * s.tiles_x > INT32_MAX) return;
  const int64_t groups = p.batch * ceil_div(p.out_channels, s.columns) * s.share;  // of blocks that share statistics
  const int64_t all = groups * s.entries;
  const bool one_tap = p.kernel_h * p.kernel_w == 1;
  const bool pairs = s.columns <= 64 && !split && s.share == 1;  // a multiprocessor can hold two blocks
  const int rows = s.tile_height * s.kTileWidth;
  const int stash_bytes = rows * stash_pitch(columns_out, element);
  const int parts_bytes = s.tile_height * columns_out * static_cast<int>(sizeof(float2));
  const int sums_bytes = s.share > 1 ? shared_sums_bytes(s.columns, s.tile_height * 32) : 0;

  // The rings take what `tiles` of a block leave of a multiprocessor's shared memory, or of half of it.
  const auto fit = [&](int tiles, bool resident) {
    const int room = pairs && all > facts.multiprocessors ? (kShared - 2048) / 2 : kShared;
    const bool several = tiles > 1;
    const int held = !several ? 0 : resident ? tiles - 1 : 1;  // what is written at once leaves its place to the next
    const int behind = several ? held * stash_bytes + 2 * parts_bytes : 0;
    // 1x128x128x128 in 16 bits: 13.05 instead of 13.35 us.
    const bool few_weights = room < kShared || (element == 2 && s.columns == 128 && tiles == 1);
    // 16 bits of one tap: 6.05 instead of 6.27 us with three stages for four steps (1x256x64x64, 1x1; two: 6.13).
    const bool least_weights = resident && pairs && element == 2 && !several && one_tap;
    const int weights = least_weights ? 3 : few_weights ? 4 : split ? 8 : 6;
    s.weight_stages = std::min({tiles * steps, kMaxWeightStages, tuned("weights", weights)});
    s.input_stages = std::min({tiles * chunks, kMaxInputStages, tuned("inputs", kMaxInputStages)});
    const auto rings = [&] { return s.weight_stages * weight_bytes + s.input_stages * s.halo_bytes; };
    const auto bytes = [&] {
      return kAlignment + std::max(rings(), stash_bytes + (several ? 0 : 2 * parts_bytes)) + behind + sums_bytes;
    };
    while (bytes() > room && s.input_stages > std::min(tiles * chunks, 2)) --s.input_stages;
    while (bytes() > room && s.weight_stages > std::min(steps, 3)) --s.weight_stages;
    while (bytes() > room && s.input_stages > 1) --s.input_stages;
    // Half of a multiprocessor's is not enough: two blocks would not be resident.
    if ((several || (resident && room < kShared)) && bytes() > room) return false;
    while (bytes() > kShared && s.weight_stages > std::min(steps, 2)) --s.weight_stages;
    s.tiles = tiles;
    s.stash_offset = (std::max(rings(), stash_bytes) + 127) / 128 * 128;
    s.parts_offset = several ? s.stash_offset + held * stash_bytes : stash_bytes;
    s.sums_offset = (std::max(rings(), stash_bytes + 2 * parts_bytes) + 127) / 128 * 128;
    s.shared_bytes = static_cast<size_t>(bytes());
    return bytes() <= kShared;
  };
  const int64_t capacity = int64_t{facts.multiprocessors} * (pairs ? 2 : 1);
  const int in_turn = static_cast<int>(std::min<int64_t>(ceil_div(all, capacity), kMaxTilesInTurn));
  const int tiles = s.share > 1 ? 1 : tuned("tiles", in_turn);
  s.resident = !two_passes && tiles <= kMaxTiles && groups * ceil_div(s.entries, tiles) <= capacity && fit(tiles, true);
  // One after the other also where nothing is held: the next tile is loaded while the last one is written. TF32 of 64
  // columns or of one tap is faster block by block (145 instead of 161 us on 1x64x512x512, 114 instead of 120 on
  // 4x256x128x128, 1x1).
  const bool by_blocks = element == 4 && !split && (s.columns == 64 || one_tap);
  if (!s.resident && !fit(s.share > 1 ? 1 : tuned("tiles", by_blocks ? 1 : tiles), false) && !fit(1, false)) return;
  // To NCHW, the phases of an upsampling would each write every second element. Contiguous tensors, all launches,
  // general kernels: 21.5 us in one pass and 22.9 in two (16 bits, 1x128x128x128), 33.2 and 39.3 (8x128x64x64), 30.2
  // and 34.0 (TF32).
  s.resident_nchw = s.resident && p.phases == 1;
  // Blocks with other columns of the same tile bring its input for each other, where all of it has a place of its own:
  // 0.3 us of 6 to 9 in 16 bits; of four chunks 0.2 more, but for a single tap, where it is what a block reads that
  // takes the time (1x256x64x64, 1x1: 6.2 instead of 6.6 us). Clusters of two always find room, those of four do not.
  const bool once = s.resident && s.tiles == 1 && all <= facts.multiprocessors &&
                    chunks <= std::min(s.input_stages, tuned("once", one_tap ? 4 : 2));
  if (element == 2 && once && p.out_channels % (2 * s.columns) == 0) s.same_input = std::min(2, tuned("same_input", 2));
  // What the marks take is longer than a short product (1x256x64x64, 1x1: 7.8 instead of 8.5 us).
  s.marks_first = steps <= 9;
  // A launch of its own takes 2 us; to split in the blocks takes long ones more (46 and 58 us of 1x128x128x128).
  s.split_before = split && tuned("split", s.share == 1 && s.tile_height == 8 && steps >= 18 ? 1 : 2) == 1;
  // Consumer threads: a warp for each row of a tile.
  s.merge_apart = int64_t{partials(s)} * columns_out > int64_t{tuned("merged", kMaxMerged)} * 32 * s.tile_height;
  if (s.resident && !split) {
    // 16 bits, lean=1 and 2 in us: 13.1 and 13.1 (1x128x128x128), 16.4 and 17.3 (1x64x256x256), elsewhere the second is
    // faster (4.6 for 5.1, 5.2 for 5.3, 6.1 for 6.2, 6.9 for 7.4, 19.7 for 20.2); TF32 as well, but for large tiles
    // that two blocks share (stride 2: 9.34 and 9.68).
    const bool large_share = s.share == 2 && s.columns == 64 && s.tile_height == 8;
    s.lean = tuned("lean", s.merge_apart || large_share ? kLeanMoments : kLeanMerge) % 3;
    // TF32 takes 0.1 to 0.9 us longer with it.
    s.prefetch = s.lean > 0 && tuned("prefetch", element == 2 ? 2 : 1) == 2;
    // All that has a place at once (1x256x64x64, 1x1: 6.1 instead of 6.3 us; 1x128x32x32: 5.0, 5.2); of large tiles it
    // is on the way of the first weights (8x128x64x64: 20.1 instead of 19.6).
    const bool large = s.columns == 128 || s.tiles > 1;
    s.first_boxes = std::min(s.input_stages, tuned("boxes", large ? 1 : s.input_stages));
    // Nor before what one tap of TF32 reads (1x256x64x64, 1x1: 9.1 instead of 9.4 us).
    const bool weights_later = large || (element == 4 && one_tap);
    s.first_weights = std::min({s.weight_stages, steps, tuned("ahead", weights_later ? 1 : s.weight_stages)});
    const auto rows_of_blocks = static_cast<int>(groups / s.share / s.same_input);
    const int neighbours = s.share * s.same_input;
    const int used = s.entries / s.tiles * neighbours;
    // Short products: 6.84 instead of 7.13 us (1x64x128x128 to 128 channels, stride 2), 4.74 instead of 4.95
    // (1x64x64x64).
    const bool with_spare = tuned("spare", pairs && steps <= 9 && element == 2 ? 2 : 1) == 2;
    if (s.lean > 0 && with_spare && used * rows_of_blocks <= facts.multiprocessors) {
      s.spare = facts.multiprocessors / rows_of_blocks / neighbours * neighbours - used;
    }
    // 8.67 instead of 9.46 us (TF32, stride 2, 1x64x128x128 to 128 channels; 8.88 without `early`; contiguous tensors
    // 11.6 and 12.3); several large tiles a block: 34.6 instead of 34.8 (TF32, 8x128x64x64).
    const bool takes_gate = large_share || (s.columns == 128 && s.tiles > 1);
    s.gated = s.lean > 0 && !pairs && s.spare == 0 && (s.lean == kLeanMerge || !s.merge_apart) &&
              tuned("gate", takes_gate ? 2 : 1) >= 2;
    if (s.gated && s.tiles == 1 && p.batch == 1 && tuned("early", 2) == 2) {
      s.early = std::max(facts.multiprocessors - used * rows_of_blocks, 0);
    }
  }
  supported = true;
}

// Of two passes on an H200. wgmma has 64 rows: with few columns its operands take as long as the products, of which
// 3xTF32 has more for each operand here; the four phases of an upsampling have few products for each tile; and what it
// reads of an input with a stride falls into half of the banks. 1x64x256x256 upsampled to 32 channels: 43 instead of 48
// us in 16 bits, 66 instead of 71 in TF32, 107 instead of 135 in 3xTF32; 1x64x512x512 to 32 in 3xTF32: 186, 230 (16
// bits: 57, 52); 1x32x512x512 to 64 with stride 2 in 16 bits: 29.5, 33.
bool mma_is_faster(const ConvParams& p) {
  if (p.out_channels <= 32) return p.precision == ConvPrecision::kIeee || p.phases > 1;
  return size_of(p.dtype) == 2 && p.stride_w == 2 && p.kernel_h * p.kernel_w * p.in_channels <= 288;
}

}  // namespace

cudaError_t schedule_conv(const ConvParams& p, ConvSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  schedule_conv_sm90(p, facts, overrides, s, supported);
  if (!supported) {
    schedule_conv_mma(p, facts, overrides, false, s, supported);
  } else if (!overrides.forced() && !s.resident && mma_is_faster(p)) {
    ConvSchedule own;
    bool takes = false;
    schedule_conv_mma(p, facts, overrides, true, own, takes);
    if (takes) s = own;
  }
  return cudaSuccess;
}

const char* conv_name(const ConvParams& params, const ConvSchedule& schedule) {
  const bool split = params.precision == ConvPrecision::kIeee;
  if (schedule.mma) return split ? "mma:3xtf32" : "mma";
  if (schedule.resident) return split ? "sm90:3xtf32:one_pass" : "sm90:one_pass";
  return split ? "sm90:3xtf32" : "sm90";
}

cudaError_t launch_conv(const ConvParams& params, ConvSchedule schedule, cudaStream_t stream) {
  if (schedule.mma) return launch_conv_mma(params, schedule, stream);
  schedule.resident = false;
  schedule.same_input = 1;  // a part of a GPU may have no place for clusters
  return launch_conv_sm90(params, schedule, {}, stream);
}

cudaError_t launch_conv_one_pass(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                                 cudaStream_t stream, const char*& name) {
  name = nullptr;
  const bool vectors = norm.channels % (16 / static_cast<int64_t>(size_of(norm.dtype))) == 0 &&
                       aligned16(norm.output) && aligned16(norm.residual);
  if (!(norm.output_channels_last ? schedule.resident : schedule.resident_nchw) || !vectors) return cudaSuccess;
  ConvParams own = params;
  own.output = norm.output;
  bool taken = false;
  auto error = schedule.lean == 0 ? cudaSuccess : launch_conv_sm90_lean(own, schedule, norm, stream, taken);
  if (!taken) error = launch_conv_sm90(own, schedule, norm, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
      error == cudaErrorNotSupported) {
    cudaGetLastError();
    return cudaSuccess;
  }
  name = taken                                      ? "sm90:one_pass:lean"
         : params.precision == ConvPrecision::kIeee ? "sm90:3xtf32:one_pass"
                                                    : "sm90:one_pass";
  return error;
}

cudaError_t launch_conv_two_passes(const ConvParams& params, ConvSchedule schedule, const InstanceNormParams& norm,
                                   cudaStream_t stream, const char*& name) {
  schedule.resident = false;
  name = conv_name(params, schedule);
  if (const auto error = launch_conv(params, schedule, stream)) return error;
  return launch_conv_finish(params, schedule, norm, stream);
}

}  // namespace styleforge::cuda
