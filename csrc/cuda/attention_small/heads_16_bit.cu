// The kernels of a head for float16 and bfloat16.
#include "dispatch.cuh"

namespace styleforge::cuda {

cudaError_t launch_small_heads_16_bit(const SmallAttentionParams& p, const SmallAttentionSchedule& s,
                                      cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_heads<Half>(p, s, stream) : launch_heads<BFloat16>(p, s, stream);
}

}  // namespace styleforge::cuda
