// channels_last, one launch, one read and one write (sm_90+): what a block has of the tensor is in its threads'
// registers (held_channels.cuh). Every thread takes the moments of its channels in one sweep, while its vectors arrive;
// warps, blocks and the unit's blocks merge them.
//
// Deviations are taken from one of the values (a thread's first, the first block's mean), and M2 = squares - sum^2 / n:
// what cancels there is bounded by the number of values, which are few.
//
// Measured (H200, half, rotated buffers) against resident.cu: 1x128x128x128 8.7 -> 6.0 us, with a residual 10.9 -> 7.6;
// 8x128x64x64 11.3 -> 8.2; 8x64x128x128 17.1 -> 14.2, with a residual 26.3 -> 18.6. Loads of the residual before the
// exchange hide nothing: what they take away is the registers.

#include "../common/awaited_param.cuh"
#include "../common/launch.h"
#include "held_channels.cuh"
#include "moments.cuh"
#include "normalize.cuh"

namespace styleforge::cuda {
namespace {

#ifdef STYLEFORGE_HAS_CLUSTER
// (mean, M2) of `count` values and of those of another row.
struct MergeMoments {
  float count, share = 0, weight = 0;
  __device__ __forceinline__ void step(int offset) {
    const float other = __shfl_xor_sync(0xffffffffu, count, offset);
    const float total = count + other;
    share = __fdividef(other, fmaxf(total, 1.0f));
    weight = count * share;
    count = total;
  }
  __device__ __forceinline__ void operator()(float& mean, float& m2, float other_mean, float other_m2) const {
    const float delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * weight * delta;
  }
};
#endif

// Whether the steward is a warp of its own: a block of 17 warps has 96 registers a thread, one of 16 has 128.
constexpr bool is_apart(int vectors) { return vectors <= 8; }

template <typename T, int kEach>
__global__ void __launch_bounds__(kHeldChannelThreads + (is_apart(kEach) ? kWarp : 0), 1)
    held_channels_kernel(const __grid_constant__ InstanceNormParams p, const __grid_constant__ HeldCut cut) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr int kWidth = kFullWidth<T>;
  constexpr int kWarps = kHeldChannelThreads / kWarp;
  constexpr bool kApart = is_apart(kEach);
  using V = Vec<T, kWidth>;
  using Place = HeldPlace<kWidth, kApart>;
  using Row = Vec<float, 4>;
  // Vectors of the residual that a thread asks for together.
  constexpr int kBatch = 4;
  __shared__ float2 warps[kWarps * Place::kMaxChannels];
  __shared__ float2 groups[kHeldChannelThreads + (kApart ? kWarp : 0)];
  __shared__ float counts[kWarps];
  __shared__ __align__(16) float facts[3][Place::kMaxChannels];  // mean, scale, shift
  const Place at(p, cut);
  const bool alone = cut.parts == 1;

  wait_for_predecessor();
  uint4 x[kEach];
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kEach; ++u) load_if(x[u], at.at(p.input, u), at.present(u));
  };
  const int channel = static_cast<int>(threadIdx.x);  // the steward's
  const int64_t of_tensor = static_cast<int64_t>(at.slice) * at.channels + channel;
  const bool owns = channel < at.channels && of_tensor < p.channels;
  AwaitedParam<float> weight, bias;
  uint32_t token = 0;
  if (!at.is_steward()) {
    load();
  } else {
    const int64_t param = owns ? at.n * p.param_batch_stride + of_tensor : 0;
    if (!alone) token = grid_phase();
    if (!alone && channel < at.channels) retract(&at.pairs[at.part * at.channels + channel]);
    if constexpr (!kApart) load();
    __syncwarp();
    if (!alone && channel == 0) grid_arrive_unanswered();
    weight = {p.weight, p.param_dtype, param};
    bias = {p.bias, p.param_dtype, param};
  }
  release_successor();

  // 1. moments
  if (at.has_data()) {
    float first[kWidth], mean[kWidth] = {}, m2[kWidth] = {};
    int count = 0;
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const V v = *reinterpret_cast<const V*>(&x[u]);
      const bool present = at.present(u);
      count += present ? 1 : 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (u == 0) {
          first[k] = to_acc(v.data[k]);
        } else {
          const float d = present ? to_acc(v.data[k]) - first[k] : 0.0f;
          mean[k] += d;
          m2[k] += d * d;
        }
      }
      // As words from here on, converted again in the end: all vectors at a time are more registers than there are.
      asm volatile("" : "+r"(x[u].x), "+r"(x[u].y), "+r"(x[u].z), "+r"(x[u].w));
    }
    MergeMoments merge{static_cast<float>(count)};
    const float share = __fdividef(1.0f, fmaxf(merge.count, 1.0f));
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float shift = mean[k] * share;
      m2[k] = relu_acc(m2[k] - mean[k] * shift);
      mean[k] = first[k] + shift;
    }
    at.merge_in_warp(mean, m2, merge, warps);
    // The rows of a warp, which are the same for all of its channels.
    float in_warp = merge.count;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      if (offset >= at.lanes) in_warp += __shfl_xor_sync(0xffffffffu, in_warp, offset);
    }
    if (at.thread % kWarp == 0) counts[at.thread / kWarp] = in_warp;
  }
  if (!alone && channel == 0) grid_wait(token);  // before the barrier behind which is published
  __syncthreads();

  // 2. over the block's warps and the unit's blocks
  const int pixels = static_cast<int>(p.pixels);
  const bool adds = channel < at.channels;
  float2 own = make_float2(0.0f, 0.0f);
  if (adds) {
    const float pilot = warps[channel].x;
    float2 sum = make_float2(0.0f, 0.0f);
    at.each_warp(warps, channel, [&](float2 pair, int warp) {
      const float count = warp * kWarp < at.threads ? counts[warp] : 0.0f;
      const float d = count > 0.0f ? pair.x - pilot : 0.0f;
      sum.x += count * d;
      sum.y += pair.y + count * d * d;
    });
    const float shift = __fdividef(sum.x, static_cast<float>(max(min(cut.share, pixels - at.part * cut.share), 1)));
    own = make_float2(pilot + shift, relu_acc(sum.y - sum.x * shift));
    if (!alone) publish(&at.pairs[at.part * at.channels + channel], own);
  }
  if (!alone) {
    float2 sum = make_float2(0.0f, 0.0f);
    const float2 lead = at.template gather<true>(cut.parts, [&](float mean, float m2, float lead, int part) {
      const float count = static_cast<float>(min(cut.share, pixels - part * cut.share));
      const float d = mean - lead;
      sum.x += count * d;
      sum.y += m2 + count * d * d;
    });
    groups[threadIdx.x] = sum;
    __syncthreads();
    if (adds) {
      sum = at.sum_of_groups(groups, channel);
      const float shift = sum.x * reciprocal(static_cast<float>(pixels));
      own = make_float2(lead.x + shift, relu_acc(sum.y - sum.x * shift));
    }
  }
  if (adds) {
    const Moments<float> whole{static_cast<float>(pixels), own.x, own.y};
    const float rstd = whole.rstd(p.eps);
    facts[0][channel] = own.x;
    facts[1][channel] = rstd * weight.value(1.0f);
    facts[2][channel] = bias.value(0.0f);
    if (at.part == 0 && owns) store_statistics(p, at.n * p.channels + of_tensor, own.x, rstd);
  }
  __syncthreads();
  if (!at.has_data()) return;

  // 3. normalise
  ChannelAffine<float, kWidth> affine;
  const auto fetch = [&](int which, float (&to)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) {
      const Row row = *reinterpret_cast<const Row*>(&facts[which][at.lane * kWidth + k]);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[k + j] = row.data[j];
    }
  };
  fetch(0, affine.mean);
  fetch(1, affine.scale);
  fetch(2, affine.shift);
  switch_finish(p, [&]<Finish kFinish>() {
#pragma unroll
    for (int base = 0; base < kEach; base += kBatch) {
      uint4 residual[kBatch] = {};
      if (has_residual<kFinish>(p)) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) load_if(residual[u], at.at(p.residual, base + u), at.present(base + u));
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!at.present(base + u)) return;
        const V v = *reinterpret_cast<const V*>(&x[base + u]);
        store(p.output, at.index(base + u),
              normalize<kFinish>(p, affine, v, *reinterpret_cast<const V*>(&residual[u])));
      }
    }
  });
#endif
}

}  // namespace

cudaError_t launch_held_channels(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto go = [&]<typename T, int kEach>(dim3 grid, const HeldCut& cut) {
    const int threads = schedule.threads + (is_apart(kEach) ? kWarp : 0);
    return launch(held_channels_kernel<T, kEach>, grid, dim3(threads), 0, Together{1, schedule.parts > 1}, facts,
                  stream, params, cut);
  };
  return launch_held(params, schedule, workspace, go);
}

}  // namespace styleforge::cuda
