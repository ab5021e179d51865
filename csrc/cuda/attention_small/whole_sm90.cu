// The launch of whole.cuh, and which shapes it takes.
#include <algorithm>

#include "../common/overrides.h"
#include "../common/tensor_map.h"
#include "whole.cuh"

namespace styleforge::cuda {
namespace {

template <typename Tile>
cudaError_t launch_tile(const SmallAttentionParams& p, const DeviceFacts& facts, cudaStream_t stream) {
  using Size = cuuint64_t;
  using Box = cuuint32_t;
  constexpr Size kSize = 2, kBoxes = Tile::kBoxes;
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  constexpr auto kFetch = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const Size embed = Tile::kEmbed, row = static_cast<Size>(p.input_stride[1]) * kSize;
  const Size sample = p.batch == 1 ? row * static_cast<Size>(p.length) : static_cast<Size>(p.input_stride[0]) * kSize;
  CUtensorMap queries, tokens, qkv_weight, out_weight;
  const auto map_tokens = [&](Box rows, CUtensorMap& map) {
    return tensor_map<4>(p.dtype, p.input,
                         {kBoxColumns, static_cast<Size>(p.length), kBoxes, static_cast<Size>(p.batch)},
                         {row, kBoxRowBytes, sample}, {kBoxColumns, rows, kBoxes, 1}, map, kSwizzle, kFetch);
  };
  const auto map_weight = [&](const void* weight, Size rows, CUtensorMap& map) {
    return tensor_map<3>(p.dtype, weight, {kBoxColumns, rows, kBoxes}, {embed * kSize, kBoxRowBytes},
                         {kBoxColumns, Tile::kHeadDim, kBoxes}, map, kSwizzle, kFetch);
  };
  if (const auto error = map_tokens(Tile::kRows, queries)) return error;
  if (const auto error = map_tokens(128, tokens)) return error;
  if (const auto error = map_weight(p.qkv_weight, 3 * embed, qkv_weight)) return error;
  if (const auto error = map_weight(p.out_weight, embed, out_weight)) return error;
  const dim3 grid(Tile::kHeads, static_cast<unsigned>(ceil_div(p.length, Tile::kRows)), static_cast<unsigned>(p.batch));
  return launch(small_whole_kernel<Tile>, grid, dim3(kWholeThreads), Tile::kBytes, Tile::kHeads, facts, stream, p,
                queries, tokens, qkv_weight, out_weight);
}

template <typename T, int kEmbed, int kHeadDim, int kRows>
cudaError_t launch_rows(const SmallAttentionParams& p, const DeviceFacts& facts, cudaStream_t stream) {
  if (p.length <= 128) return launch_tile<WholeTile<T, kEmbed, kHeadDim, kRows, 1>>(p, facts, stream);
  if (p.length <= 256) return launch_tile<WholeTile<T, kEmbed, kHeadDim, kRows, 2>>(p, facts, stream);
  if constexpr (kEmbed == 128) return launch_tile<WholeTile<T, kEmbed, kHeadDim, kRows, 4>>(p, facts, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_dtype(const SmallAttentionParams& p, int rows, const DeviceFacts& facts, cudaStream_t stream) {
  if (p.embed == 128) {
    return rows == 16 ? launch_rows<T, 128, 32, 16>(p, facts, stream) : launch_rows<T, 128, 32, 32>(p, facts, stream);
  }
  if (p.head_dim == 32) {
    return rows == 16 ? launch_rows<T, 256, 32, 16>(p, facts, stream) : launch_rows<T, 256, 32, 32>(p, facts, stream);
  }
  return rows == 16 ? launch_rows<T, 256, 64, 16>(p, facts, stream) : launch_rows<T, 256, 64, 32>(p, facts, stream);
}

static_assert(WholeTile<__half, 128, 32, 32, 4>::kBytes <= 227 * 1024);
static_assert(WholeTile<__half, 256, 32, 32, 2>::kBytes <= 227 * 1024);
static_assert(WholeTile<__half, 256, 64, 32, 2>::kBytes <= 227 * 1024);

}  // namespace

int small_whole_rows(const SmallAttentionParams& p, const DeviceFacts& facts, const Overrides& overrides) {
  constexpr int kMostBatch = 65535;  // in a grid's third dimension
  // "whole": 1 never, 2 always; "block": queries of a block
  const auto wish = overrides.tuned("whole", 0);
  if (wish == 1 || (overrides.forced() && !overrides.forced("whole"))) return 0;
  if (facts.major != 9 || !facts.has_cluster() || facts.max_shared_per_block < 227 * 1024) return 0;
  if ((p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) || p.batch > kMostBatch) return 0;
  const bool narrow = p.embed == 128 && p.head_dim == 32 && p.length <= 512;
  const bool wide = p.embed == 256 && (p.head_dim == 32 || p.head_dim == 64) && p.length <= 256;
  if (!narrow && !wide) return 0;
  // Clusters of four and eight find room on ten of eleven multiprocessors. Blocks of half the queries are done sooner.
  const int64_t room = facts.multiprocessors - facts.multiprocessors / 11;
  const auto blocks = [&](int rows) { return ceil_div(p.length, rows) * p.batch * p.heads; };
  const int rows = overrides.tuned("block", blocks(16) <= room ? 16 : 32) == 16 ? 16 : 32;
  // More blocks than that come one after the other, and each has all tokens of its sample to read. Seen on one H200 to
  // be faster than all else: 1 to 8 x 128 x 128 take 0.27 to 0.43 of nn.MultiheadAttention's time, 16 x 128 x 128 0.59,
  // 8 x 256 x 128 0.86, 4 x 256 x 256 0.85; 32 x 128 x 128, 4 x 512 x 128 and 8 x 256 x 256 are slower or no faster.
  const int64_t most = facts.multiprocessors * (narrow && p.length <= 256 ? 2 : 1);
  return wish == 2 || overrides.forced() || blocks(32) <= most ? rows : 0;
}

bool small_whole_takes_memory(const SmallAttentionParams& p) {
  if (!aligned16(p.input) || !aligned16(p.qkv_weight) || !aligned16(p.out_weight)) return false;
  return p.input_stride[1] > 0 && p.input_stride[1] % 8 == 0 &&
         (p.batch == 1 || (p.input_stride[0] > 0 && p.input_stride[0] % 8 == 0));
}

cudaError_t launch_small_whole(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s.whole_rows, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s.whole_rows, facts, stream);
}

}  // namespace styleforge::cuda
