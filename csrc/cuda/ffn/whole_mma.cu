// A small float32 feed-forward network in one launch, to float32's accuracy by 3xTF32 on mma.sync (in clusters: sm_90).
//
//   unit:     16 rows, four warps. 64 hidden columns at a time: a warp makes 16 of them, activated into shared memory,
//             and then a quarter of the outputs from all of them
//   block:    one unit or two, of neighbouring rows, which share the weights in shared memory
//   cluster:  the same rows, the hidden width cut up among its blocks. A block adds up some of the outputs: the others
//             send it theirs (st.async), and nobody waits for anything but those
//
// What such sizes cost is latency, and the same weights read by many multiprocessors. So all of a block's operands are
// on their way at once, after a hint to the L2 cache that is given while the kernel's predecessor still runs. Where the
// time of 1 x 256 x 128 -> 512 goes (one H200): of 7.6 us, 1.1 are a launch behind another that does nothing; of the
// 12,000 cycles of the rest the weights take 3,600 to arrive (all blocks read the same lines of the L2 cache at the
// same time), the first product 3,100, the activation 1,100, the second product 2,400, sums and their way 2,000.
// Slower: weights straight to registers, 64 bytes of a row an instruction (whole_registers.cu, where they are half the
// size: 7.9 us); one row tile a block for 256 rows (8.1), half of the blocks (8.6).
#include "../common/launch.h"
#include "../common/overrides.h"
#include "gelu.cuh"
#include "launch.h"
#include "whole_tile.cuh"

namespace styleforge::cuda {
namespace small_ffn {

constexpr int kWidth = 128;  // of input and output, at most

struct FloatShape {
  using T = float;
  static constexpr int kSize = sizeof(T);
  static constexpr int kLine = 16 / kSize;    // numbers in 16 bytes
  static constexpr int kGranule = 4 * kLine;  // k of two instructions: four lanes with 16 bytes each
  static constexpr int kLongPitch = kPitch<T, kWidth>,
                       kShortPitch = kPitch<T, kHidden>;  // of input and first weights; others
  static constexpr int kTiles = kWidth / 32;              // of eight outputs, a warp's
  static constexpr int kSumBytes = kRows * kWidth * static_cast<int>(sizeof(float));
  static constexpr int kFirstBytes = kHidden * kLongPitch * kSize, kSecondBytes = kWidth * kShortPitch * kSize;
  static constexpr int kStageBytes = kFirstBytes + kSecondBytes;  // the weights of 64 hidden columns
  static constexpr int kInputBytes = kRows * kLongPitch * kSize, kActivatedBytes = kRows * kShortPitch * kSize;
  static constexpr int kUnitBytes = kSumBytes + kInputBytes + kActivatedBytes;
  static constexpr int kChains = 4;  // sums of the first product that do not wait for each other
};

}  // namespace small_ffn

namespace {

using namespace small_ffn;

#ifdef STYLEFORGE_HAS_CLUSTER

// Rows of kNumbers, by kThreads threads, to shared memory: in pieces of 16 bytes, as many threads a row as it has
// pieces; zeros beyond a row's end, nothing beyond the last row (what comes of those is not used).
template <typename T, int kNumbers, int kThreads>
struct Copy {
  static constexpr int kSize = sizeof(T), kLine = 16 / kSize, kPieces = kNumbers / kLine, kStep = kThreads / kPieces;
  const T* source;
  int64_t advance;
  uint32_t target;
  int rows;
  bool valid;
  __device__ __forceinline__ Copy(const T* from, int64_t stride, int count, int width, unsigned char* to,
                                  uint32_t thread) {
    const int at = static_cast<int>(thread % kPieces) * kLine, row = static_cast<int>(thread / kPieces);
    valid = at < width;
    source = from + (valid ? row * stride + at : 0);
    advance = valid ? kStep * stride : 0;
    target = shared_address(to) + row * kPitch<T, kNumbers> * kSize + at * kSize;
    rows = count - row;
  }
  // Not moved down to where it is used.
  __device__ __forceinline__ void pin() { asm volatile("" : "+l"(source), "+l"(advance), "+r"(target), "+r"(rows)); }
  template <int kMost>
  __device__ __forceinline__ void run() const {
#pragma unroll
    for (int i = 0; i < kMost / kStep; ++i) {
      copy_async(target + i * kStep * kPitch<T, kNumbers> * kSize, source + i * advance, valid, i * kStep < rows);
    }
  }
};

// One element in the plain way, where the parts of a number that is not finite gave NaN (see gemm/finish.cuh).
__device__ __noinline__ float multiply_plainly(const float* a, const float* b, int k) {
  float sum = 0;
  for (int i = 0; i < k && !isnan(sum); ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

#endif  // STYLEFORGE_HAS_CLUSTER

template <int kUnits>
__global__ void __launch_bounds__(kUnits* kUnitThreads, 1)
    whole_mma_kernel(const __grid_constant__ WholeFfnParams p, const __grid_constant__ SmallFfnSchedule s) {
#ifdef STYLEFORGE_HAS_CLUSTER
  using T = float;
  using S = FloatShape;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t merged[kUnits];

  const Place at(p, s);
  const int unit = at.unit, warp = at.warp, quad = at.quad, place = at.place, tile_row = at.tile_row;
  const int first_row = at.first_row, chunks = at.chunks;

  if (threadIdx.x % kUnitThreads == 0) {
    mbarrier_init(&merged[unit], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_arrive_relaxed();  // sums may come
  if (threadIdx.x % kUnitThreads == 0) mbarrier_arrive_expect(&merged[unit], S::kSumBytes);

  prefetch<T>(p, s, at);

  unsigned char* const own = memory + s.stages * S::kStageBytes + unit * S::kUnitBytes;
  unsigned char* const sums = own;  // [piece][part][lane]
  T* const input = reinterpret_cast<T*>(own + S::kSumBytes);
  T* const activated = reinterpret_cast<T*>(own + S::kSumBytes + S::kInputBytes);
  const int row = first_row + quad, k = place * S::kLine;
  const int first_column = at.first_chunk * kHidden;

  // Rows in pieces of 16 bytes, as many threads a row as it has pieces; zeros beyond the rows' ends. Beyond the last
  // row nothing: what comes of those is not used.
  using Long = Copy<T, kWidth, kUnits * kUnitThreads>;
  using Short = Copy<T, kHidden, kUnits * kUnitThreads>;
  const auto first_copy = [&](int column, int stage) {
    return Long(static_cast<const T*>(p.fc1_weight) + column * p.fc1_stride, p.fc1_stride, p.hidden - column, p.embed,
                memory + stage * S::kStageBytes, threadIdx.x);
  };
  const auto second_copy = [&](int column, int stage) {
    return Short(static_cast<const T*>(p.fc2_weight) + column, p.fc2_stride, p.out, p.hidden - column,
                 memory + stage * S::kStageBytes + S::kFirstBytes, threadIdx.x);
  };
  const auto copy_chunk = [&](int chunk) {
    const int column = first_column + chunk * kHidden, stage = chunk % 2;
    if (chunk < chunks) first_copy(column, stage).template run<kHidden>();
    copy_commit();
    if (chunk < chunks) second_copy(column, stage).template run<kWidth>();
    copy_commit();
  };
  Four<T> bias;
  const auto load_bias = [&](int column) {
    const int c = column + warp * 16 + place * 4;
    bias = {};
    load_wanted(bias.word, static_cast<const T*>(p.fc1_bias) + c, p.fc1_bias != nullptr && c < p.hidden);
  };
  const Outputs<T, S::kTiles> outputs(p, s, at, sums, &merged[unit]);

  // Before the wait, for which the compiler sees no reason.
  Copy<T, kWidth, kUnitThreads> input_here(static_cast<const T*>(p.input) + first_row * p.input_stride, p.input_stride,
                                           p.rows - first_row, p.embed, reinterpret_cast<unsigned char*>(input),
                                           threadIdx.x % kUnitThreads);
  Long first_here = first_copy(first_column, 0);
  Short second_here = second_copy(first_column, 0);
  input_here.pin();
  first_here.pin();
  second_here.pin();
  wait_for_predecessor();
  release_successor();

  input_here.template run<kRows>();
  first_here.template run<kHidden>();
  copy_commit();
  second_here.template run<kWidth>();
  copy_commit();
  if (s.stages > 1) {
    copy_chunk(1);
  } else {
    copy_commit();
    copy_commit();
  }
  load_bias(first_column);
  const auto added = outputs.added(warp);
  float total[S::kTiles][4] = {};
  for (int chunk = 0;;) {  // there is one at least
    const int column = first_column + chunk * kHidden;
    const int own_column = column + warp * 16 + place * 4;
    const T* const first = reinterpret_cast<const T*>(memory + chunk % 2 * S::kStageBytes);
    const T* const second = first + S::kFirstBytes / S::kSize;
    if (chunk == 0) {
      copy_wait<3>();
    } else {
      copy_wait<1>();
    }
    __syncthreads();
    if (chunk > 0) copy_chunk(chunk + 1);  // where no warp reads any more
    float h[8] = {};                       // rows quad and quad + 8, four columns each
#pragma unroll
    for (int chain = 0; chain < S::kChains; ++chain) {
      float d[2][4] = {}, small[2][4] = {};
#pragma unroll
      for (int g = chain; g < kWidth / S::kGranule; g += S::kChains) {
        Line x[2], w[2];
        load_lines(x, input + quad * S::kLongPitch + g * S::kGranule + k, 8 * S::kLongPitch);
        load_lines(w, first + (warp * 16 + tile_row) * S::kLongPitch + g * S::kGranule + k, 2 * S::kLongPitch);
        multiply_granule<T>(d, small, x, w);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        h[i] += d[i % 4 / 2][i / 4 * 2 + i % 2];
        h[i] += small[i % 4 / 2][i / 4 * 2 + i % 2];
      }
    }
    if (isnan(h[0] + h[1] + h[2] + h[3] + h[4] + h[5] + h[6] + h[7])) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = row + i / 4 * 8, c = own_column + i % 4;
        if (isnan(h[i]) && r < p.rows && c < p.hidden) {
          h[i] = multiply_plainly(static_cast<const float*>(p.input) + r * p.input_stride,
                                  static_cast<const float*>(p.fc1_weight) + c * p.fc1_stride, p.embed);
        }
      }
    }
    const auto keep = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float four[4] = {h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]};
        if (row + 8 * i < p.rows && own_column < p.hidden) {
          auto* to = static_cast<T*>(p.product) + static_cast<int64_t>(row + 8 * i) * p.hidden + own_column;
          *reinterpret_cast<Vec<T, 4>*>(to) = rounded<T>(four);
        }
      }
    };
    if (p.product != nullptr) keep();  // before its bias
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] += bias[i % 4];
    if (chunk + 1 < chunks) load_bias(column + kHidden);
    ffn_activate_as<T>(h, p.activation);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float four[4] = {};  // beyond the hidden width an infinite input would make NaN of the zeros there
      if (own_column < p.hidden) {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = h[4 * i + j];
      }
      *reinterpret_cast<Vec<T, 4>*>(activated + (quad + 8 * i) * S::kShortPitch + warp * 16 + place * 4) =
          rounded<T>(four);
    }
    copy_wait<2>();
    __syncthreads();

    float part[S::kTiles][4] = {}, small[S::kTiles][4] = {};
#pragma unroll
    for (int g = 0; g < kHidden / S::kGranule; ++g) {
      Line lines[2], w[S::kTiles];
      load_lines(lines, activated + quad * S::kShortPitch + g * S::kGranule + k, 8 * S::kShortPitch);
#pragma unroll
      for (int j = 0; j < S::kTiles; j += 2) {
        Line pair[2];
        load_lines(pair, second + ((warp * S::kTiles + j) * 8 + tile_row) * S::kShortPitch + g * S::kGranule + k,
                   2 * S::kShortPitch);
        w[j] = pair[0];
        w[j + 1] = pair[1];
      }
      multiply_granule<T>(part, small, lines, w);
    }
    float all = 0;
#pragma unroll
    for (int i = 0; i < 4 * S::kTiles; ++i) all += part[i / 4][i % 4] += small[i / 4][i % 4];
    if (isnan(all)) {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int out = warp * 8 * S::kTiles + j / 2 * 16 + place * 4 + j % 2 * 2 + r % 2;
          if (isnan(part[j][r]) && row + r / 2 * 8 < p.rows && out < p.out) {
            part[j][r] = multiply_plainly(activated + (quad + r / 2 * 8) * S::kShortPitch,
                                          static_cast<const float*>(p.fc2_weight) + out * p.fc2_stride + column,
                                          min(kHidden, p.hidden - column));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * S::kTiles; ++i) total[i / 4][i % 4] += part[i / 4][i % 4];
    if (++chunk == chunks) break;
  }

  __syncwarp();
  cluster_wait();
  outputs.send_all(total);
  outputs.finish(added);
#endif
}

template <int kUnits>
cudaError_t launch_units(const WholeFfnParams& p, const SmallFfnSchedule& s, const DeviceFacts& facts,
                         cudaStream_t stream) {
  return launch(whole_mma_kernel<kUnits>, dim3(static_cast<unsigned>(s.blocks)), dim3(kUnits * kUnitThreads),
                static_cast<size_t>(s.stages * FloatShape::kStageBytes + kUnits * FloatShape::kUnitBytes), s.parts,
                facts, stream, p, s);
}

// STYLEFORGE_GEMM_TUNE="one=1,parts=4,units=2" (one: 1 never, 2 always; not where "small" asks for others)
SmallFfnSchedule schedule(const WholeFfnParams& p, const Overrides& overrides) {
  // A block reads all weights of its hidden columns from the L2 cache, which does not get faster with more blocks than
  // these: then it is better to have more rows in a block, or more columns one after the other.
  constexpr int kBestBlocks = 66;
  const int64_t tiles = ceil_div(p.rows, kRows);
  int parts = most_parts(p), units = 1;
  if (tiles * parts > kBestBlocks && p.embed + p.out > kWidth) units = 2;
  units = overrides.tuned("units", units) == 2 ? 2 : 1;
  if (ceil_div(tiles, units) * parts > kBestBlocks && parts == kMaxParts && ceil_div(p.hidden, kHidden) <= parts) {
    parts /= 2;
  }
  return small_ffn_schedule(p, overrides, parts, units);
}

}  // namespace

cudaError_t whole_mma_supported(const WholeFfnParams& p, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto wish = overrides.tuned("one", 0);
  if (p.dtype != DType::kFloat32 || !small_ffn_takes(p, kWidth, wish, overrides, facts)) return cudaSuccess;
  // Where a block has more to do one after the other, and for a few rows, products one by one are faster: read off one
  // H200. Short sums of float32 are hard to beat in accuracy.
  constexpr int kFewestRows = 64, kShortestSum = 64, kMostBlocks = 66;
  const auto s = schedule(p, overrides);
  const int most = s.units == 1 && p.embed + p.out <= kWidth ? facts.multiprocessors : kMostBlocks;
  supported = wish == 2 || (p.rows >= kFewestRows && p.embed >= kShortestSum && p.hidden >= kShortestSum &&
                            s.blocks <= most && ceil_div(p.hidden, kHidden) <= 2 * s.parts);
  return cudaSuccess;
}

cudaError_t launch_whole_mma(const WholeFfnParams& p, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto s = schedule(p, Overrides("STYLEFORGE_GEMM_TUNE"));
  return s.units == 1 ? launch_units<1>(p, s, facts, stream) : launch_units<2>(p, s, facts, stream);
}

}  // namespace styleforge::cuda
