// Which attention blocks the kernels take, and how they are cut: a function of shape, type and device.
#include <algorithm>

#include "../common/overrides.h"
#include "dispatch.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

// STYLEFORGE_SMALL_ATTENTION_TUNE="rows=16,cluster=8,out_rows=16"
constexpr int kReserved = 4096;         // what the kernel declares by itself, and what the system takes
constexpr int64_t kMostRows = 1 << 19;  // a grid has 65535 tiles of them
constexpr const char* kTuneVariable = "STYLEFORGE_SMALL_ATTENTION_TUNE";

// Where these kernels are faster than ATen's.
bool pays(const SmallAttentionParams& p) { return p.length <= 512 && p.embed <= 512; }

// Shared memory of a block, where it projects and attends.
template <typename Math>
int shared_bytes(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  return switch_heads<Math>(s, [&]<int kHeadDim, int kRows>() {
    return padded_length(p.length) + std::max(ProductTile<Math, kRows, 3 * kHeadDim>::kRingBytes,
                                              HeadTile<Math, kHeadDim, kRows>::bytes(p.length));
  });
}
int shared_bytes(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  return p.dtype == DType::kFloat32 ? shared_bytes<Ieee>(p, s) : shared_bytes<Half>(p, s);
}

int power_of_two_above(int64_t value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

}  // namespace

cudaError_t schedule_small_attention(const SmallAttentionParams& p, SmallAttentionSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  const bool cluster = overrides.forced("cluster"), dependent = overrides.forced("dependent");
  const bool forced = cluster || dependent;
  if ((overrides.forced() && !forced) || facts.major < 8) return cudaSuccess;
  if (p.dtype == DType::kFloat64 || p.head_dim % 8 != 0 || p.head_dim > 128) return cudaSuccess;
  if (p.length < 1 || p.length > kSmallMaxLength || p.batch < 1 || p.batch > 65535 || p.heads > 65535)
    return cudaSuccess;
  if (!forced && !pays(p)) return cudaSuccess;
  if (int64_t{p.batch} * p.length > kMostRows) return cudaSuccess;

  const auto tuned = [&](const char* key, int64_t chosen) { return static_cast<int>(overrides.tuned(key, chosen)); };
  s = {};
  s.head_dim = p.head_dim <= 32 ? 32 : p.head_dim <= 64 ? 64 : 128;
  const bool wide = s.head_dim == 128 && p.dtype == DType::kFloat32;
  s.rows = wide ? 32 : tuned("rows", p.length <= 128 ? 16 : 32);
  const auto fits = [&] { return shared_bytes(p, s) <= facts.max_shared_per_block - kReserved; };
  s.cluster = power_of_two_above(ceil_div(p.length, s.rows));
  if (dependent || !facts.has_cluster() || s.cluster > kSmallMaxCluster || !fits()) s.cluster = 0;
  if (cluster && s.cluster == 0) return cudaSuccess;
  s.out_rows = tuned("out_rows", p.batch * p.length <= 256 ? 16 : 32);
  supported = fits();
  return cudaSuccess;
}

bool small_attention_takes_memory(const SmallAttentionParams& p) {
  const int64_t vector = 16 / static_cast<int64_t>(size_of(p.dtype));
  if (p.input_stride[0] % vector != 0 || p.input_stride[1] % vector != 0) return false;
  return aligned16(p.input) && aligned16(p.qkv_weight) && aligned16(p.qkv_bias) && aligned16(p.out_weight) &&
         aligned16(p.out_bias);
}

cudaError_t launch_small_attention(const SmallAttentionParams& p, const SmallAttentionSchedule& s,
                                   cudaStream_t stream) {
  const auto heads = p.dtype == DType::kFloat32 ? launch_small_heads_float32 : launch_small_heads_16_bit;
  if (const auto error = heads(p, s, stream)) return error;
  return launch_small_output(p, s, stream);
}

}  // namespace styleforge::cuda
