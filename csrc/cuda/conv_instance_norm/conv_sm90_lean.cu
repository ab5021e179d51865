// Kernels of conv_sm90.cuh that are being tried (ConvSchedule::trial): where the grid is resident, all tiles are full,
// and the result is channels_last.
#include "conv_sm90_launch.cuh"

namespace styleforge::cuda {
namespace {

bool is_lean(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm) {
  return s.resident && p.phases == 1 && p.precision != ConvPrecision::kIeee && norm.output_channels_last &&
         is_piecewise(norm.activation) && p.out_height == s.tiles_y * s.tile_height &&
         p.out_width == s.tiles_x * ConvSchedule::kTileWidth && s.entries % s.tiles == 0 &&
         p.out_channels % s.columns == 0;
}

// The first box serves a tile's upper half alone, the second one the lower half, and rows that both need.
bool takes_halves(const ConvParams& p, const ConvSchedule& s) {
  return p.mode == PaddingMode::kZeros && p.stride_h == 2 && s.tile_height == 8 && s.halo_height > kHalfRows &&
         s.share == 2 && p.dtype == DType::kFloat32;
}

template <typename T, int kLean>
cudaError_t launch_kind(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                        const DeviceFacts& facts, cudaStream_t stream, bool& taken) {
  const bool tall = s.tile_height == 8;
  taken = true;
  if constexpr (sizeof(T) == 4) {
    if (s.share == 2) {
      if (s.columns == 64 && tall) return launch_tile<T, 64, 2, false, 2, kLean>(p, s, norm, facts, stream);
      if (s.columns == 64) return launch_tile<T, 64, 1, false, 2, kLean>(p, s, norm, facts, stream);
      if (s.columns == 32 && !tall) return launch_tile<T, 32, 1, false, 2, kLean>(p, s, norm, facts, stream);
    }
  } else {
    if (s.columns == 64 && !tall) return launch_tile<T, 64, 1, false, 1, kLean>(p, s, norm, facts, stream);
    if (s.columns == 32 && !tall) return launch_tile<T, 32, 1, false, 1, kLean>(p, s, norm, facts, stream);
  }
  if (s.share == 1 && s.columns == 128) return launch_tile<T, 128, 2, false, 1, kLean>(p, s, norm, facts, stream);
  if (s.share == 1 && s.columns == 64 && tall) return launch_tile<T, 64, 2, false, 1, kLean>(p, s, norm, facts, stream);
  taken = false;
  return cudaSuccess;
}

template <int kLean>
cudaError_t launch_lean(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                        const DeviceFacts& facts, cudaStream_t stream, bool& taken) {
  if (p.dtype == DType::kFloat16) return launch_kind<__half, kLean>(p, s, norm, facts, stream, taken);
  if (p.dtype == DType::kFloat32) return launch_kind<float, kLean>(p, s, norm, facts, stream, taken);
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_conv_sm90_lean(const ConvParams& p, const ConvSchedule& schedule, const InstanceNormParams& norm,
                                  cudaStream_t stream, bool& taken) {
  taken = false;
  if (!is_lean(p, schedule, norm)) return cudaSuccess;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  ConvSchedule s = schedule;
  if (!takes_halves(p, s)) s.trial = static_cast<unsigned char>(s.trial & ~kLeanHalves);
  return (s.trial & kLeanKind) == kLeanMerge ? launch_lean<kLeanMerge>(p, s, norm, facts, stream, taken)
                                             : launch_lean<kLeanMoments>(p, s, norm, facts, stream, taken);
}

}  // namespace styleforge::cuda
