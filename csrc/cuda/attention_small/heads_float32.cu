// heads.cuh for float32.
#include "heads.cuh"

namespace styleforge::cuda {

cudaError_t launch_small_heads_float32(const SmallAttentionParams& p, const SmallAttentionSchedule& s, int stages,
                                       cudaStream_t stream) {
  return p.tf32 ? launch_small_heads<TF32>(p, s, stages, stream) : launch_small_heads<Ieee>(p, s, stages, stream);
}

}  // namespace styleforge::cuda
