// The convolution's kernels whose blocks have a tile, or a few, of their own: by type and size of a tile.
#include "conv_sm90_launch.cuh"

namespace styleforge::cuda {
namespace {

template <typename T, bool kSplit>
cudaError_t launch_kind(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                        const DeviceFacts& facts, cudaStream_t stream) {
  const bool tall = s.tile_height == 8;
  switch (s.columns) {
    case 32:
      return tall ? launch_tile<T, 32, 2, kSplit>(p, s, norm, facts, stream)
                  : launch_tile<T, 32, 1, kSplit>(p, s, norm, facts, stream);
    case 64:
      return tall ? launch_tile<T, 64, 2, kSplit>(p, s, norm, facts, stream)
                  : launch_tile<T, 64, 1, kSplit>(p, s, norm, facts, stream);
    case 128:
      return launch_tile<T, 128, 2, kSplit>(p, s, norm, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_conv_sm90(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                             cudaStream_t stream) {
  if (s.share > 1) return launch_conv_sm90_shared(p, s, norm, stream);
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (p.dtype) {
    case DType::kFloat16:
      return launch_kind<__half, false>(p, s, norm, facts, stream);
    case DType::kBFloat16:
      return launch_kind<__nv_bfloat16, false>(p, s, norm, facts, stream);
    case DType::kFloat32:
      return p.precision == ConvPrecision::kIeee ? launch_kind<float, true>(p, s, norm, facts, stream)
                                                 : launch_kind<float, false>(p, s, norm, facts, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
