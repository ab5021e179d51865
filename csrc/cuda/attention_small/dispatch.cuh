// From a schedule to the kernels of a head.
#pragma once

#include "heads.cuh"

namespace styleforge::cuda {

template <typename Math, int kHeadDim, int kRows>
cudaError_t launch_heads(const SmallAttentionParams& p, cudaStream_t stream) {
  using Block = HeadBlock<Math, kHeadDim, kRows>;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int padded = padded_length(p.length);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.length, kRows)), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  if (const auto error = launch(small_project_kernel<Math, kHeadDim, kRows>, grid, dim3(kSmallThreads),
                                Block::Product::kRingBytes, 1, facts, stream, p)) {
    return error;
  }
  return launch(small_attend_kernel<Math, kHeadDim, kRows>, grid, dim3(kSmallThreads),
                static_cast<size_t>(padded + Block::Tile::bytes(p.length)), 1, facts, stream, p, padded);
}

// Calls body.template operator()<kHeadDim, kRows>() as the schedule says.
template <typename Math, typename Body>
auto switch_heads(const SmallAttentionSchedule& s, const Body& body) {
  switch (s.head_dim) {
    case 32:
      return s.rows == 16 ? body.template operator()<32, 16>() : body.template operator()<32, 32>();
    case 64:
      return s.rows == 16 ? body.template operator()<64, 16>() : body.template operator()<64, 32>();
    default:
      // Sixteen rows of float32 leave a warp fewer keys of a chunk than the tiles come in.
      if constexpr (sizeof(typename Math::T) == 2) {
        if (s.rows == 16) return body.template operator()<128, 16>();
      }
      return body.template operator()<128, 32>();
  }
}

template <typename Math>
cudaError_t launch_heads(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  return switch_heads<Math>(s,
                            [&]<int kHeadDim, int kRows>() { return launch_heads<Math, kHeadDim, kRows>(p, stream); });
}

}  // namespace styleforge::cuda
