// heads.cuh for float16 and bfloat16.
#include "heads.cuh"

namespace styleforge::cuda {

cudaError_t launch_small_heads_16_bit(const SmallAttentionParams& p, const SmallAttentionSchedule& s, int stages,
                                      cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_small_heads<Half>(p, s, stages, stream)
                                    : launch_small_heads<BFloat16>(p, s, stages, stream);
}

}  // namespace styleforge::cuda
