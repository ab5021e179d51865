// Which cases the kernels take, and how they are cut: a function of the shape and the device.
#include "../common/launch.h"
#include "../common/overrides.h"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

// STYLEFORGE_ATTENTION_TUNE="turns=1" (1 never, 2 always)
constexpr const char* kTuneVariable = "STYLEFORGE_ATTENTION_TUNE";

// What the first launch of a backward reads and how it counts.
bool fits(const AttentionRows& r) {
  return r.batch <= 65535 && int64_t{attention_rows(r.length)} * r.heads <= INT32_MAX && aligned16(r.output) &&
         aligned16(r.grad_output);
}

}  // namespace

cudaError_t schedule_tiled_attention(const TiledAttentionParams& p, TiledAttentionSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  const bool forced = overrides.forced("sm90");
  if (facts.major != 9 || !facts.has_cluster() || (overrides.forced() && !forced)) return cudaSuccess;
  if (p.head_dim < 1 || p.head_dim > kWideAttentionMaxHead || p.length < 1) return cudaSuccess;
  const bool wide = p.head_dim > kTiledAttentionMaxHead;
  if (p.head_dim < 8 && !forced) return cudaSuccess;  // ATen's is more accurate on so few products
  s = {};
  s.head = wide ? kWideAttentionMaxHead : p.head_dim <= 32 ? 32 : p.head_dim <= 64 ? 64 : kTiledAttentionMaxHead;
  s.tiles = static_cast<int>(ceil_div(p.length, kTiledAttentionRows));
  const int64_t blocks = int64_t{s.tiles} * p.batch * p.heads;
  if (blocks < 1 || blocks > INT32_MAX) return cudaSuccess;
  s.blocks = static_cast<int>(blocks);
  s.vectors = p.head_dim % 4 == 0 && p.row_stride % 4 == 0 && p.batch_stride % 4 == 0 && aligned16(p.q) &&
              aligned16(p.k) && aligned16(p.v) && aligned16(p.output);
  s.turns = overrides.tuned("turns", 2) == 2;
  // A block of ATen's takes 64 queries and about as long: it wins while every one of them has a multiprocessor.
  if (wide && !forced && (!s.vectors || 2 * blocks <= facts.multiprocessors)) return cudaSuccess;
  supported = true;
  return cudaSuccess;
}

cudaError_t schedule_tiled_attention_backward(const TiledAttentionBackwardParams& p, TiledAttentionSchedule& s,
                                              bool& supported) {
  if (const auto error = schedule_tiled_attention(p.forward, s, supported)) return error;
  supported = supported && s.vectors && p.forward.head_dim <= kTiledAttentionBackwardHead && fits(p.rows) &&
              p.grad_row_stride % 4 == 0 && p.grad_batch_stride % 4 == 0 && aligned16(p.grad_output) &&
              aligned16(p.grad_q) && aligned16(p.grad_k) && aligned16(p.grad_v);
  return cudaSuccess;
}

cudaError_t schedule_half_attention_backward(const HalfAttentionBackwardParams& p, TiledAttentionSchedule& s,
                                             bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  if (facts.major != 9 || !facts.has_cluster() || (overrides.forced() && !overrides.forced("sm90"))) return cudaSuccess;
  if (p.head_dim < 8 || p.head_dim % 8 != 0 || p.head_dim > kHalfAttentionBackwardHead || p.length < 1) {
    return cudaSuccess;  // the copy engine moves 16 bytes
  }
  if (!fits(p.rows) || !aligned16(p.qkv) || !aligned16(p.grad_qkv)) return cudaSuccess;
  s = {};
  s.head = p.head_dim <= 64 ? 64 : kHalfAttentionBackwardHead;
  s.tiles = static_cast<int>(ceil_div(p.length, kTiledAttentionRows));
  const int64_t blocks = int64_t{s.tiles} * p.batch * p.heads;
  if (blocks < 1 || blocks > INT32_MAX) return cudaSuccess;
  s.blocks = static_cast<int>(blocks);
  supported = true;
  return cudaSuccess;
}

}  // namespace styleforge::cuda
