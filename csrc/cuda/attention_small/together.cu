// The launch of together.cuh, and which shapes it takes.
#include "together.cuh"

#include <atomic>
#include <random>

namespace styleforge::cuda {
namespace {

// Blocks of each part.
TogetherPlan plan_of(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  TogetherPlan plan;
  plan.padded = padded_length(p.length);
  plan.row_blocks = static_cast<int>(ceil_div(p.length, s.rows));
  plan.attend = plan.row_blocks * p.heads * p.batch;
  plan.project = plan.attend * (s.head_dim == 64 ? 2 : 1);
  plan.out_columns = static_cast<int>(ceil_div(p.embed, kOutColumns));
  plan.output = plan.out_columns * static_cast<int>(ceil_div(int64_t{p.batch} * p.length, kTogetherOutRows));
  return plan;
}

// A number of this launch alone; counted from one that no memory has by chance, nor from another process.
uint64_t next_number() {
  static std::atomic<uint64_t> next = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

bool small_together_takes(const SmallAttentionParams& p, const SmallAttentionSchedule& s, const DeviceFacts& facts) {
  if (p.dtype != DType::kFloat32 || !facts.has_cluster() || s.head_dim > 64) return false;
  if (s.head_dim == 64 && p.head_dim % 16 != 0) return false;
  // Each part at once. (Also small enough for the plan's numbers.)
  const int64_t blocks = ceil_div(p.length, s.rows) * p.heads * p.batch * (s.head_dim == 64 ? 2 : 1);
  const int64_t output = ceil_div(p.embed, kOutColumns) * ceil_div(int64_t{p.batch} * p.length, kTogetherOutRows);
  return std::max(blocks, output) <= facts.multiprocessors;
}

size_t small_together_flag_bytes(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  if (!s.together) return 0;
  const TogetherPlan plan = plan_of(p, s);
  return sizeof(uint64_t) * static_cast<size_t>(plan.project + plan.attend);
}

cudaError_t launch_small_together(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  TogetherPlan plan = plan_of(p, s);
  plan.flags = static_cast<uint64_t*>(p.flags);
  plan.raised = next_number();
  return p.tf32 ? launch_together<TF32>(p, s, plan, facts, stream) : launch_together<Ieee>(p, s, plan, facts, stream);
}

}  // namespace styleforge::cuda
