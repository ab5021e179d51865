// Implicit GEMM on mma.sync and cp.async (sm_80 and newer): 2-d convolution, channels_last, with per-tile channel
// moments in the epilogue; the norm is a pass of its own (finish.cu).
//
//   tile:  16 x (4, 8 or 16) output pixels x kColumns output channels; a warp has some rows of 16 pixels and 32 or 64
//          channels
//   K:     chunks of 128 bytes of input channels (64 halves, 32 floats), for each chunk all taps of the kernel
//
// Input and weights lie in shared memory as in conv_sm90.cu: the tile's input with its halo, one chunk of channels a
// stage, is read from L2 once and used by all taps; the weights of one (chunk, tap) a stage. Padding of every mode is
// index arithmetic of the copies. All threads copy and all multiply: a step of the loop is one (chunk, tap), behind one
// barrier; it asks for the weights of kStages - 1 steps later and for a share of the input of a chunk later. Two blocks
// of a multiprocessor, where its shared memory has room for them, fill each other's waits.
//
// A pixel's 16-byte pieces are swizzled by its index (divided by the power of two in the stride), so that the eight
// pixels of a matrix that ldmatrix reads lie in different banks.
//
// What limits it: with two blocks a multiprocessor the matrix units, at half the rate of wgmma (370 TFLOP/s in fp16 on
// an H200, 8x128x64x64). With one block the latency of a step: everything that a step does besides multiplying is on
// the way between two barriers. So the barrier and the first fragments of the next step lie before the last products
// of this one, copies lie between products, the halo's source of every pixel is looked up, not computed, and what a
// loop needs of its thread's index is hidden from the compiler, which would compute it anew each time (34 -> 21 us,
// fp16, 1x128x128x128 with the norm). Small grids take longer than that explains: fp16 64->64 @64x64 14.0 us in 64
// blocks of 4 x 64, 10.1 in 32 of 8 x 64, and TF32 10.8 and 13.7. Perhaps dependent launch puts several blocks on the
// few multiprocessors that the kernel before has left; not tried: more shared memory than a block needs keeps them
// apart.
//
// TF32: the units cut the lower bits off, as in conv_sm90.cu. That is a common factor but for its spread, and the norm
// takes the factor out: the error against float64 is 2.3e-4 where rounding to nearest gives 2.2e-4, with twice the
// instructions.
// kSplit, float32 accuracy from TF32 units (3xTF32): a = hi + lo, b = hi + lo, both split in registers, which keeps
// shared memory and the reads of it at one third of the multiplications; lo * hi, hi * lo, then hi * hi. The units
// truncate when they add, so the sum of every 32 numbers moves on to float32 registers.
//
// H200, GPU us with the norm, each "this / cuDNN and the norm / conv_sm90.cu":
//
//                                   fp16                TF32               3xTF32
//   64->64 @64x64, 3x3         10.1 / 11.3 /  6.8  10.8 / 12.0 /  8.0   17 /  30 /  14
//   128->128 @128x128          20.6 / 23.8 / 16.0  33.7 / 37.7 / 23.1   84 / 191 /  46
//   64->64 @256x256            25.4 / 34.4 / 21.3  40.6 / 51.6 / 31.3   90 / 159 /  67
//   128->128 @32x32             9.3 / 12.5 /  7.3  15.3 / 13.2 /  9.4   27 /  42 /  21
//   256->256 @64x64, 1x1        9.8 / 11.1 /  8.1  13.7 / 14.3 /  9.4   18 /  37 /  16
//   64->128 @128x128, stride 2 11.8 / 14.3 /  9.1  12.2 / 13.9 / 11.8   19 /  41 /  18
//   8x128->128 @64x64          33.0 / 36.5 / 26.9  56.7 / 54.1 / 41.0  163 / 268 /  88
//   64->32 @256x256, upsampled 45.3 / 57.0 / 57.0  69.4 / 75.3 / 82.7  110 / 198 / 156
//   256->256 @64x64, 3x3       22.5 / 19.3 / 16.9  38.4 / 36.7 / 27.1   84 / 208 /  62
#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/types.cuh"
#include "kernels.h"
#include "mma_shapes.h"
#include "tile_in.cuh"
#include "tile_out.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

// The compiler forgets how the value came about, and does not compute it anew in a loop to save its register.
template <typename V>
__device__ __forceinline__ V opaque(V value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <typename T, typename Shape>
struct MmaTraits {
  static constexpr int kElements = Shape::kChunk / static_cast<int>(sizeof(T));
  static constexpr int kLoadRows = Shape::kThreads / 8;  // pixels or weight rows that the block copies at a time
  static constexpr int kWeightCopies = Shape::kColumns / kLoadRows;
  static constexpr int kStorePitch = stash_pitch(Shape::kColumns, static_cast<int>(sizeof(T)));
  static constexpr int kStoreBytes = ConvSchedule::kTileWidth * kStorePitch;
  static_assert(kWeightCopies >= 1 && Shape::kColumns % kLoadRows == 0 && kLoadRows % 8 == 0);
  static_assert(kStorePitch % 16 == 0, "the stash holds vectors");
};

template <typename T, typename Shape, bool kSplit>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_mma_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ ConvSchedule s) {
#ifdef STYLEFORGE_HAS_MMA
  using Traits = MmaTraits<T, Shape>;
  constexpr int kChunk = Shape::kChunk;
  constexpr int kElements = Traits::kElements;
  constexpr int kWarpRows = Shape::kWarpRows;
  constexpr int kBlocksOf8 = Shape::kWarpColumns / 8;  // of channels of a warp
  extern __shared__ unsigned char dynamic[];
  // Swizzled rows start at multiples of 128 bytes.
  unsigned char* ring = dynamic + ((128 - (shared_address(dynamic) & 127)) & 127);
  int* sources = reinterpret_cast<int*>(ring + s.sources_offset);
  const uint32_t weight_ring = shared_address(ring);
  const uint32_t input_ring = weight_ring + Shape::kStages * Shape::kWeightBytes;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_row = warp / Shape::kWarpsAcross * kWarpRows;
  const int warp_column = warp % Shape::kWarpsAcross * Shape::kWarpColumns;
  const int taps = p.kernel_h * p.kernel_w;
  const int chunks = (p.in_channels + kElements - 1) / kElements;
  const int steps = chunks * taps;
  const int n = blockIdx.z;
  const int first_column = blockIdx.y * Shape::kColumns;
  const ConvTileAt at = conv_tile(p, s, blockIdx.x);

  // Copies: a thread has one 16-byte piece of every kLoadRows-th pixel or weight row. Rows beyond the last are copies
  // of it, whose products nobody reads.
  const int piece = threadIdx.x % 8;
  const int piece_channel = piece * kFullWidth<T>;
  const int load_row = threadIdx.x / 8;
  const uint32_t weight_to = opaque(weight_ring + load_row * kChunk + ((piece ^ (load_row & 7)) << 4));
  const T* weight = static_cast<const T*>(p.weight);
  int weight_rows[Traits::kWeightCopies];
#pragma unroll
  for (int i = 0; i < Traits::kWeightCopies; ++i) {
    const int row = min(first_column + load_row + i * Traits::kLoadRows, p.out_channels - 1);
    weight_rows[i] = opaque((at.phase * p.out_channels + row) * taps * p.in_channels);
  }
  int load_tap = 0, load_offset = piece_channel, load_channel = piece_channel;
  const auto copy_weights = [&](int stage, bool wanted) {
    const bool valid = load_channel < p.in_channels;
    const int offset = valid ? load_offset : 0;
#pragma unroll
    for (int i = 0; i < Traits::kWeightCopies; ++i) {
      copy_async(weight_to + stage * Shape::kWeightBytes + i * Traits::kLoadRows * kChunk,
                 weight + (weight_rows[i] + offset), valid, wanted);
    }
    load_offset += p.in_channels;
    if (++load_tap == taps) {
      load_tap = 0;
      load_channel += kElements;
      load_offset = load_channel;
    }
  };

  // Where the pixels of the halo come from, for all chunks; -1: zeros. Those of one load_row, by the warp that reads
  // it.
  const int pixel_pitch = p.pixel_stride > 0 ? static_cast<int>(p.pixel_stride) : p.in_channels;
  const int line_pitch = p.row_stride > 0 ? static_cast<int>(p.row_stride) : pixel_pitch * p.width;
  const T* sample = static_cast<const T*>(p.input) + static_cast<int64_t>(n) * p.height * line_pitch;
  const int pixels = s.halo_height * s.halo_width;
  for (int pixel = load_row + piece * Traits::kLoadRows; pixel < pixels; pixel += 8 * Traits::kLoadRows) {
    const int hy = __umulhi(pixel, s.halo_divisor);
    const int y = at.y * p.stride_h - p.pad_top + (at.phase >> 1) + hy;
    const int x = at.x * p.stride_w - p.pad_left + (at.phase & 1) + pixel - hy * s.halo_width;
    const int sy = padded_source(y, p.height, p.mode);
    const int sx = padded_source(x, p.width, p.mode);
    const bool inside = p.mode != PaddingMode::kZeros || (sx == x && sy == y);
    sources[pixel] = inside ? sy * line_pitch + sx * pixel_pitch : -1;
  }
  __syncwarp();
  const uint32_t source_at = opaque(shared_address(sources + load_row));
  const auto copy_pixel = [&](uint32_t to, int channel, int pixel, bool wanted) {
    const int source = load_shared(source_at + pixel * 4, wanted);
    pixel += load_row;
    const bool valid = source >= 0 && channel < p.in_channels;
    copy_async(to + pixel * kChunk + ((piece ^ ((pixel >> s.swizzle_shift) & 7)) << 4),
               sample + (valid ? source + channel : 0), valid, wanted);
  };
  // `count` pixels from `from` on of a chunk, where it is wanted; all threads must see the same arguments.
  const auto copy_input = [&](uint32_t to, int chunk, int from, int count, bool wanted) {
    const int channel = chunk * kElements + piece_channel;
    const int end = wanted ? min(from + count, pixels) : 0;
    copy_pixel(to, channel, from, from + load_row < end);
#pragma unroll 1
    for (from += Traits::kLoadRows; from < end; from += Traits::kLoadRows) {
      copy_pixel(to, channel, from, from + load_row < end);
    }
  };

  float d[kWarpRows][kBlocksOf8][4];
#pragma unroll
  for (int f = 0; f < kWarpRows; ++f) {
#pragma unroll
    for (int j = 0; j < kBlocksOf8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[f][j][e] = 0;
    }
  }

  wait_for_predecessor();
#pragma unroll 1
  for (int i = 0, asked = 0; i < Shape::kStages - 1; ++i) {
    copy_weights(i, i < steps);
    const bool wanted = asked < s.chunks_ahead && i == asked * taps;
    copy_input(input_ring + asked * s.halo_bytes, asked, 0, pixels, wanted);
    if (wanted) ++asked;
    copy_commit();
  }

  // Lane l has the address of pixel l % 16 of a row and of its 16-byte half l / 16 (ldmatrix); of channel l % 8 + l /
  // 16
  // * 8 and half l / 8 % 2 in the weights.
  const int half = opaque(lane / 16);
  int first_pixel[kWarpRows];
#pragma unroll
  for (int f = 0; f < kWarpRows; ++f) {
    first_pixel[f] = opaque((warp_row + f) * p.stride_h * s.halo_width + lane % 16 * p.stride_w);
  }
  const uint32_t first_weight =
      opaque(weight_ring + (warp_column + lane % 8 + lane / 16 * 8) * kChunk + (((lane & 7) ^ (lane / 8 % 2)) << 4));
  int tap = 0, tap_column = 0, tap_pixel = 0, chunk = 0, input_stage = 0, weight_stage = 0;
  const auto before = [](int stage, int stages) { return (stage == 0 ? stages : stage) - 1; };
  uint32_t a_at[kWarpRows], b_at;
  const auto set_addresses = [&] {
#pragma unroll
    for (int f = 0; f < kWarpRows; ++f) {
      const int pixel = first_pixel[f] + tap_pixel;
      a_at[f] =
          input_ring + input_stage * s.halo_bytes + pixel * kChunk + ((((pixel >> s.swizzle_shift) & 7) ^ half) << 4);
    }
    b_at = first_weight + weight_stage * Shape::kWeightBytes;
  };
  // Two sets of fragments: one is loaded while the other is multiplied.
  uint32_t as[2][kWarpRows][4], bs[2][kBlocksOf8 / 2][4];
  const auto load = [&](int k) {  // 32 bytes of channels
#pragma unroll
    for (int f = 0; f < kWarpRows; ++f) load_matrices(as[k % 2][f], a_at[f] ^ (k << 5));
#pragma unroll
    for (int j = 0; j < kBlocksOf8 / 2; ++j) load_matrices(bs[k % 2][j], (b_at + j * 16 * kChunk) ^ (k << 5));
  };
  [[maybe_unused]] float part[kSplit ? kWarpRows : 1][kBlocksOf8][4];
  const auto multiply_all = [&](int k) {
    uint32_t (&a)[kWarpRows][4] = as[k % 2];
    [[maybe_unused]] uint32_t a_lo[kSplit ? kWarpRows : 1][4];
    if constexpr (kSplit) {
#pragma unroll
      for (int f = 0; f < kWarpRows; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) split_fragment(a[f][i], a[f][i], a_lo[f][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocksOf8 / 2; ++j) {  // 16 channels
      uint32_t (&b)[4] = bs[k % 2][j];
      [[maybe_unused]] uint32_t b_lo[4];
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) split_fragment(b[i], b[i], b_lo[i]);
      }
#pragma unroll
      for (int f = 0; f < kWarpRows; ++f) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          float (&sum)[4] = d[f][2 * j + i / 2];
          if constexpr (kSplit) {
            float zero[4] = {};
            float (&own)[4] = part[f][2 * j + i / 2];
            multiply<T>(own, a_lo[f], b[i], b[i + 1], k == 0 ? zero : own);
            multiply<T>(own, a[f], b_lo[i], b_lo[i + 1], own);
            multiply<T>(own, a[f], b[i], b[i + 1], own);
            if (k < 3) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e] += own[e];
          } else {
            multiply<T>(sum, a[f], b[i], b[i + 1], sum);
          }
        }
      }
    }
  };

  set_addresses();
  copy_wait<Shape::kStages - 2>();
  __syncthreads();
  load(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    load(1);
    multiply_all(0);
    // Copies while the matrix units are busy. The stage of the step before is free, and so is the input of the chunk
    // before.
    copy_weights(before(weight_stage, Shape::kStages), step + Shape::kStages - 1 < steps);
    load(2);
    multiply_all(1);
    copy_input(input_ring + before(input_stage, s.input_stages) * s.halo_bytes, chunk + s.chunks_ahead,
               tap * s.pixels_a_step, s.pixels_a_step, chunk + s.chunks_ahead < chunks);
    copy_commit();
    load(3);
    multiply_all(2);
    if (++weight_stage == Shape::kStages) weight_stage = 0;
    ++tap_pixel;
    if (++tap_column == p.kernel_w) {
      tap_column = 0;
      tap_pixel += s.halo_width - p.kernel_w;
    }
    if (++tap == taps) {
      tap = tap_pixel = 0;
      ++chunk;
      if (++input_stage == s.input_stages) input_stage = 0;
    }
    set_addresses();
    copy_wait<Shape::kStages - 2>();
    __syncthreads();
    load(0);  // of the next step; behind the last one nobody reads it
    multiply_all(3);
  }
  release_successor();
  __syncthreads();  // everything loaded has been multiplied: the rings are free

  // This lane's two pixels of each of the warp's rows, and their columns: d[f][j][{0, 1}] at x = lane / 4, d[f][j][{2,
  // 3}] at x + 8.
  const int x = lane / 4;
#pragma unroll
  for (int f = 0; f < kWarpRows; ++f) {
    unsigned char* own = ring + (warp_row + f) * Traits::kStoreBytes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kBlocksOf8; ++j) {
        Vec<T, 2> v;
        v.data[0] = from_acc<T>(d[f][j][2 * h]);
        v.data[1] = from_acc<T>(d[f][j][2 * h + 1]);
        *reinterpret_cast<Vec<T, 2>*>(own + (x + 8 * h) * Traits::kStorePitch +
                                      (warp_column + 8 * j + 2 * (lane % 4)) * static_cast<int>(sizeof(T))) = v;
      }
    }
  }

  const bool has_moments = p.moments != nullptr;
  float2* parts = reinterpret_cast<float2*>(ring + s.parts_offset);
  if (has_moments) {
    // Of the lane's pixels, row by row: every valid row has the same number of them; then of the warp's.
    constexpr int kList = 2 * kBlocksOf8;
    const bool second = x + 8 < at.columns;
    const float pair = static_cast<float>(x < at.columns) + static_cast<float>(second);
    const int rows = pair > 0 ? min(max(at.rows - warp_row, 0), kWarpRows) : 0;
    float mean[kList], m2[kList];
#pragma unroll
    for (int i = 0; i < kList; ++i) {
      mean[i] = m2[i] = 0;
#pragma unroll
      for (int f = 0; f < kWarpRows; ++f) {
        const float first = d[f][i / 2][i % 2];
        const float difference = d[f][i / 2][i % 2 + 2] - first;
        const float own_mean = second ? first + 0.5f * difference : first;
        const float own_m2 = second ? 0.5f * difference * difference : 0.0f;
        const float step = own_mean - mean[i];
        const float share = 1.0f / static_cast<float>(f + 1);
        if (f < rows) {
          mean[i] += step * share;
          m2[i] += own_m2 + step * step * (pair * (static_cast<float>(f) * share));
        }
      }
    }
    float count = pair * static_cast<float>(rows);
    int first = 0;
    merge_rows(mean, m2, count, first);
#pragma unroll
    for (int i = 0; i < kList / 8; ++i) {
      const int j = first + i;
      parts[warp / Shape::kWarpsAcross * Shape::kColumns + warp_column + 8 * (j / 2) + 2 * (lane % 4) + j % 2] =
          make_float2(mean[i], m2[i]);
    }
  }
  __syncthreads();

  using Out = RowOut<T, Shape::kColumns>;
#pragma unroll 1
  for (int row = warp; row < at.rows; row += Shape::kThreads / 32) {
    const unsigned char* own = ring + row * Traits::kStoreBytes;
    const Out out(p, n, first_column, at, row);
    if (p.out_channels % kFullWidth<T> == 0) {
      out.write(p, own);
    } else {  // out_channels is even
      const int columns = min(Shape::kColumns, p.out_channels - first_column);
      T* output = static_cast<T*>(p.output) + out.at - out.column;
#pragma unroll 1
      for (int i = lane; i < Shape::kColumns / 2 * at.columns; i += 32) {
        const int pixel = i / (Shape::kColumns / 2);
        const int column = i % (Shape::kColumns / 2) * 2;
        if (column >= columns) continue;
        *reinterpret_cast<Vec<T, 2>*>(output + static_cast<int64_t>(pixel) * out.pixel_pitch + column) =
            *reinterpret_cast<const Vec<T, 2>*>(own + pixel * Traits::kStorePitch +
                                                column * static_cast<int>(sizeof(T)));
      }
    }
  }
  const int column = threadIdx.x;
  if (has_moments && column < Shape::kColumns && first_column + column < p.out_channels) {
    float2 sum = parts[column];
    float count = static_cast<float>(min(at.rows, kWarpRows) * at.columns);
#pragma unroll
    for (int w = 1; w < Shape::kWarpsDown; ++w) {
      const int rows = min(at.rows - w * kWarpRows, kWarpRows);
      if (rows <= 0) break;
      const float2 part = parts[w * Shape::kColumns + column];
      const float own = static_cast<float>(rows * at.columns);
      const float step = part.x - sum.x;
      const float share = own / (count + own);
      sum.x += step * share;
      sum.y += part.y + step * step * count * share;
      count += own;
    }
    p.moments[(static_cast<int64_t>(n) * s.entries + blockIdx.x) * p.out_channels + first_column + column] = sum;
  }
#endif
}

template <typename T, typename Shape, bool kSplit>
cudaError_t launch_shape(const ConvParams& p, const ConvSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  const auto grid =
      dim3(static_cast<unsigned>(s.entries), static_cast<unsigned>(ceil_div(p.out_channels, Shape::kColumns)),
           static_cast<unsigned>(p.batch));
  return launch(conv_mma_kernel<T, Shape, kSplit>, grid, dim3(Shape::kThreads), s.shared_bytes, 1, facts, stream, p, s);
}

template <typename T, bool kSplit>
cudaError_t launch_kind(const ConvParams& p, const ConvSchedule& s, const DeviceFacts& facts, cudaStream_t stream) {
  return switch_mma_tile(s.mma_tile, [&]<typename Shape>() -> cudaError_t {
    if constexpr (!Shape::takes(kSplit)) {
      return cudaErrorInvalidValue;
    } else {
      return launch_shape<T, Shape, kSplit>(p, s, facts, stream);
    }
  });
}

}  // namespace

cudaError_t launch_conv_mma(const ConvParams& p, const ConvSchedule& s, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  switch (p.dtype) {
    case DType::kFloat16:
      return launch_kind<__half, false>(p, s, facts, stream);
    case DType::kBFloat16:
      return launch_kind<__nv_bfloat16, false>(p, s, facts, stream);
    case DType::kFloat32:
      return p.precision == ConvPrecision::kIeee ? launch_kind<float, true>(p, s, facts, stream)
                                                 : launch_kind<float, false>(p, s, facts, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace styleforge::cuda
