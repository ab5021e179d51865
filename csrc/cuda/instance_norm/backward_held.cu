// Backward, channels_last, one launch, every tensor read once (sm_90+): what a block has of gradient and input is in
// its threads' registers (held_channels.cuh), or the input in shared memory where that is too much for them. For no
// activation and ReLU: there the gradient before the norm is the one that came in, or zero, and takes its place, so
// that nothing is computed twice. The others: backward_resident.cu.
//
// That kernel's clocks went into instructions and latency, not into memory: every thread unpacked, normalised and
// masked its vectors twice, one at a time; asked for 32 numbers of its channels behind its copies; divided by the
// pixels 16 times; and took 48 shuffles where halves of what threads have are handed over in 14. What is left are three
// phases one behind the other: loads, exchange (about a microsecond), stores.
//
// Measured (H200, rotated buffers): 1x128x128x128 in half 13.1 -> 7.1 us, in float 13.7 -> 10.3; 8x128x64x64 in
// half 19.5
// -> 12.6; 8x64x128x128 in half, which fits no shared memory twice, 46.0 (two passes) -> 22.5; 1x64x256x256 in
// float 32.6
// -> 19.3. From eight vectors a thread on, the input in shared memory is as fast as in registers, which were too few.
//

#include "../common/launch.h"
#include "gradient.cuh"
#include "held_channels.cuh"

namespace styleforge::cuda {
namespace {

// Whether the steward is a warp of its own: a block of 17 warps has 96 registers a thread, one of 16 has 128.
constexpr bool is_apart(int vectors) { return vectors <= kHeldBackwardVectors; }

template <typename T, int kEach, bool kFromOutput>
__global__ void __launch_bounds__(kHeldChannelThreads + (is_apart(kEach) ? kWarp : 0), 1)
    backward_held_kernel(const __grid_constant__ InstanceNormBackwardParams p, const __grid_constant__ HeldCut cut) {
#ifdef STYLEFORGE_HAS_CLUSTER
  constexpr bool kSharedInput = kEach > kHeldBackwardVectors;
  constexpr int kWidth = kFullWidth<T>;
  constexpr int kWarps = kHeldChannelThreads / kWarp;
  using V = Vec<T, kWidth>;
  constexpr bool kApart = is_apart(kEach);
  using Place = HeldPlace<kWidth, kApart>;
  using Row = Vec<float, 4>;
  // Vectors that a thread waits for together where copies or further loads come in between.
  constexpr int kBatch = 4;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float2 warps[kWarps * Place::kMaxChannels];
  __shared__ float2 groups[kHeldChannelThreads + (kApart ? kWarp : 0)];
  __shared__ __align__(16) float facts[5][Place::kMaxChannels];  // mean, scale, shift; slope, offset
  const Place at(p, cut);
  const bool alone = cut.parts == 1;
  uint4* held = reinterpret_cast<uint4*>(shared) + at.thread;  // the thread's vectors, `threads` apart

  wait_for_predecessor();
  uint4 x[kSharedInput ? 1 : kEach], dy[kEach], output[kFromOutput ? kBatch : 1];
  const auto load_output = [&](int base) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) load_if(output[u], at.at(p.saved_output, base + u), at.present(base + u));
  };
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if constexpr (kSharedInput) {
        copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(held + u * at.threads)), at.at(p.input, u),
                   at.present(u), true);
        if (u % kBatch == kBatch - 1) copy_commit();
      } else {
        load_if(x[u], at.at(p.input, u), at.present(u));
      }
      load_if(dy[u], at.at(p.grad_output, u), at.present(u));
    }
    if constexpr (kFromOutput) load_output(0);
  };
  const int channel = static_cast<int>(threadIdx.x);  // the steward's
  float rstd = 0;
  uint32_t token = 0;
  if (!at.is_steward()) {
    load();
  } else {
    const int64_t of_tensor = static_cast<int64_t>(at.slice) * at.channels + channel;
    const bool owns = channel < at.channels && of_tensor < p.channels;
    const int64_t fact = owns ? at.n * p.channels + of_tensor : 0;
    const int64_t param = owns ? at.n * p.param_batch_stride + of_tensor : 0;
    if (!alone) token = grid_phase();
    if (!alone && channel < at.channels) retract(&at.pairs[at.part * at.channels + channel]);
    const float mean = static_cast<const float*>(p.mean)[fact];
    rstd = static_cast<const float*>(p.rstd)[fact];
    const float weight = load_param(p.weight, p.param_dtype, param, 1.0f);
    const float bias = load_param(p.bias, p.param_dtype, param, 0.0f);
    if constexpr (!kApart) load();
    __syncwarp();
    if (!alone && channel == 0) grid_arrive_unanswered();
    if (channel < at.channels) {
      facts[0][channel] = mean;
      facts[1][channel] = rstd * weight;
      facts[2][channel] = bias;
    }
  }
  release_successor();
  __syncthreads();

  const auto fetch = [&](int which, float (&to)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) {
      const Row row = *reinterpret_cast<const Row*>(&facts[which][at.lane * kWidth + k]);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[k + j] = row.data[j];
    }
  };
  const auto input = [&](int u) {
    uint4 raw;
    if constexpr (kSharedInput) {
      raw = held[u * at.threads];
    } else {
      raw = x[u];
    }
    return *reinterpret_cast<const V*>(&raw);
  };

  // 1. sums, and what the gradient before the norm is
  float mean[kWidth];
  if (at.has_data()) {
    float scale[kWidth], shift[kWidth], sum_g[kWidth] = {}, sum_gd[kWidth] = {};
    fetch(0, mean);
    if constexpr (!kFromOutput) {
      fetch(1, scale);
      fetch(2, shift);
    }
    const auto sums = [&]<bool kRelu>() {
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        if (kSharedInput && u % kBatch == 0) copy_wait_but(kEach / kBatch - 1 - u / kBatch);
        if (kFromOutput && u > 0 && u % kBatch == 0) load_output(u);
        const V v = input(u);
        const V of_gradient = *reinterpret_cast<const V*>(&dy[u]);
        [[maybe_unused]] const V y = *reinterpret_cast<const V*>(&output[kFromOutput ? u % kBatch : 0]);
        float g[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          g[k] = to_acc(of_gradient.data[k]);
          const float d = to_acc(v.data[k]) - mean[k];
          if constexpr (kRelu) {
            const float before = kFromOutput ? to_acc(y.data[k]) : d * scale[k] + shift[k];
            g[k] = before <= 0.0f ? 0.0f : g[k];
          }
          sum_g[k] += g[k];
          sum_gd[k] += g[k] * d;
        }
        if constexpr (kRelu) {
          const V masked = rounded<T>(g);
          dy[u] = *reinterpret_cast<const uint4*>(&masked);
        }
        // As words from here on, converted again in the end: all vectors at a time are more registers than there are.
        asm volatile("" : "+r"(dy[u].x), "+r"(dy[u].y), "+r"(dy[u].z), "+r"(dy[u].w));
        if constexpr (!kSharedInput) asm volatile("" : "+r"(x[u].x), "+r"(x[u].y), "+r"(x[u].z), "+r"(x[u].w));
      }
    };
    if (p.activation == Activation::kRelu) {
      sums.template operator()<true>();
    } else {
      sums.template operator()<false>();
    }
    at.merge_in_warp(sum_g, sum_gd, AddPairs{}, warps);
  }
  if (!alone && channel == 0) grid_wait(token);  // before the barrier behind which is published
  __syncthreads();

  // 2. over the unit's blocks
  const bool adds = channel < at.channels;
  float2 total = make_float2(0.0f, 0.0f);
  if (adds) {
    at.each_warp(warps, channel, [&](float2 pair, int) {
      total.x += pair.x;
      total.y += pair.y;
    });
    if (!alone) publish(&at.pairs[at.part * at.channels + channel], total);
  }
  if (!alone) {
    float2 sum = make_float2(0.0f, 0.0f);
    at.template gather<false>(cut.parts, [&](float g, float gd, float, int) {
      sum.x += g;
      sum.y += gd;
    });
    groups[threadIdx.x] = sum;
    __syncthreads();
    if (adds) total = at.sum_of_groups(groups, channel);
  }
  if (adds) {
    const float weight_gradient = total.y * rstd;
    const GradientFactors<float> factors(facts[1][channel], rstd, total.x, weight_gradient, p.pixels);
    facts[3][channel] = factors.slope;
    facts[4][channel] = factors.offset;
    const int64_t of_tensor = static_cast<int64_t>(at.slice) * at.channels + channel;
    if (at.part == 0 && of_tensor < p.channels) {
      static_cast<float*>(p.grad_bias)[at.n * p.channels + of_tensor] = total.x;
      static_cast<float*>(p.grad_weight)[at.n * p.channels + of_tensor] = weight_gradient;
    }
  }
  __syncthreads();
  if (!at.has_data()) return;

  // 3. the gradient
  float scale[kWidth], slope[kWidth], offset[kWidth];
  fetch(1, scale);
  fetch(3, slope);
  fetch(4, offset);
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    if (!at.present(u)) break;
    const V v = input(u);
    const V g = *reinterpret_cast<const V*>(&dy[u]);
    float d[kWidth], gradient[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      gradient[k] = to_acc(g.data[k]);
      d[k] = to_acc(v.data[k]) - mean[k];
    }
    store(p.grad_input, at.index(u), input_gradient<T>(scale, slope, offset, gradient, d));
    if (p.grad_residual != nullptr) store(p.grad_residual, at.index(u), g);
  }
#endif
}

}  // namespace

cudaError_t launch_backward_held(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool from_output = params.activation != Activation::kNone && params.saved_output != nullptr;
  const auto go = [&]<typename T, int kEach>(dim3 grid, const HeldCut& cut) {
    auto* kernel = from_output ? backward_held_kernel<T, kEach, true> : backward_held_kernel<T, kEach, false>;
    const int threads = schedule.threads + (is_apart(kEach) ? kWarp : 0);
    const size_t bytes = kEach > kHeldBackwardVectors ? size_t{16} * kEach * schedule.threads : 0;
    return launch(kernel, grid, dim3(threads), bytes, Together{1, schedule.parts > 1}, facts, stream, params, cut);
  };
  return launch_held(params, schedule, workspace, go);
}

}  // namespace styleforge::cuda
