// The kernels of a head for float32.
#include "dispatch.cuh"

namespace styleforge::cuda {

cudaError_t launch_small_heads_float32(const SmallAttentionParams& p, const SmallAttentionSchedule& s,
                                       cudaStream_t stream) {
  return p.tf32 ? launch_heads<TF32>(p, s, stream) : launch_heads<Ieee>(p, s, stream);
}

}  // namespace styleforge::cuda
