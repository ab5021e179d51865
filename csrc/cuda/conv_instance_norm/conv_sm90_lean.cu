// Kernels of conv_sm90.cuh for what is most frequent: a resident grid of full tiles, 16 bits or TF32, no activation or
// one of relu's kind. What they know beforehand brings the first loads out earlier and lets the tensor cores find the
// moments (mma_moments.cuh); where blocks merge for themselves, merge_lean.cuh. Of the general kernels' time (H200,
// STYLEFORGE_CONV_TUNE="lean=3", in turns): 16 bits 0.75 (1x64x64x64), 0.86 (1x128x128x128), 0.77 (1x64x256x256), 0.83
// (1x128x32x32), 0.88 (1x256x64x64, 1x1), 0.73 (stride 2), 0.83 (8x128x64x64); TF32 0.75, 0.92, 0.89, 0.82, 0.98, 0.95,
// 0.93.
//
// Contiguous tensors pay for a transposition of the input before it, 2 to 10 us of all: 16 bits 6.5 us instead of the
// general kernels' 8.6, 16.4 (19.3), 22.0 (26.9), 7.2 (9.1), 9.7 (10.8), 11.1 (13.1), 26.5 (30.3); TF32 8.2
// (10.5), 25.3 (27.9), 36.7 (42.3), 8.5 (9.9), 11.0 (12.6), 11.6 (13.9), 44.4 (48.9). That launch asking for its lines
// before the one in front of it has ended changes little (0.3 more to 0.5 less); without the cooperative launch
// (gate.h) the kernels behind it are faster only where they are in channels_last.
//
// Half a multiprocessor a block, so that the next kernel's blocks wait beside it (128 columns in 16 bits): the way from
// the end of one kernel to the first tile of the next is 1.6 thousand clocks shorter, but the products take 13.8
// thousand instead of 9.9: ptxas gives the consumers no more than the launch has (80 registers of 384 threads, 96 of
// 288, warps being dealt to four units), so they have to bring the weights themselves, with 128 registers of 256
// threads, and 113 KB hold four stages, whose places come free too late, whoever brings them: the other warpgroup's
// turn is over, two groups later, or it was the last to let go. 14.4 to 15.1 us instead of 13.1. And after a kernel
// that fills the multiprocessors, 60 of them get two blocks, others none, and so on along the chain: 21 us.
//
// What was tried: the way out walked once beforehand, so that its instructions are in the cache (no difference);
// merging in two steps everywhere (0.3 to 6 us more); TF32's first box in two parts, by warpgroups (0.2 us more).
#include "conv_sm90_launch.cuh"

namespace styleforge::cuda {
namespace {

bool is_lean(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm) {
  return s.resident && p.phases == 1 && p.precision != ConvPrecision::kIeee && is_piecewise(norm.activation) &&
         p.out_height == s.tiles_y * s.tile_height && p.out_width == s.tiles_x * ConvSchedule::kTileWidth &&
         s.entries % s.tiles == 0 && p.out_channels % s.columns == 0;
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
  if (p.dtype == DType::kBFloat16) return launch_kind<__nv_bfloat16, kLean>(p, s, norm, facts, stream, taken);
  if (p.dtype == DType::kFloat32) return launch_kind<float, kLean>(p, s, norm, facts, stream, taken);
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_conv_sm90_lean(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                                  cudaStream_t stream, bool& taken) {
  taken = false;
  if (!is_lean(p, s, norm)) return cudaSuccess;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return s.lean == kLeanMerge ? launch_lean<kLeanMerge>(p, s, norm, facts, stream, taken)
                              : launch_lean<kLeanMoments>(p, s, norm, facts, stream, taken);
}

}  // namespace styleforge::cuda
