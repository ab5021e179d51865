// From a schedule to the kernels of a head.
#pragma once

#include "heads.cuh"

namespace styleforge::cuda {

template <typename Math, int kHeadDim, int kRows>
cudaError_t launch_heads(const SmallAttentionParams& p, const SmallAttentionSchedule& s, cudaStream_t stream) {
  using Block = HeadBlock<Math, kHeadDim, kRows>;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const int padded = padded_length(p.length);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.length, kRows)), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  const auto project = [&]<int kColumns>(const SmallAttentionParams& projected) {
    return launch(small_project_kernel<Math, kColumns, kRows>, dim3(grid.x, projected.heads, grid.z),
                  dim3(kSmallThreads), ProductTile<Math, kRows, 3 * kColumns>::kRingBytes, 1, facts, stream, projected);
  };
  if (s.halves) {  // to a projection, a head is two of half its width
    if constexpr (kHeadDim == 64) {
      SmallAttentionParams halves = p;
      halves.heads *= 2;
      halves.head_dim /= 2;
      if (const auto error = project.template operator()<kHeadDim / 2>(halves)) return error;
    } else {
      return cudaErrorInvalidValue;
    }
  } else if (const auto error = project.template operator()<kHeadDim>(p)) {
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
  return switch_heads<Math>(
      s, [&]<int kHeadDim, int kRows>() { return launch_heads<Math, kHeadDim, kRows>(p, s, stream); });
}

}  // namespace styleforge::cuda
