// Which convolutions conv_mma.cu takes, and how they are cut.
#include <algorithm>

#include "kernels.h"
#include "mma_shapes.h"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kChunk = 128;      // bytes of input channels of a stage
constexpr int kAlignment = 128;  // lost to the start of the rings

template <typename Shape>
bool fit(const ConvParams& p, const DeviceFacts& facts, ConvSchedule& s) {
  const int height = p.phases == 1 ? p.out_height : p.height;
  const int width = p.phases == 1 ? p.out_width : p.width;
  const int element = static_cast<int>(size_of(p.dtype));
  s.columns = Shape::kColumns;
  s.tile_height = Shape::kRows;
  s.tiles_x = static_cast<int>(ceil_div(width, s.kTileWidth));
  s.tiles_y = static_cast<int>(ceil_div(height, s.tile_height));
  s.entries = p.phases * s.tiles_x * s.tiles_y;
  if (int64_t{s.entries} * s.tiles_x > INT32_MAX || ceil_div(p.out_channels, s.columns) > 65535) return false;
  const int64_t halo_height = int64_t{s.tile_height - 1} * p.stride_h + p.kernel_h;
  const int64_t halo_width = int64_t{s.kTileWidth - 1} * p.stride_w + p.kernel_w;
  if (halo_height * halo_width * Shape::kChunk > facts.max_shared_per_block) return false;
  s.halo_height = static_cast<int>(halo_height);
  s.halo_width = static_cast<int>(halo_width);
  s.halo_divisor = rounded_reciprocal(s.halo_width);
  s.tiles_x_divisor = rounded_reciprocal(s.tiles_x);
  s.halo_bytes = s.halo_height * s.halo_width * Shape::kChunk;

  const int chunks = static_cast<int>(ceil_div(p.in_channels * element, Shape::kChunk));
  const int taps = p.kernel_h * p.kernel_w;
  // Copies come in the order they were asked for. What a step asks for has come kStages - 1 steps later, so the input
  // of a chunk must be asked for in time: by stages enough, or all of it before the loop.
  constexpr int kDistance = Shape::kStages - 1;
  s.input_stages = std::min(chunks, 1 + std::max(1, static_cast<int>(ceil_div(kDistance, taps))));
  s.chunks_ahead = s.input_stages - 1;
  const int asking = std::min(taps, s.chunks_ahead * taps - kDistance + 1);  // steps of a chunk that may still ask
  if (asking < 1) s.chunks_ahead = s.input_stages;                           // then it is also all chunks
  const int pixels = s.halo_height * s.halo_width;
  constexpr int kLoadRows = Shape::kThreads / 8;
  s.pixels_a_step = static_cast<int>(ceil_div(ceil_div(pixels, std::max(asking, 1)), kLoadRows)) * kLoadRows;
  // The power of two in the stride: of the three bits that spread pixels over the banks it would waste some.
  s.swizzle_shift = 0;
  while (s.swizzle_shift < 3 && (p.stride_w >> s.swizzle_shift) % 2 == 0) ++s.swizzle_shift;

  const int rings = Shape::kStages * Shape::kWeightBytes + s.input_stages * s.halo_bytes;
  const int stash = s.tile_height * s.kTileWidth * stash_pitch(s.columns, element);
  s.parts_offset = stash;
  const int parts = Shape::kWarpsDown * s.columns * static_cast<int>(sizeof(float2));
  s.sources_offset = std::max(rings, stash + parts);
  s.shared_bytes = static_cast<size_t>(kAlignment + s.sources_offset + pixels * static_cast<int>(sizeof(int)));
  return s.shared_bytes <= static_cast<size_t>(facts.max_shared_per_block);
}

// The only GPU this was measured on is an H200, against cuDNN's convolution with our norm. sm_80 and sm_100 have
// multiprocessors like that one: room for two blocks, and TF32 units so much faster than the float32 ones that three
// TF32 products pay (sm_86, 89 and 120 have as many FLOPs in either). The others are left to cuDNN until someone has
// measured them; sm_90 has conv_sm90.cu.
bool like_measured(const DeviceFacts& facts) { return facts.minor == 0 && (facts.major == 8 || facts.major == 10); }

// Where it was faster there. cuDNN had the matrix instructions of sm_90 at twice the rate, so deep sums were its own.
bool faster_than_cudnn(const ConvParams& p) {
  if (!p.norm_follows) return false;                                    // not measured
  if (p.precision == ConvPrecision::kIeee) return p.pixel_stride == 0;  // pictures run in TF32 where that is allowed
  const int depth = p.kernel_h * p.kernel_w * p.in_channels;
  return p.precision == ConvPrecision::kTF32 ? depth < 1152 : depth <= 1152;
}

}  // namespace

void schedule_conv_mma(const ConvParams& p, const DeviceFacts& facts, const Overrides& overrides, bool preferred,
                       ConvSchedule& s, bool& supported) {
  const int element = static_cast<int>(size_of(p.dtype));
  const bool forced = preferred || overrides.forced("mma");
  if (!forced && (overrides.forced() || !like_measured(facts) || !faster_than_cudnn(p))) return;
  if (facts.major < 8 || facts.compiled_for < 80 || p.dtype == DType::kFloat64) return;
  if (p.in_channels * element % 16 != 0 || p.out_channels % 2 != 0) return;
  // A chunk is always computed whole: not where most of it would be zeros.
  if (p.in_channels * element * 2 < kChunk) return;
  if (p.batch > 65535 || int64_t{p.height} * p.width * p.in_channels > INT32_MAX) return;
  if (weights_of(p) > kMaxWeights || p.height * p.row_stride > INT32_MAX) return;

  const bool split = p.precision == ConvPrecision::kIeee;
  const int height = p.phases == 1 ? p.out_height : p.height;
  const int width = p.phases == 1 ? p.out_width : p.width;
  const auto blocks = [&](int rows, int columns) {
    return int64_t{p.batch} * p.phases * ceil_div(width, ConvSchedule::kTileWidth) * ceil_div(height, rows) *
           ceil_div(p.out_channels, columns);
  };
  // The largest tile where every multiprocessor has one and a half of them; smaller ones where most would have none,
  // which pays sooner where a step's products take longer.
  const auto share = [&](int rows, int columns) {
    return static_cast<double>(blocks(rows, columns)) / facts.multiprocessors;
  };
  int tile = split ? 2 : 1;  // 8 x 64
  if (p.out_channels <= 32) {
    // 16 x 32 or 8 x 32: 1x64x256x256 upsampled to 32 channels 37.0 and 42.6 us in 16 bits, 64.8 and 65.9 in TF32.
    tile = !split && share(16, 32) >= 1.5 ? 3 : 4;
  } else if (p.out_channels > 64 && !split && share(8, 128) >= 1.5) {
    tile = 0;
  } else if (element == 4 && share(8, 64) <= 0.5) {
    tile = 5;  // 4 x 64
  } else if (element == 2 && share(8, 64) <= 0.2) {
    tile = 6;  // 4 x 32
  }
  tile = static_cast<int>(overrides.tuned("tile", tile + 1)) - 1;
  // Smaller ones, too, where its input does not fit into shared memory.
  for (; tile < kMmaTiles && !supported; ++tile) {
    s = {};
    s.mma = true;
    s.mma_tile = tile;
    supported = switch_mma_tile(tile, [&]<typename Shape>() { return Shape::takes(split) && fit<Shape>(p, facts, s); });
  }
}

}  // namespace styleforge::cuda
