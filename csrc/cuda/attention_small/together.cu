// The launch of together.cuh, and which shapes it takes.
#include "together.cuh"

namespace styleforge::cuda {

bool small_together_takes(const SmallAttentionParams& p, const SmallAttentionSchedule& s, const DeviceFacts& facts) {
  if (p.dtype != DType::kFloat32 || !facts.has_cluster() || s.head_dim > 64) return false;
  if (s.head_dim == 64 && p.head_dim % 16 != 0) return false;
  const int64_t blocks = ceil_div(p.length, s.rows) * p.heads * p.batch * (s.head_dim == 64 ? 2 : 1);
  const int64_t output = ceil_div(p.embed, kOutColumns) * ceil_div(int64_t{p.batch} * p.length, kTogetherOutRows);
  return std::max(blocks, output) <= facts.multiprocessors;  // all at once
}

cudaError_t launch_small_together(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.tf32 ? launch_together<TF32>(p, s, facts, stream) : launch_together<Ieee>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
