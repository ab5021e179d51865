// The attention of launch.h on wgmma (sm_90a), heads up to 128.
//
//   block:      128 queries of one head against all keys, 64 at a time
//   producers:  one warpgroup. Reads keys and values from global memory, splits them for 3xTF32 and writes hi and lo to
//               shared memory: keys as they are, values transposed (wgmma wants TF32 operands with neighbouring k), so
//               that nothing is ever stored in global memory. What comes next is in registers by then
//   consumers:  two warpgroups of 64 queries each: scores, running softmax, product with the values
//
// 3xTF32 as in gemm/gemm_sm90.cu: a = hi + lo, b = hi + lo, hi to nearest; the small terms have accumulators of their
// own or come first, and each tile's product with the values is added to its float32 sum outside of the tensor cores,
// which truncate. Weights of a tile go from the scores' registers to the next product's without a move: the order of
// keys within eight is the accumulators' (softmax.cuh), and the transposed values follow it.
//
// What limits it is the tensor cores (360 TFLOP/s of TF32, a third of that of float32; on an H200 heads of 64 reach 98,
// of 128 108 of these 120). So the warpgroups take turns
// at them, by named barriers: one does its softmax while the other multiplies. Up to heads of 64 a turn is the product
// with the values and the next tile's scores, two tiles being in shared memory. With heads of 128 only one tile fits
// beside the queries; the two products are turns by themselves, which leaves a turn for refilling either half.
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "consume.cuh"
#include "produce.cuh"

namespace styleforge::cuda {
namespace {

template <int kHead, bool kWhole>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_kernel(const __grid_constant__ TiledAttentionParams p, const __grid_constant__ TiledAttentionSchedule s) {
#ifdef STYLEFORGE_HAS_WGMMA
  using T = AttentionTile<kHead>;
  extern __shared__ unsigned char dynamic[];
  // Swizzled tiles start at multiples of 1024 bytes.
  const uint32_t queries = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t ring = queries + T::kChunks * T::kQueryChunk;
  __shared__ AttentionBarriers barriers;

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      mbarrier_init(&barriers.full_k[i], kProducersArrive);
      mbarrier_init(&barriers.full_v[i], kProducersArrive);
      mbarrier_init(&barriers.empty_k[i], kConsumersArrive);
      mbarrier_init(&barriers.empty_v[i], kConsumersArrive);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();

  const AttentionPlace at = attention_place(p, s, kTileKeys);

  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (group == kAttentionGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(88));
    produce<kHead, kWhole>(p, at, barriers, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(208));
    const int lane = threadIdx.x % 32;
    const float factor = score_factor(p.scale);
    AttentionConsumer<kHead, kWhole> consumer{
        p, at, barriers, ring, queries, group, lane, threadIdx.x / 32 * 16u + lane % 16, factor, {s, group, 0}};
    consumer.run();
  }
#endif
}

template <int kHead>
cudaError_t launch_head(const TiledAttentionParams& p, const TiledAttentionSchedule& s, const DeviceFacts& facts,
                        cudaStream_t stream) {
  return launch(s.vectors ? attention_kernel<kHead, true> : attention_kernel<kHead, false>,
                dim3(static_cast<unsigned>(s.blocks)), dim3(kAttentionThreads), AttentionTile<kHead>::kShared, 1, facts,
                stream, p, s);
}

}  // namespace

cudaError_t launch_tiled_attention(const TiledAttentionParams& p, const TiledAttentionSchedule& s,
                                   cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (s.head) {
    case 32:
      return launch_head<32>(p, s, facts, stream);
    case 64:
      return launch_head<64>(p, s, facts, stream);
    case 128:
      return launch_head<128>(p, s, facts, stream);
    default:
      return launch_wide_attention(p, s, stream);
  }
}

}  // namespace styleforge::cuda
