// channels_last, one launch, one read and one write (sm_90+): the tensor is in the shared memory of the multiprocessors
// (resident.cuh). Means first, then squares about the block's own mean, from what is held; the unit's blocks exchange
// (mean, M2) of every channel.
//
// Measured in half: 1x128x128x128 8.4 us (slabs 9.0, two passes 12.8), 8x128x64x64 9.9 (11.2, 14.3), 8x64x128x128 14.1
// (28.0, 20.9); 1x64x64x64 9.2 (5.1), as the exchange over the grid costs more than a cluster's barrier.
#include "../common/awaited_param.cuh"
#include "../common/launch.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "resident.cuh"

namespace styleforge::cuda {
namespace {

constexpr int kThreads = kResidentThreads;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    resident_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ ResidentCut cut) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr int kWidth = kFullWidth<T>;
  using V = Vec<T, kWidth>;
  using Place = ResidentPlace<kWidth>;
  static_assert(sizeof(V) == 16);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ __align__(16) float scratch[2][kThreads / kWarp * Place::kMaxChannels];
  __shared__ Moments<float> groups[kThreads];
  __shared__ float result[3][Place::kMaxChannels];  // mean, scale, shift
  const V* held = reinterpret_cast<const V*>(shared);
  const Place at(p, cut);
  const int lanes = cut.lanes;

  wait_for_predecessor();
#pragma unroll
  for (int chunk = 0; chunk < Place::kChunks; ++chunk) {
    at.copy(held, p.input, chunk, lanes);
    copy_commit();
  }
  release_successor();
  const uint32_t token = cut.parts > 1 ? at.retract_pairs() : 0;
  // Thread j < channels takes care of the slice's channel j; its parameters are on their way meanwhile.
  const int64_t channel = static_cast<int64_t>(at.slice) * at.channels + threadIdx.x;
  const bool owns = threadIdx.x < at.channels && channel < p.channels;
  const int64_t param = owns ? at.n * p.param_batch_stride + channel : 0;
  const AwaitedParam<float> weight(p.weight, p.param_dtype, param);
  const AwaitedParam<float> bias(p.bias, p.param_dtype, param);

  // 1. means of the block, then squares about them
  float sum[kWidth] = {};
  at.chunks([&](int chunk) {
#pragma unroll 2
    for (int j = 0; j < at.per_chunk; ++j) {
      const int i = at.row + (chunk * at.per_chunk + j) * at.rows;
      if (i < at.count) {
        const V v = held[i * lanes + at.lane];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[k] += to_acc(v.data[k]);
      }
    }
  });
  at.sum_in_warp(sum, lanes, scratch[0]);
  __syncthreads();
  const int pixels = static_cast<int>(p.pixels);
  const int own_pixels = at.pixels_of(at.part, cut.share, pixels);
  float mean = 0;  // of channel threadIdx.x
  if (threadIdx.x < at.channels) {
    mean = at.sum_of_warps(scratch[0]) / static_cast<float>(max(own_pixels, 1));
    result[0][threadIdx.x] = mean;
  }
  __syncthreads();
  float squares[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] = result[0][at.lane * kWidth + k];
#pragma unroll 2
  for (int i = at.row; i < at.count; i += at.rows) {
    const V v = held[i * lanes + at.lane];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float d = to_acc(v.data[k]) - sum[k];
      squares[k] += d * d;
    }
  }
  at.sum_in_warp(squares, lanes, scratch[1]);
  if (cut.parts > 1 && threadIdx.x == 0) grid_wait(token);  // before the barrier behind which is published
  __syncthreads();

  // 2. over the unit's blocks: groups of threads take parts by turns, then the groups in their order
  if (threadIdx.x < at.channels) {
    const float m2 = at.sum_of_warps(scratch[1]);
    if (cut.parts > 1) {
      publish(&at.pairs[at.part * at.channels + threadIdx.x], make_float2(mean, m2));
    } else {
      groups[threadIdx.x] = {static_cast<float>(own_pixels), mean, m2};
    }
  }
  if (cut.parts > 1) {
    Moments<float> merged;
    at.gather(cut.parts, [&](int part, float2 pair) {
      merged.add({static_cast<float>(at.pixels_of(part, cut.share, pixels)), pair.x, pair.y});
    });
    groups[threadIdx.x] = merged;
    __syncthreads();
  }
  if (threadIdx.x < at.channels) {
    const int count = cut.parts > 1 ? static_cast<int>(blockDim.x) / at.channels : 1;
    const auto each = [&](auto visit) {
#pragma unroll 4
      for (int g = 0; g < count; ++g) visit(groups[g * at.channels + threadIdx.x]);
    };
    const auto merged = merge_moments(static_cast<float>(pixels), each, [](float v) { return v; });
    const float rstd = merged.rstd(p.eps);
    result[0][threadIdx.x] = merged.mean;
    result[1][threadIdx.x] = rstd * weight.value(1.0f);
    result[2][threadIdx.x] = bias.value(0.0f);
    if (at.part == 0 && owns) store_statistics(p, at.n * p.channels + channel, merged.mean, rstd);
  }
  __syncthreads();

  // 3. normalise
  ChannelAffine<float, kWidth> affine;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    affine.mean[k] = result[0][at.lane * kWidth + k];
    affine.scale[k] = result[1][at.lane * kWidth + k];
    affine.shift[k] = result[2][at.lane * kWidth + k];
  }
  switch_finish(p, [&]<Finish kFinish>() {
#pragma unroll(kFinish == Finish::kPlain ? 4 : 1)
    for (int i = at.row; i < at.count; i += at.rows) {
      const V r = has_residual<kFinish>(p) ? load_const<V>(p.residual, at.index(i)) : V{};
      store(p.output, at.index(i), normalize<kFinish>(p, affine, held[i * lanes + at.lane], r));
    }
  });
#endif
}

}  // namespace

cudaError_t launch_resident(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                            cudaStream_t stream) {
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
      return with(resident_kernel<float>, params.channels / kFullWidth<float>);
    case DType::kFloat16:
      return with(resident_kernel<__half>, params.channels / kFullWidth<__half>);
    case DType::kBFloat16:
      return with(resident_kernel<__nv_bfloat16>, params.channels / kFullWidth<__nv_bfloat16>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
