// The convolution's kernels whose blocks share a tile, two and two: float32, where whole tiles are too few.
#include "conv_sm90_launch.cuh"

namespace styleforge::cuda {
namespace {

template <bool kSplit>
cudaError_t launch_shared(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                          const DeviceFacts& facts, cudaStream_t stream) {
  if (s.share != 2) return cudaErrorInvalidValue;
  const bool tall = s.tile_height == 8;
  switch (s.columns) {
    case 32:
      if (!tall) return launch_tile<float, 32, 1, kSplit, 2>(p, s, norm, facts, stream);
      break;
    case 64:
      return tall ? launch_tile<float, 64, 2, kSplit, 2>(p, s, norm, facts, stream)
                  : launch_tile<float, 64, 1, kSplit, 2>(p, s, norm, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_conv_sm90_shared(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                                    cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.precision == ConvPrecision::kIeee ? launch_shared<true>(p, s, norm, facts, stream)
                                             : launch_shared<false>(p, s, norm, facts, stream);
}

}  // namespace styleforge::cuda
