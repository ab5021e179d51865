// A small feed-forward network of 16-bit numbers in one launch, on wgmma (sm_90a).
//
//   cluster:  64 rows, the hidden width cut up among its blocks
//   block:    two warpgroups. 64 hidden columns at a time: first product (each warpgroup half of the columns), bias and
//             activation into shared memory, from where they are multiplied again (each warpgroup half of the outputs)
//
// What such sizes cost is latency: of a launch, of a load, of the activation of what one thread has. So everything is
// loaded at once where it fits, and the hidden activations never leave the multiprocessor. At the end the blocks' sums
// lie in shared memory, and each block adds those of its share of the rows, in the order of the blocks.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/overrides.h"
#include "../common/wgmma_shared.cuh"
#include "../gemm/boxes.cuh"
#include "../gemm/pack.cuh"
#include "gelu.cuh"
#include "launch.h"

namespace styleforge::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kThreads = 256;
constexpr int kHiddenColumns = kBoxColumns;  // at a time
constexpr int kMaxParts = 8;
constexpr int kMaxStages = 4;
constexpr int kMaxWidth = 256;  // of input and output

struct WholeFfnSchedule {
  int parts = 1;   // of the hidden width, the blocks of a cluster
  int stages = 1;  // 64 hidden columns each
  int blocks = 0;  // of the grid
};

// Shared memory: the input's rows, the activated columns, then the ring of weights. All of it holds sums in the end.
template <int kOut>
struct Layout {
  int x_boxes, stage_bytes;
  static constexpr int kPitch = kOut + 8;  // of a row of sums, so that writes fall into different banks
  __host__ __device__ explicit Layout(int embed)
      : x_boxes((embed + kBoxColumns - 1) / kBoxColumns), stage_bytes(x_boxes * kBoxBytes + kOut * kBoxRowBytes) {}
  __host__ __device__ int ring() const { return (x_boxes + 1) * kBoxBytes; }
  int bytes(int stages) const {
    return 1024 + std::max(ring() + stages * stage_bytes, kRows * kPitch * static_cast<int>(sizeof(float)));
  }
};

// Four outputs of a row on their way out: what is added to their sums.
template <typename T>
struct Added {
  Vec<T, 4> bias{}, residual{};
};

template <typename T, int kOut>
__global__ void __launch_bounds__(kThreads)
    whole_ffn_kernel(const __grid_constant__ WholeFfnParams p, const __grid_constant__ WholeFfnSchedule s,
                     const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap fc1_map,
                     const __grid_constant__ CUtensorMap fc2_map) {
#ifdef STYLEFORGE_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  unsigned char* base = dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);
  const uint32_t x_at = shared_address(base);
  const Layout<kOut> layout(p.embed);
  const uint32_t activated_at = x_at + layout.x_boxes * kBoxBytes, ring = x_at + layout.ring();
  __shared__ uint64_t full_first[kMaxStages], full_second[kMaxStages];

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int group = warp / 4;
  const int rank = static_cast<int>(cluster_rank());
  const int first_row = blockIdx.x / s.parts * kRows;
  const int all_chunks = (p.hidden + kHiddenColumns - 1) / kHiddenColumns;
  const int first_chunk = all_chunks * rank / s.parts;
  const int chunks = all_chunks * (rank + 1) / s.parts - first_chunk;

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&fc1_map);
    prefetch_map(&fc2_map);
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&full_first[i], 1);
      mbarrier_init(&full_second[i], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();

  const auto load = [&](int chunk, int stage) {
    const int column = (first_chunk + chunk) * kHiddenColumns;
    const uint32_t to = ring + stage * layout.stage_bytes;
    const uint32_t first = shared_address(&full_first[stage]), second = shared_address(&full_second[stage]);
    mbarrier_arrive_expect(&full_first[stage], layout.x_boxes * kBoxBytes * (chunk == 0 ? 2 : 1));
    for (int i = 0; i < layout.x_boxes; ++i) {
      if (chunk == 0) load_box(x_at + i * kBoxBytes, &x_map, i * kBoxColumns, first_row, first);
      load_box(to + i * kBoxBytes, &fc1_map, i * kBoxColumns, column, first);
    }
    mbarrier_arrive_expect(&full_second[stage], kOut * kBoxRowBytes);
    load_box(to + layout.x_boxes * kBoxBytes, &fc2_map, column, 0, second);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(chunks, s.stages); ++i) load(i, i);
  }
  __syncwarp();

  using First = WgmmaShared<kMmaKind<T>, kHiddenColumns / 2>;
  using Second = WgmmaShared<kMmaKind<T>, kOut / 2>;
  const uint32_t first_at = shared_address(full_first), second_at = shared_address(full_second);
  const int row_in_tile = warp % 4 * 16 + lane / 4;
  const uint32_t piece = (warp % 4 * 16 + lane % 16) * kBoxRowBytes + (((lane & 7) ^ (lane / 16)) << 4);
  float total[kOut / 4];
#pragma unroll
  for (int i = 0; i < kOut / 4; ++i) total[i] = 0;
  int stage = 0;
  uint32_t parity = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int column = (first_chunk + chunk) * kHiddenColumns + group * (kHiddenColumns / 2) + lane % 4 * 2;
    float2 bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.fc1_bias) + column + 8 * i);
      bias[i] = p.fc1_bias != nullptr && column + 8 * i < p.hidden ? unpack<T>(__ldg(from)) : float2{};
    }
    const uint32_t weights = ring + stage * layout.stage_bytes;
    float h[16];
    mbarrier_wait(first_at + 8 * stage, parity);
    wgmma_fence();
#pragma unroll 1
    for (int box = 0; box < layout.x_boxes; ++box) {
      const uint64_t a = wgmma_descriptor(x_at + box * kBoxBytes);
      const uint64_t b = wgmma_descriptor(weights + box * kBoxBytes + group * (kBoxBytes / 2));
#pragma unroll
      for (int k = 0; k < 4; ++k) First::run(h, a + 2 * k, b + 2 * k, box > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 16; ++i) h[i] += i % 2 == 0 ? bias[i / 4].x : bias[i / 4].y;
    if (p.product != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = first_row + row_in_tile + i % 2 * 8;
        if (row < p.rows && column + i / 2 * 8 < p.hidden) {
          auto* to = static_cast<T*>(p.product) + static_cast<int64_t>(row) * p.hidden + column + i / 2 * 8;
          *reinterpret_cast<uint32_t*>(to) = pack<T>(h[2 * i], h[2 * i + 1]);
        }
      }
    }
    ffn_activate<true>(h, p.activation);
    // Beyond the hidden width an infinite input would make NaN of the zeros there.
#pragma unroll
    for (int i = 0; i < 16; ++i) h[i] = column + i / 4 * 8 < p.hidden ? h[i] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) packed[j] = pack<T>(h[8 * i + 2 * j], h[8 * i + 2 * j + 1]);
      store_matrix((activated_at + piece) ^ ((2 * group + i) << 5), packed);
    }
    fence_async_shared();
    __syncthreads();
    mbarrier_wait(second_at + 8 * stage, parity);
    const uint64_t a = wgmma_descriptor(activated_at);
    const uint64_t b = wgmma_descriptor(weights + layout.x_boxes * kBoxBytes + group * (kOut / 2) * kBoxRowBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Second::run(total, a + 2 * k, b + 2 * k, true);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the activated columns and the stage have been read
    if (threadIdx.x == 0 && chunk + s.stages < chunks) load(chunk + s.stages, stage);
    __syncwarp();
    if (++stage == s.stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  float* sums = reinterpret_cast<float*>(base);
  constexpr int kPitch = Layout<kOut>::kPitch;
#pragma unroll
  for (int i = 0; i < kOut / 16; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to = sums + (row_in_tile + 8 * h) * kPitch + group * (kOut / 2) + 8 * i + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(total[4 * i + 2 * h], total[4 * i + 2 * h + 1]);
    }
  }

  // This block's share of the rows, four outputs at a time.
  constexpr int kVectors = kOut / 4;
  const int share = kRows / s.parts;
  const auto row_of = [&](int i) { return first_row + rank * share + i / kVectors; };
  const auto column_of = [&](int i) { return i % kVectors * 4; };
  const auto added = [&](int i) {
    Added<T> v;
    if (i >= share * kVectors || row_of(i) >= p.rows || column_of(i) >= p.out) return v;
    if (p.fc2_bias != nullptr)
      v.bias = *reinterpret_cast<const Vec<T, 4>*>(static_cast<const T*>(p.fc2_bias) + column_of(i));
    if (p.residual != nullptr) {
      v.residual = *reinterpret_cast<const Vec<T, 4>*>(static_cast<const T*>(p.residual) +
                                                       row_of(i) * p.residual_stride + column_of(i));
    }
    return v;
  };
  cluster_arrive();
  Added<T> next = added(threadIdx.x);
  cluster_wait();
  for (int i = threadIdx.x; i < share * kVectors; i += kThreads) {
    const Added<T> end = next;
    next = added(i + kThreads);
    const uint32_t from =
        x_at + ((rank * share + i / kVectors) * kPitch + column_of(i)) * static_cast<int>(sizeof(float));
    float4 other[kMaxParts];
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {  // all on their way before the first one is added
      if (part < s.parts) other[part] = load_remote(from, part);
    }
    float v[4] = {};
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      if (part >= s.parts) continue;
      v[0] += other[part].x;
      v[1] += other[part].y;
      v[2] += other[part].z;
      v[3] += other[part].w;
    }
    if (row_of(i) >= p.rows || column_of(i) >= p.out) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] += to_acc(end.bias.data[j]) + to_acc(end.residual.data[j]);
    *reinterpret_cast<Vec<T, 4>*>(static_cast<T*>(p.output) + static_cast<int64_t>(row_of(i)) * p.out + column_of(i)) =
        rounded<T>(v);
  }
  cluster_arrive();  // nobody leaves while others read here
  cluster_wait();
#endif
}

template <typename T, int kOut>
cudaError_t launch_out(const WholeFfnParams& p, const WholeFfnSchedule& s, const DeviceFacts& facts,
                       cudaStream_t stream) {
  CUtensorMap x, fc1, fc2;
  if (const auto error = box_map(p.dtype, p.input, p.rows, p.embed, p.input_stride, kRows, x)) return error;
  if (const auto error = box_map(p.dtype, p.fc1_weight, p.hidden, p.embed, p.fc1_stride, kHiddenColumns, fc1)) {
    return error;
  }
  if (const auto error = box_map(p.dtype, p.fc2_weight, p.out, p.hidden, p.fc2_stride, kOut, fc2)) return error;
  return launch(whole_ffn_kernel<T, kOut>, dim3(static_cast<unsigned>(s.blocks)), dim3(kThreads),
                static_cast<size_t>(Layout<kOut>(p.embed).bytes(s.stages)), s.parts, facts, stream, p, s, x, fc1, fc2);
}

int outputs(const WholeFfnParams& p) { return static_cast<int>(ceil_div(p.out, 64)) * 64; }

int shared_bytes(const WholeFfnParams& p, int stages) {
  switch (outputs(p)) {
    case 64:
      return Layout<64>(p.embed).bytes(stages);
    case 128:
      return Layout<128>(p.embed).bytes(stages);
    case 192:
      return Layout<192>(p.embed).bytes(stages);
    default:
      return Layout<256>(p.embed).bytes(stages);
  }
}

// STYLEFORGE_GEMM_TUNE="small=1,parts=4,stages=2" (small: 1 never, 2 always)
WholeFfnSchedule schedule(const WholeFfnParams& p, const Overrides& overrides, const DeviceFacts& facts) {
  WholeFfnSchedule s;
  const int chunks = static_cast<int>(ceil_div(p.hidden, kHiddenColumns));
  const int64_t tiles = ceil_div(p.rows, kRows);
  // Clusters of four and eight find room on ten of eleven multiprocessors.
  const int64_t room = facts.multiprocessors - facts.multiprocessors / 11;
  while (s.parts < kMaxParts && s.parts * 2 <= chunks && tiles * s.parts * 2 <= room) s.parts *= 2;
  s.parts = std::min<int>(kMaxParts, static_cast<int>(overrides.tuned("parts", s.parts)));
  while (kRows % s.parts != 0) --s.parts;
  s.stages = std::min(
      {static_cast<int>(ceil_div(chunks, s.parts)), kMaxStages, static_cast<int>(overrides.tuned("stages", 2))});
  while (s.stages > 1 && shared_bytes(p, s.stages) > facts.max_shared_per_block - 256) --s.stages;
  s.blocks = static_cast<int>(tiles) * s.parts;
  return s;
}

template <typename T>
cudaError_t launch_dtype(const WholeFfnParams& p, const WholeFfnSchedule& s, const DeviceFacts& facts,
                         cudaStream_t stream) {
  switch (outputs(p)) {
    case 64:
      return launch_out<T, 64>(p, s, facts, stream);
    case 128:
      return launch_out<T, 128>(p, s, facts, stream);
    case 192:
      return launch_out<T, 192>(p, s, facts, stream);
    case 256:
      return launch_out<T, 256>(p, s, facts, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t whole_ffn_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("small", 0);
  if (wish == 1 || (overrides.forced() && !overrides.forced("sm90"))) return cudaSuccess;
  if (facts.major != 9 || !facts.has_cluster()) return cudaSuccess;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return cudaSuccess;
  if (p.rows < 1 || p.embed < 1 || p.hidden < 1 || p.out < 1) return cudaSuccess;
  if (p.embed > kMaxWidth || p.out > kMaxWidth || p.embed % 8 != 0 || p.hidden % 8 != 0 || p.out % 8 != 0) {
    return cudaSuccess;
  }
  if (p.input_stride % 8 != 0 || p.fc1_stride % 8 != 0 || p.fc2_stride % 8 != 0 || p.residual_stride % 4 != 0 ||
      p.input_stride < p.embed || p.fc1_stride < p.embed || p.fc2_stride < p.hidden) {
    return cudaSuccess;
  }
  if (!aligned16(p.input) || !aligned16(p.fc1_weight) || !aligned16(p.fc2_weight) || !aligned16(p.fc1_bias) ||
      !aligned16(p.fc2_bias) || !aligned16(p.residual)) {
    return cudaSuccess;
  }
  // Where a block has more to do one after the other, products one by one are faster: read off one H200.
  constexpr int64_t kMostChunks = 2;
  const auto s = schedule(p, overrides, facts);
  const int64_t chunks = ceil_div(ceil_div(p.hidden, kHiddenColumns), s.parts);
  supported = wish == 2 || (chunks <= kMostChunks && s.blocks <= facts.multiprocessors);
  return cudaSuccess;
}

cudaError_t launch_whole_ffn(const WholeFfnParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto s = schedule(p, Overrides("STYLEFORGE_GEMM_TUNE"), facts);
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, s, facts, stream)
                                    : launch_dtype<__nv_bfloat16>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
