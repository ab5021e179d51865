// The gradient of a 3x3 convolution's weights on wgmma (sm_90a), 16-bit, channels_last:
//
//   output[co, ci, i, j] = sum over pixels of grad[pixel, co] * input[pixel * stride + (i, j) - padding, ci]
//
// Few results (1152 x 128 for 128 channels) and a long sum: blocks share it by pixels, and a second kernel adds up
// their float32 parts in their order. What a block keeps of the result decides: parts are written and read once for
// each multiprocessor, so they should be small; but the smaller they are, the more often pixels are read. All nine taps
// of 64 x 32 channels are 74 KB of registers, and 128 channels at 128x128 pixels come to 29 MB of pixels and 10 MB of
// parts (one tap of 128 x 128: 75 MB and 9 MB; nine taps of 64 x 64: 20 MB and 20 MB).
//
//   block:   64 channels of grad, 32 of the input, all taps; a run of tiles of 16 x 8 pixels, one after the other
//   stage:   a tile of grad and what the taps read of the input, by the copy engine, which fills what is outside with
//            zeros: that is the padding, and what a tile stands over
//   A:       grad, [channels x pixels], by transposing ldmatrix into registers; one load serves all nine taps
//   B:       input, [pixels x channels], as it lies (wgmma_taps.cuh). With stride 1 one box serves all taps: a tap is
//            an address in it, and three columns of the kernel are one multiplication of 96 columns. With stride 2
//            a box for each column of the kernel, of the even or the odd columns of pixels.
//   border:  of a reflected or replicated input: one pixel wide, what belongs there lies in the box; three warps copy
//            it. When they have nothing left to do they bring the weights to what the gradient of the input reads: a
//            launch of its own takes 2 to 4 us, and here nobody waits for it
//   groups:  two warpgroups, each the rows of four pixels of every tile; they add up what they have in the end
//
// Where the time goes, 1x128x128x128 to 128 channels (13.6 us; cuDNN 30): 5.4 of multiplications, at the units' rate
// (890 TFLOP/s: another 16384 pixels cost no more than that), 3.3 of the second kernel, the rest until the first tiles
// are there and for the parts on their way out. Three boxes with stride 1, too, which need no shifted addresses: 0.3 to
// 2 us more. In a step of training it takes 3 us more than back to back, where blocks start while those of the call
// before are on their way out; the convolutions of both directions likewise (12.5 instead of 9.9).
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/tensor_map.h"
#include "../common/types.cuh"
#include "../conv_instance_norm/tile_in.cuh"
#include "launch.h"
#include "wgmma_taps.cuh"

namespace styleforge::cuda {
namespace {

constexpr const char* kTuneVariable =
    "STYLEFORGE_GRADIENT_TUNE";  // boxes=1 or 3, splits, stages, groups=4 or 8, keep=1

constexpr int kSide = 3;  // of the kernel
constexpr int kTileWidth = 16, kTileHeight = 8;
constexpr int kGradChannels = 64, kInputChannels = 32;  // of a block
constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + 128;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // they move by warpgroups
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 64 * 1024);
constexpr int kGradRowBytes = kTileWidth * kGradChannels * 2;  // a row of a tile's pixels
constexpr int kGradBytes = kTileHeight * kGradRowBytes;
constexpr int kMaxStages = 8;
constexpr int kShared = 227 * 1024 - 2048;  // of a block, less what is declared statically
// A thread's results: vectors of 4, i * 12 + j * 4 + k of row i and column j of the kernel and 8 k channels of input
// on.
constexpr int kVectors = kSide * kSide * kInputChannels / 8;
constexpr int kBlockVectors = kVectors * 128;
static_assert(kTapColumns == kInputChannels);
static_assert(kShared / 2 > kGroups * kVectors / 2 * 128 * 16, "what groups tell each other lies over the ring");

constexpr int kSumThreads = 256;

#ifdef STYLEFORGE_HAS_WGMMA

constexpr int kRows = kTileHeight / kGroups;  // of a tile, of a warpgroup
constexpr int kConsumerBarrier = 1;
constexpr int kMenders = kThreads - kConsumers - 32;  // after the warp that loads

// Pixels of the box whose first one is (top, left) of the input and that lie outside of it: what belongs there.
__device__ __forceinline__ void mend_border(const WeightGradientParams& p, const WeightGradientSchedule& s,
                                            unsigned char* box, int top, int left, int thread) {
  constexpr int kPieces = kTapRowBytes / 16;
  const auto place = [](int pixel, int piece) { return pixel * kTapRowBytes + ((piece ^ (pixel >> 1 & 3)) * 16); };
  const auto source = [&](int at, int size) {
    if (p.mode == PaddingMode::kReplicate) return at < 0 ? 0 : size - 1;
    return at < 0 ? -at : 2 * (size - 1) - at;
  };
  for (int i = thread; i < s.box_width * s.box_height * kPieces; i += kMenders) {
    const int pixel = i / kPieces, piece = i % kPieces;
    const int row = pixel / s.box_width, column = pixel - row * s.box_width;
    const int y = top + row, x = left + column;
    const bool outside_y = y < 0 || y >= p.height, outside_x = x < 0 || x >= p.width;
    // Those further outside belong to no pixel of grad.
    if (!(outside_y || outside_x) || y >= p.height + p.pad_top || x >= p.width + p.pad_left) continue;
    const int from_y = outside_y ? source(y, p.height) - top : row;
    const int from_x = outside_x ? source(x, p.width) - left : column;
    *reinterpret_cast<uint4*>(box + place(pixel, piece)) =
        *reinterpret_cast<const uint4*>(box + place(from_y * s.box_width + from_x, piece));
  }
}

// As turned_weights.cu, a part of it by each block; an element at a time, but there is time.
__device__ __forceinline__ void write_turned_weights(const TurnedWeightsParams& p, int thread) {
  constexpr int kTaps = kSide * kSide, kBatch = 8;
  const int blocks = static_cast<int>(gridDim.x * gridDim.y * gridDim.z);
  const int block = static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const int count = p.in_channels * kTaps * p.out_channels;
  const auto* from = static_cast<const uint16_t*>(p.weight);
  auto* to = static_cast<uint16_t*>(p.output);
  const int step = blocks * kMenders;
  for (int first = block * kMenders + thread; first < count; first += kBatch * step) {
    uint16_t value[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = min(first + u * step, count - 1);
      const int row = i / p.out_channels;
      const int ci = row / kTaps, tap = kTaps - 1 - (row - ci * kTaps);
      value[u] = from[(i - row * p.out_channels) * p.stride[0] + ci * p.stride[1] + tap / kSide * p.stride[2] +
                      tap % kSide * p.stride[3]];
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (first + u * step < count) to[first + u * step] = value[u];
    }
  }
}

// Each group gives the other one its half of the vectors, of which that one writes both groups' sum.
template <int kGroup>
struct Half {
  static constexpr int kCount = kVectors / 2;
  static constexpr int kOwn = kGroup * kCount, kOther = kCount - kOwn;
  static constexpr int kOfRow = kVectors / kSide;
  using Sums = float[kSide][kSide * kInputChannels / 2];

  static __device__ __forceinline__ void give(const Sums& sum, float4* exchange, int thread) {
#pragma unroll
    for (int v = kOther; v < kOther + kCount; ++v) {
      const float* d = &sum[v / kOfRow][v % kOfRow * 4];
      exchange[v * 128 + thread] = make_float4(d[0], d[1], d[2], d[3]);
    }
  }

  static __device__ __forceinline__ void write(const Sums& sum, const float4* exchange, int thread, float4* out) {
#pragma unroll
    for (int v = kOwn; v < kOwn + kCount; ++v) {
      const float* d = &sum[v / kOfRow][v % kOfRow * 4];
      const float4 other = exchange[v * 128 + thread];
      out[v * 128 + thread] = make_float4(d[0] + other.x, d[1] + other.y, d[2] + other.z, d[3] + other.w);
    }
  }
};

#endif  // STYLEFORGE_HAS_WGMMA

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams p,
                           const __grid_constant__ WeightGradientSchedule s, const __grid_constant__ CUtensorMap grad,
                           const __grid_constant__ CUtensorMap input, const __grid_constant__ CUtensorMap input_odd) {
#ifdef STYLEFORGE_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  unsigned char* ring = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t stages = shared_address(ring);
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], mended[kMaxStages];
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto split = static_cast<int64_t>(blockIdx.x);
  const int begin = static_cast<int>(split * s.tiles / s.splits);
  const int end = static_cast<int>((split + 1) * s.tiles / s.splits);
  if (threadIdx.x == kConsumers) {
    prefetch_map(&grad);
    prefetch_map(&input);
    if (p.stride_w == 2) prefetch_map(&input_odd);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers);
      mbarrier_init(&mended[i], kMenders);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();

  if (warp >= kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    const int row = begin / s.tiles_x;
    int tile_x = begin - row * s.tiles_x, n = row / s.tiles_y;
    int tile_y = row - n * s.tiles_y;
    int stage = 0;
    uint32_t parity = 0;
    const auto advance = [&] {
      if (++tile_x == s.tiles_x) {
        tile_x = 0;
        if (++tile_y == s.tiles_y) {
          tile_y = 0;
          ++n;
        }
      }
      if (++stage == s.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    if (threadIdx.x == kConsumers) {
      const int grad_channel = static_cast<int>(blockIdx.z) * kGradChannels;
      const int input_channel = static_cast<int>(blockIdx.y) * kInputChannels;
      for (int tile = begin; tile < end; ++tile, advance()) {
        const int x = tile_x * kTileWidth, y = tile_y * kTileHeight;
        uint32_t to = stages + stage * s.stage_bytes;
        mbarrier_wait(&empty[stage], parity ^ 1);
        mbarrier_arrive_expect(&full[stage], s.loaded_bytes);
        load_box(to, &grad, grad_channel, x, y, n, &full[stage]);
        to += kGradBytes;
        for (int box = 0; box < s.boxes; ++box) {
          const int column = box - p.pad_left;  // of the input, less x times the stride
          const bool odd = p.stride_w == 2 && (column & 1) != 0;
          load_box(to, odd ? &input_odd : &input, input_channel, x + (column >> (p.stride_w - 1)),
                   y * p.stride_h - p.pad_top, n, &full[stage]);
          to += s.box_bytes;
        }
      }
    } else if (warp > kConsumers / 32) {
      const int mender = static_cast<int>(threadIdx.x) - kConsumers - 32;
      if (p.mode != PaddingMode::kZeros) {
        for (int tile = begin; tile < end; ++tile, advance()) {
          const int top = tile_y * kTileHeight - p.pad_top, left = tile_x * kTileWidth - p.pad_left;
          mbarrier_wait(&full[stage], parity);
          if (top < 0 || left < 0 || top + s.box_height > p.height || left + s.box_width > p.width) {
            mend_border(p, s, ring + stage * s.stage_bytes + kGradBytes, top, left, mender);
            fence_async_shared();
          }
          mbarrier_arrive(&mended[stage]);
        }
      }
      if (p.turned.output != nullptr) write_turned_weights(p.turned, mender);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));

  const int group = warp / 4;
  // Matrix i = lane / 8 of ldmatrix, its row lane % 8: pixels 8 (i / 2) on of channels 8 (i % 2) on of the warp's 16.
  const int pixel = lane / 16 * 8 + lane % 8;
  const int piece = warp % 4 * 2 + lane / 8 % 2;
  const uint32_t grad_at = stages + group * kRows * kGradRowBytes + pixel * 128 + ((piece ^ (lane % 8)) * 16);
  const uint64_t input_at =
      taps_descriptor(s.tap_distance) + ((stages + kGradBytes + group * kRows * p.stride_h * s.row_bytes) >> 4);
  const int tap_step = s.row_bytes >> 4, row_step = p.stride_h * tap_step;
  const uint32_t ready = shared_address(p.mode == PaddingMode::kZeros ? full : mended);
  float sum[kSide][kSide * kInputChannels / 2] = {};
  uint32_t a[2][4];
  int stage = 0, previous = 0;
  uint32_t parity = 0;
  const auto multiply_tile = [&](bool first) {
    const uint32_t grad_rows = grad_at + stage * s.stage_bytes;
    const uint64_t input_rows = input_at + ((stage * s.stage_bytes) >> 4);
    mbarrier_wait(ready + 8 * stage, parity);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      load_matrices_transposed(a[r % 2], grad_rows + r * kGradRowBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSide; ++i) multiply_taps<T>(sum[i], a[r % 2], input_rows + r * row_step + i * tap_step);
      wgmma_commit();
      wgmma_wait<1>();
      if (r == 0 && !first) mbarrier_arrive(&empty[previous]);  // all of the tile before is multiplied
    }
    previous = stage;
    if (++stage == s.stages) {
      stage = 0;
      parity ^= 1;
    }
  };
  multiply_tile(true);
#pragma unroll 1
  for (int tile = begin + 1; tile < end; ++tile) multiply_tile(false);
  wgmma_wait<0>();

  const int64_t block = (split * gridDim.z + blockIdx.z) * gridDim.y + blockIdx.y;
  float4* out = reinterpret_cast<float4*>(p.partials) + block * kBlockVectors;
  float4* exchange = reinterpret_cast<float4*>(ring);
  const int thread = static_cast<int>(threadIdx.x) % 128;
  // Both groups at the same barrier: where each has its own, synccheck calls their threads divergent.
  named_barrier(kConsumerBarrier, kConsumers);  // nobody multiplies what is overwritten
  if (group == 0) {
    Half<0>::give(sum, exchange, thread);
  } else {
    Half<1>::give(sum, exchange, thread);
  }
  named_barrier(kConsumerBarrier, kConsumers);
  if (group == 0) {
    Half<0>::write(sum, exchange, thread, out);
  } else {
    Half<1>::write(sum, exchange, thread, out);
  }
#endif
}

// Adds up the blocks' parts and rounds: groups of threads take runs of the splits, then come the groups in their order.
template <typename T, int kSumGroups>
__global__ void __launch_bounds__(kSumThreads)
    weight_gradient_sum_kernel(const __grid_constant__ WeightGradientParams p, int splits, int input_blocks,
                               int64_t pitch, bool discards) {
  constexpr int kVectorsHere = kSumThreads / kSumGroups;
  static_assert(kBlockVectors % kVectorsHere == 0);
  __shared__ float4 groups[kSumGroups][kVectorsHere];
  const int group = static_cast<int>(threadIdx.x) / kVectorsHere;
  const int lane = static_cast<int>(threadIdx.x) % kVectorsHere;
  const int vector = static_cast<int>(blockIdx.x) * kVectorsHere + lane;
  wait_for_predecessor();
  release_successor();
  const int begin = group * splits / kSumGroups, end = (group + 1) * splits / kSumGroups;
  const float4* parts = reinterpret_cast<const float4*>(p.partials) + vector;
  float4 sum = {};
  const auto add = [&](const float4& other) {
    sum.x += other.x;
    sum.y += other.y;
    sum.z += other.z;
    sum.w += other.w;
  };
#pragma unroll 8
  for (int split = begin; split < end; ++split) add(__ldcg(parts + split * pitch));
  groups[group][lane] = sum;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // Nobody reads the parts again, so the L2 cache need not bring them to memory: 2 us of a step of training, whose next
  // kernels would find it busy with that (alone 0.4 more).
  constexpr int kLine = 128;
  if (discards && lane % (kLine / 16) == 0) {
    for (int split = begin; split < end; ++split) {
      asm volatile("discard.global.L2 [%0], %1;" ::"l"(parts + split * pitch), "n"(kLine) : "memory");
    }
  }
#endif
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int g = 1; g < kSumGroups; ++g) add(groups[g][lane]);

  const int thread = vector % 128;
  const int in_block = vector / 128 % kVectors;
  const int block = vector / kBlockVectors;
  const int row = in_block / (kVectors / kSide);
  const int column = in_block / (kInputChannels / 8) % kSide;
  const int co = block / input_blocks * kGradChannels + thread / 32 * 16 + thread % 32 / 4;
  const int ci = block % input_blocks * kInputChannels + in_block % (kInputChannels / 8) * 8 + thread % 4 * 2;
  if (ci >= p.in_channels) return;  // which is even
  T* out = static_cast<T*>(p.output) + co * p.output_stride[0] + ci * p.output_stride[1] + row * p.output_stride[2] +
           column * p.output_stride[3];
  const auto write = [&](T* to, float x, float y) {
    const auto pair = rounded<T>({x, y});
    if (p.output_stride[1] == 1) {
      *reinterpret_cast<Vec<T, 2>*>(to) = pair;
    } else {
      to[0] = pair.data[0];
      to[p.output_stride[1]] = pair.data[1];
    }
  };
  if (co < p.out_channels) write(out, sum.x, sum.y);
  if (co + 8 < p.out_channels) write(out + 8 * p.output_stride[0], sum.z, sum.w);
}

int blocks_of(int channels, int block) { return static_cast<int>(ceil_div(channels, block)); }
cuuint64_t extent(int value) { return static_cast<cuuint64_t>(value); }

// [batch, height, width, channels], or every second column of pixels from `first` on, in boxes.
cudaError_t pixel_map(DType dtype, const void* data, int batch, int height, int width, int channels, int first,
                      int every, int box_channels, int box_width, int box_height, CUtensorMap& map) {
  const cuuint64_t sizes[4] = {extent(channels), extent((width - first + every - 1) / every), extent(height),
                               extent(batch)};
  const cuuint64_t pixel = sizes[0] * 2;
  const cuuint64_t strides[3] = {pixel * extent(every), pixel * extent(width), pixel * extent(width) * sizes[2]};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_channels), static_cast<cuuint32_t>(box_width),
                             static_cast<cuuint32_t>(box_height), 1};
  const bool wide = box_channels == 64;
  return tensor_map(dtype, static_cast<const unsigned char*>(data) + pixel * extent(first), sizes, strides, box, map,
                    wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                    wide ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_64B);
}

template <typename T>
cudaError_t launch_kernels(const WeightGradientParams& p, const WeightGradientSchedule& s, const DeviceFacts& facts,
                           cudaStream_t stream) {
  CUtensorMap grad, input, input_odd = {};
  if (const auto error = pixel_map(p.dtype, p.grad, p.batch, p.out_height, p.out_width, p.out_channels, 0, 1,
                                   kGradChannels, kTileWidth, kTileHeight, grad)) {
    return error;
  }
  const auto map_input = [&](int first, CUtensorMap& map) {
    return pixel_map(p.dtype, p.input, p.batch, p.height, p.width, p.in_channels, first, p.stride_w, kInputChannels,
                     s.box_width, s.box_height, map);
  };
  if (const auto error = map_input(0, input)) return error;
  if (p.stride_w == 2) {
    if (const auto error = map_input(1, input_odd)) return error;
  }
  const int input_blocks = blocks_of(p.in_channels, kInputChannels);
  const int grad_blocks = blocks_of(p.out_channels, kGradChannels);
  const auto grid =
      dim3(static_cast<unsigned>(s.splits), static_cast<unsigned>(input_blocks), static_cast<unsigned>(grad_blocks));
  if (const auto error = launch(weight_gradient_kernel<T>, grid, dim3(kThreads), s.shared_bytes, 1, facts, stream, p, s,
                                grad, input, input_odd)) {
    return error;
  }
  const int64_t vectors = int64_t{input_blocks} * grad_blocks * kBlockVectors;
  const auto sum = [&]<int kSumGroups>() {
    return launch(weight_gradient_sum_kernel<T, kSumGroups>,
                  dim3(static_cast<unsigned>(vectors * kSumGroups / kSumThreads)), dim3(kSumThreads), 0, 1, facts,
                  stream, p, s.splits, input_blocks, vectors, s.discards);
  };
  return s.sum_groups == 4 ? sum.template operator()<4>() : sum.template operator()<8>();
}

}  // namespace

cudaError_t schedule_weight_gradient(const WeightGradientParams& p, WeightGradientSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  if ((overrides.forced() && !overrides.forced("sm90")) || facts.major != 9 || !facts.has_cluster()) return cudaSuccess;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return cudaSuccess;
  if (p.kernel_h != kSide || p.kernel_w != kSide || p.stride_w > 2 || p.stride_h > 2) return cudaSuccess;
  if (p.width < p.stride_w) return cudaSuccess;  // there is no second column
  if (p.in_channels % 8 != 0 || p.out_channels % 8 != 0 || p.in_channels > 65536 || p.out_channels > 65536) {
    return cudaSuccess;  // rows of the copy engine are multiples of 16 bytes
  }
  const int64_t pixels = std::max(int64_t{p.height} * p.width, int64_t{p.out_height} * p.out_width);
  if (pixels == 0 || p.batch == 0 || pixels > INT32_MAX || p.pad_top > 65536 || p.pad_left > 65536) return cudaSuccess;
  if (p.mode != PaddingMode::kZeros) {
    // What belongs outside of the input lies in the same box.
    if (std::max({p.pad_top, p.pad_left, p.stride_h, p.stride_w}) > 1) return cudaSuccess;
    if (p.mode == PaddingMode::kReflect && (p.pad_top >= p.height || p.pad_left >= p.width)) return cudaSuccess;
  }
  s = {};
  s.tiles_x = static_cast<int>(ceil_div(p.out_width, kTileWidth));
  s.tiles_y = static_cast<int>(ceil_div(p.out_height, kTileHeight));
  const int64_t tiles = int64_t{s.tiles_x} * s.tiles_y * p.batch;
  if (tiles > INT32_MAX) return cudaSuccess;
  s.tiles = static_cast<int>(tiles);
  // Of less work cuDNN is done sooner: 6.7 and 7.5 us of 1x128x32x32 and 1x256x32x32, here 7.3 and 10.5. From 16 tiles
  // on it is 10.5 and 9.5 (1x128x64x64), 14.6 and 14.4 (1x256x64x64), 30 and 13.6 (1x128x128x128).
  if (s.tiles < 16 && !overrides.forced()) return cudaSuccess;
  const int64_t blocks = int64_t{blocks_of(p.in_channels, kInputChannels)} * blocks_of(p.out_channels, kGradChannels);
  if (blocks * kBlockVectors > INT32_MAX) return cudaSuccess;  // threads of the second kernel
  s.splits = static_cast<int>(std::max<int64_t>(std::min<int64_t>(facts.multiprocessors / blocks, s.tiles), 1));
  s.splits = std::min(static_cast<int>(overrides.tuned("splits", s.splits)), s.tiles);
  s.discards = overrides.tuned("keep", 0) == 0;
  s.sum_groups = static_cast<int>(overrides.tuned("groups", s.splits < 12 ? 4 : 8));

  s.boxes = p.stride_w > 1 ? kSide : p.mode != PaddingMode::kZeros ? 1 : static_cast<int>(overrides.tuned("boxes", 1));
  s.box_width = kTileWidth + (s.boxes == 1 ? kSide - 1 : 0);
  s.box_height = (kTileHeight - 1) * p.stride_h + kSide;
  s.row_bytes = s.box_width * kTapRowBytes;
  s.box_bytes = static_cast<int>(ceil_div(s.box_height * s.row_bytes, 1024) * 1024);
  s.tap_distance = s.boxes == 1 ? kTapRowBytes : s.box_bytes;
  s.stage_bytes = kGradBytes + s.boxes * s.box_bytes;
  s.loaded_bytes = kGradBytes + s.boxes * s.box_height * s.row_bytes;
  s.stages = static_cast<int>(
      std::min<int64_t>({kMaxStages, (kShared - 1024) / s.stage_bytes, overrides.tuned("stages", kMaxStages)}));
  if (s.stages < 2) return cudaSuccess;
  s.shared_bytes = 1024 + static_cast<size_t>(std::max(s.stages * s.stage_bytes, kBlockVectors * 16));
  s.workspace_bytes = static_cast<size_t>(blocks * s.splits * kBlockVectors) * sizeof(float4);
  supported = true;
  return cudaSuccess;
}

cudaError_t launch_weight_gradient(const WeightGradientParams& params, const WeightGradientSchedule& schedule,
                                   cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  return params.dtype == DType::kFloat16 ? launch_kernels<__half>(params, schedule, facts, stream)
                                         : launch_kernels<__nv_bfloat16>(params, schedule, facts, stream);
}

}  // namespace styleforge::cuda
