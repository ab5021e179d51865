// Backward, channels_last, one launch, every tensor read once (sm_90+): input and gradient are in the shared memory of
// the multiprocessors (resident.cuh). The unit's blocks exchange the sums of g and g * d (gradient.cuh) of every
// channel; then every thread has its vectors at hand for the gradient.
//
// The two passes of backward_channels_last.cu read both tensors twice and need three launches one behind the other.
#include "../common/launch.h"
#include "gradient.cuh"
#include "resident.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = kResidentThreads;

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_resident_kernel(const __grid_constant__ InstanceNormBackwardParams p,
                             const __grid_constant__ ResidentCut cut) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  using Place = ResidentPlace<kWidth>;
  static_assert(sizeof(V) == 16);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ __align__(16) float scratch[2][kThreads / kWarp * Place::kMaxChannels];
  __shared__ float2 groups[kThreads];
  __shared__ float2 total[Place::kMaxChannels];  // a unit's sums of g and g * d over its pixels
  const V* held_x = reinterpret_cast<const V*>(shared);
  const V* held_dy = held_x + cut.share * cut.lanes;
  const Place at(p, cut);
  const int lanes = cut.lanes;

  wait_for_predecessor();
#pragma unroll
  for (int chunk = 0; chunk < Place::kChunks; ++chunk) {
    at.copy(held_x, p.input, chunk, lanes);
    at.copy(held_dy, p.grad_output, chunk, lanes);
    copy_commit();
  }
  release_successor();
  const uint32_t token = cut.parts > 1 ? at.retract_pairs() : 0;

  // 1. sums
  ChannelFacts<kWidth, float> f = {};
  if (at.active) f = channel_facts<kWidth, float>(p, at.n, at.vector);
  const void* from_further = further_of(p);
  const auto before_norm = [&](int i, float (&g)[kWidth], float (&d)[kWidth]) {
    const V further = from_further != nullptr ? load_const<V>(from_further, at.index(i)) : V{};
    gradient_before_norm<false>(p, f, held_x[i * lanes + at.lane], held_dy[i * lanes + at.lane], further, g, d);
  };
  float sum_g[kWidth] = {}, sum_gd[kWidth] = {};
  at.chunks([&](int chunk) {
#pragma unroll 1
    for (int j = 0; j < at.per_chunk; ++j) {
      const int i = at.row + (chunk * at.per_chunk + j) * at.rows;
      if (i >= at.count) return;
      float g[kWidth], d[kWidth];
      before_norm(i, g, d);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        sum_g[k] += g[k];
        sum_gd[k] += g[k] * d[k];
      }
    }
  });
  at.sum_in_warp(sum_g, lanes, scratch[0]);
  at.sum_in_warp(sum_gd, lanes, scratch[1]);
  if (cut.parts > 1 && threadIdx.x == 0) grid_wait(token);  // before the barrier behind which is published
  __syncthreads();

  // 2. over the unit's blocks: groups of threads take parts by turns, then the groups in their order
  if (threadIdx.x < at.channels) {
    const float2 own = make_float2(at.sum_of_warps(scratch[0]), at.sum_of_warps(scratch[1]));
    if (cut.parts > 1) {
      publish(&at.pairs[at.part * at.channels + threadIdx.x], own);
    } else {
      total[threadIdx.x] = own;
    }
  }
  if (cut.parts > 1) {
    float2 sum = make_float2(0.0f, 0.0f);
    at.gather(cut.parts, [&](int, float2 pair) {
      sum.x += pair.x;
      sum.y += pair.y;
    });
    groups[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < at.channels) {
      const int count = static_cast<int>(blockDim.x) / at.channels;
      for (int g = 1; g < count; ++g) {
        sum.x += groups[g * at.channels + threadIdx.x].x;
        sum.y += groups[g * at.channels + threadIdx.x].y;
      }
      total[threadIdx.x] = sum;
    }
  }
  __syncthreads();
  if (at.part == 0 && threadIdx.x < at.channels) {
    const int64_t channel = static_cast<int64_t>(at.slice) * at.channels + threadIdx.x;
    if (channel < p.channels) {
      static_cast<float*>(p.grad_bias)[at.n * p.channels + channel] = total[threadIdx.x].x;
      static_cast<float*>(p.grad_weight)[at.n * p.channels + channel] =
          total[threadIdx.x].y * static_cast<const float*>(p.rstd)[at.n * p.channels + channel];
    }
  }

  // 3. the gradient
  float slope[kWidth], offset[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const float2 of = total[at.lane * kWidth + k];
    const GradientFactors<float> factors(f.scale[k], f.rstd[k], of.x, of.y * f.rstd[k], p.pixels);
    slope[k] = factors.slope;
    offset[k] = factors.offset;
  }
#pragma unroll 1
  for (int i = at.row; i < at.count; i += at.rows) {
    float g[kWidth], d[kWidth];
    before_norm(i, g, d);
    store_gradients<T, kWidth>(p, at.index(i), f.scale, slope, offset, g, d);
  }
#endif
}

}  // namespace

cudaError_t launch_backward_resident(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                     void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const ResidentCut cut{schedule.lanes, static_cast<int>(schedule.share), static_cast<int>(schedule.parts),
                        static_cast<float2*>(workspace)};
  const auto with = [&](auto* kernel, int64_t vectors) {
    const auto grid = static_cast<unsigned>(params.batch * ceil_div(vectors, schedule.lanes) * schedule.parts);
    return launch(kernel, dim3(grid), dim3(schedule.threads), schedule.shared_bytes, Together{1, schedule.parts > 1},
                  facts, stream, params, cut);
  };
  switch (params.dtype) {
    case DType::kFloat32:
      return with(backward_resident_kernel<float>, params.channels / kFullWidth<float>);
    case DType::kFloat16:
      return with(backward_resident_kernel<__half>, params.channels / kFullWidth<__half>);
    case DType::kBFloat16:
      return with(backward_resident_kernel<__nv_bfloat16>, params.channels / kFullWidth<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
