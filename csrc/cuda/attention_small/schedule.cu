// Which attention blocks the kernels take, and how they are cut: a function of shape, type and device.
#include <algorithm>

#include "../common/overrides.h"
#include "dispatch.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

// STYLEFORGE_SMALL_ATTENTION_TUNE="rows=16,out_rows=16,halves=2,together=1,whole=1,block=16" (halves, whole: 1 never,
// 2 always; together: 1 never)
constexpr int kReserved = 4096;             // what the kernel declares by itself, and what the system takes
constexpr int64_t kMostRows = 1 << 19;      // a grid has 65535 tiles of them
constexpr int kMostBlocks = 65535;          // in a grid's second and third dimension
constexpr int64_t kFewNumbers = 256 * 128;  // in the input
constexpr const char* kTuneVariable = "STYLEFORGE_SMALL_ATTENTION_TUNE";

int64_t blocks(const SmallAttentionParams& p, int rows) { return ceil_div(p.length, rows) * p.heads * p.batch; }

// Queries of a block: few, as long as that leaves multiprocessors without a block. float32 spends its time on long
// sequences in attending, which fewer rows make shorter; 16 bits on reading keys and values, which they make more.
int rows_of_block(const SmallAttentionParams& p, const DeviceFacts& facts) {
  constexpr int kLong = 256;
  const bool attending = p.dtype == DType::kFloat32 && p.length > kLong;
  const int64_t most = attending ? facts.multiprocessors : facts.multiprocessors * 3 / 4;
  return blocks(p, 16) <= most ? 16 : 32;
}

// Where these kernels were seen to be faster than ATen's, on one H200: 1 x 128 to 512 x 128, 2 x 256 x 128, 1 x 256 x
// 256 in 4 heads take 0.20 to 0.32 of the time in float32 and 0.49 to 0.63 in 16 bits. More work than the device takes
// at once is for kernels that read weights fewer times.
bool pays(const SmallAttentionParams& p, int rows, const DeviceFacts& facts) {
  constexpr int64_t kTokens = 512;
  constexpr int kEmbed = 256, kHeadDim = 64;
  return facts.has_cluster() && int64_t{p.batch} * p.length <= kTokens && p.embed <= kEmbed && p.head_dim <= kHeadDim &&
         blocks(p, rows) <= facts.multiprocessors;
}

// Shared memory of a block, the most of all its launches.
template <typename Math>
int shared_bytes(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  return switch_heads<Math>(s, [&]<int kHeadDim, int kRows>() {
    return std::max<int>(ProductTile<Math, kRows, 3 * kHeadDim>::kRingBytes,
                         padded_length(p.length) + HeadTile<Math, kHeadDim, kRows>::bytes(p.length));
  });
}
int shared_bytes(const SmallAttentionParams& p, const SmallAttentionSchedule& s) {
  return p.dtype == DType::kFloat32 ? shared_bytes<Ieee>(p, s) : shared_bytes<Half>(p, s);
}

}  // namespace

cudaError_t schedule_small_attention(const SmallAttentionParams& p, SmallAttentionSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  s = {};
  s.whole_rows = small_whole_rows(p, facts, overrides);
  const bool together = overrides.forced("together");
  const bool forced = overrides.forced("dependent") || together;
  if ((overrides.forced() && !forced) || facts.major < 8 || facts.compiled_for < 80) return cudaSuccess;
  if (p.dtype == DType::kFloat64 || p.head_dim % 8 != 0 || p.head_dim > 128) return cudaSuccess;
  if (p.length < 1 || p.length > kSmallMaxLength || p.batch < 1 || p.batch > kMostBlocks || p.heads > kMostBlocks ||
      int64_t{p.batch} * p.length > kMostRows) {
    return cudaSuccess;
  }

  const auto tuned = [&](const char* key, int64_t chosen) { return static_cast<int>(overrides.tuned(key, chosen)); };
  s.head_dim = p.head_dim <= 32 ? 32 : p.head_dim <= 64 ? 64 : 128;
  const bool wide = s.head_dim == 128 && p.dtype == DType::kFloat32;
  s.rows = wide ? 32 : tuned("rows", rows_of_block(p, facts));
  // Twice as many blocks of half the work: 1 x 256 x 256 in float32 takes 14.5 us instead of 16.0.
  const bool room = blocks(p, s.rows) * 2 <= facts.multiprocessors;
  s.halves = s.head_dim == 64 && p.head_dim % 16 == 0 && tuned("halves", room ? 2 : 1) == 2;
  // More rows read the weights fewer times, which is a matter of 16 bits: in float32 there is more to compute.
  const bool few = p.dtype == DType::kFloat32 || int64_t{p.batch} * p.length * p.embed <= kFewNumbers;
  s.out_rows = tuned("out_rows", few ? 16 : 32);
  supported = (forced || pays(p, s.rows, facts)) && shared_bytes(p, s) <= facts.max_shared_per_block - kReserved;
  s.together = tuned("together", 2) != 1 && !overrides.forced("dependent") && small_together_takes(p, s, facts);
  if (together) supported = supported && s.together;
  return cudaSuccess;
}

bool small_attention_takes_memory(const SmallAttentionParams& p) {
  const int64_t vector = 16 / static_cast<int64_t>(size_of(p.dtype));
  if (p.input_stride[0] % vector != 0 || p.input_stride[1] % vector != 0) return false;
  return aligned16(p.input) && aligned16(p.qkv_weight) && aligned16(p.qkv_bias) && aligned16(p.out_weight) &&
         aligned16(p.out_bias);
}

cudaError_t launch_small_attention(const SmallAttentionParams& p, SmallAttentionSchedule& s, cudaStream_t stream) {
  if (s.whole_rows > 0) return launch_small_whole(p, s, stream);
  if (s.together) {
    auto status = cudaStreamCaptureStatusNone;
    if (const auto error = cudaStreamIsCapturing(stream, &status)) return error;
    s.together = status == cudaStreamCaptureStatusNone;
  }
  if (s.together) return launch_small_together(p, s, stream);
  const auto heads = p.dtype == DType::kFloat32 ? launch_small_heads_float32 : launch_small_heads_16_bit;
  if (const auto error = heads(p, s, stream)) return error;
  return launch_small_output(p, s, stream);
}

}  // namespace styleforge::cuda
