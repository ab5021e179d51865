// Which convolutions the fused kernels take, and how they are cut: a function of the shape and the device.
#include <algorithm>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kChunk = 128;  // bytes of input channels of a stage
constexpr int kMaxInputStages = 4;
constexpr int kMaxWeightStages = 8;
constexpr int kShared = 227 * 1024 - 2048;  // of a block, less what is declared statically

// STYLEFORGE_CONV_TUNE="columns=64,height=4,inputs=2,weights=6"
constexpr const char* kTuneVariable = "STYLEFORGE_CONV_TUNE";

}  // namespace

cudaError_t schedule_conv(const ConvParams& p, ConvSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  const bool wanted = !overrides.forced() || overrides.forced("sm90");
  const int element = static_cast<int>(size_of(p.dtype));
  if (!wanted || facts.major != 9 || !facts.has_cluster() || p.dtype == DType::kFloat64) return cudaSuccess;
  if (p.in_channels * element % 16 != 0 || p.out_channels % 2 != 0) return cudaSuccess;
  // A chunk is always computed whole: not where most of it would be zeros.
  if (p.in_channels * element * 2 < kChunk) return cudaSuccess;
  if (p.batch > 65535 || int64_t{p.height} * p.width * p.in_channels > INT32_MAX) return cudaSuccess;

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
  s.columns = tuned("columns", s.columns);
  s.tile_height = tuned("height", s.tile_height);
  s.tiles_x = static_cast<int>(ceil_div(width, s.kTileWidth));
  s.tiles_y = static_cast<int>(ceil_div(height, s.tile_height));
  s.entries = p.phases * s.tiles_x * s.tiles_y;

  s.halo_height = (s.tile_height - 1) * p.stride_h + p.kernel_h;
  s.halo_width = (s.kTileWidth - 1) * p.stride_w + p.kernel_w;
  s.halo_divisor = static_cast<unsigned>((uint64_t{1} << 32) / static_cast<unsigned>(s.halo_width) + 1);
  s.halo_bytes = (s.halo_height * s.halo_width * kChunk + 1023) / 1024 * 1024;
  const int weight_bytes = s.columns * kChunk * (split ? 2 : 1);
  const int chunks = static_cast<int>(ceil_div(p.in_channels * element, kChunk));
  const int steps = chunks * p.kernel_h * p.kernel_w;
  const bool pair = blocks(s.tile_height, s.columns) > facts.multiprocessors && s.columns * s.tile_height <= 128 * 4 &&
                    !split;  // two blocks a multiprocessor
  const int room = pair ? (kShared - 2048) / 2 : kShared;
  s.weight_stages = std::min({steps, kMaxWeightStages, tuned("weights", pair ? 4 : split ? 8 : 6)});
  s.input_stages = std::min({chunks, kMaxInputStages, tuned("inputs", kMaxInputStages)});
  const auto bytes = [&] { return 1024 + s.weight_stages * weight_bytes + s.input_stages * s.halo_bytes; };
  while (bytes() > room && s.input_stages > std::min(chunks, 2)) --s.input_stages;
  while (bytes() > room && s.weight_stages > std::min(steps, 3)) --s.weight_stages;
  while (bytes() > room && s.input_stages > 1) --s.input_stages;
  while (bytes() > kShared && s.weight_stages > std::min(steps, 2)) --s.weight_stages;
  if (bytes() > kShared || s.halo_height > 256 || s.halo_width > 256) return cudaSuccess;  // 256: of a TMA box
  s.shared_bytes = static_cast<size_t>(bytes());
  s.name = split ? "sm90:3xtf32" : "sm90";
  supported = true;
  return cudaSuccess;
}

cudaError_t launch_conv(const ConvParams& params, const ConvSchedule& schedule, cudaStream_t stream) {
  return launch_conv_sm90(params, schedule, stream);
}

}  // namespace styleforge::cuda
