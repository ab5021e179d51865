// The first layer of a network for pictures: a convolution of one to four input channels, with per-tile channel moments
// in the epilogue, for mma.sync (sm_80 and newer). Reads the picture as it lies, in either format, and pads by index
// arithmetic; writes channels_last.
//
//   tile:  16 pixels x (32 or 16) rows x 32 output channels; a warp has some rows, each the 16 rows of a matrix product
//   K:     for each row of the kernel kernel_w * in_channels numbers, which lie one behind the other in memory:
//          27 of 32 are used in a 9 x 9 kernel on RGB. (With a pixel padded to 16 bytes, as the copy engine wants it,
//          it was 27 of 128: 104 us against the few that the arithmetic takes, 3 -> 32 on 512x512 in half precision.)
//
// The tile's input lies in shared memory row by row, channels innermost. A lane's pairs of halves begin at any number
// of halves, so rows are there twice, the second time one number further on; the two copies are 16 banks apart.
// Weights stay in shared memory as the lanes take them, for all tiles of a block. A column of the matrix product is not
// the channel of the same number: the channels are dealt out so that a lane has eight neighbouring ones of a pixel.
//
// float32 is 3xTF32 (a = hi + lo, b = hi + lo; lo * hi, hi * lo, then hi * hi); a kernel row's sum moves on to float32
// registers, because the units truncate when they add.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "kernels.h"
#include "tile_in.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 32;  // output channels of a block
constexpr int kTiles = 4;     // of eight columns each
constexpr int kWidth = 8;     // channels of a lane
constexpr int kMaxChannels = 4;
constexpr int kMaxShared = 96 * 1024;
constexpr int kPieces = 3;  // of 32 numbers of a row, and
constexpr int kLoads = 5;   // rows whose loads a lane has in flight

template <typename T>
struct PictureTraits {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kRows = kHalf ? 4 : 2;   // of a warp
  static constexpr int kStep = kHalf ? 16 : 8;  // numbers of K of an instruction
  static constexpr int kHeight = kWarps * kRows;
  static constexpr int kStepBytes = kTiles * 32 * (kHalf ? 8 : 16);  // weights of a step
};

// What depends on the sizes alone.
struct PictureShape {
  int steps = 0;      // of a row of the kernel
  int row_words = 0;  // of four bytes, of one copy of a row of the tile's input
  int pitch = 0;      // and of a row
  int elements = 0;   // of a row that come from the picture
  int halo_height = 0;
  int weight_bytes = 0;
  unsigned channels_divisor = 0, filter_divisor = 0, taps_divisor = 0, width_divisor = 0;
};

__device__ __forceinline__ int divide(int value, int by, unsigned divisor) {
  return by == 1 ? value : static_cast<int>(__umulhi(value, divisor));
}

#ifdef STYLEFORGE_HAS_MMA

// The block's weights to shared memory, in the order in which lanes take them; the rest is zeros already.
template <typename T>
__device__ __forceinline__ void bring_weights(const ConvParams& p, const PictureConv& picture, const PictureShape& s,
                                              int first_column, unsigned char* to) {
  using Traits = PictureTraits<T>;
  const int taps = p.kernel_h * p.kernel_w;
  const int filter = p.in_channels * taps;
  const int count = min(kColumns, p.out_channels - first_column) * filter;
  const T* weight = static_cast<const T*>(p.weight) + first_column * picture.weight_stride[0];
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int channel = divide(i, filter, s.filter_divisor);
    const int in_filter = i - channel * filter;
    const int c = divide(in_filter, taps, s.taps_divisor);
    const int tap = in_filter - c * taps;
    const int ky = divide(tap, p.kernel_w, s.width_divisor);
    const int kx = tap - ky * p.kernel_w;
    const T value = weight[channel * picture.weight_stride[0] + c * picture.weight_stride[1] +
                           ky * picture.weight_stride[2] + kx * picture.weight_stride[3]];
    const int k = kx * p.in_channels + c;
    const int step = ky * s.steps + k / Traits::kStep;
    const int tile = channel % 8 / 2;
    const int column = channel / 8 * 2 + channel % 2;
    if constexpr (Traits::kHalf) {
      const int lane = column * 4 + k % 8 / 2;
      reinterpret_cast<T*>(to)[((step * 2 + tile / 2) * 32 + lane) * 8 + tile % 2 * 4 + k % 16 / 8 * 2 + k % 2] = value;
    } else {
      const int lane = column * 4 + k % 4;
      const uint32_t high = round_tf32(value);
      uint32_t* at = reinterpret_cast<uint32_t*>(to) + ((step * kTiles + tile) * 32 + lane) * 4 + k % 8 / 4;
      at[0] = high;
      at[2] = round_tf32(value - __uint_as_float(high));
    }
  }
}

// A tile's input to shared memory, a warp a row at a time; what no element of the picture lies in is zeros already.
template <typename T>
__device__ __forceinline__ void bring_input(const ConvParams& p, const PictureConv& picture, const PictureShape& s,
                                            int n, const ConvTileAt& at, uint32_t* to) {
  const int warp = threadIdx.x / 32;
  const int top = at.y * p.stride_h - p.pad_top, left = at.x * p.stride_w - p.pad_left;
  const bool zeros = p.mode == PaddingMode::kZeros;
  const T* sample = static_cast<const T*>(p.input) + n * picture.input_stride[0];
  for (int base = threadIdx.x % 32; base < s.elements; base += 32 * kPieces) {
    const T* column[kPieces];
    bool inside[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int e = base + 32 * i;
      const int x = divide(e, p.in_channels, s.channels_divisor);
      inside[i] = e < s.elements && (!zeros || (left + x >= 0 && left + x < p.width));
      column[i] = sample + padded_source(left + x, p.width, p.mode) * picture.input_stride[3] +
                  (e - x * p.in_channels) * picture.input_stride[1];
    }
    for (int first = warp; first < s.halo_height; first += kWarps * kLoads) {
      T value[kLoads][kPieces];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int y = top + first + u * kWarps;
        const bool valid = !zeros || (y >= 0 && y < p.height);
        const int64_t row = padded_source(y, p.height, p.mode) * picture.input_stride[2];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) value[u][i] = inside[i] && valid ? column[i][row] : from_acc<T>(0.0f);
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int row = first + u * kWarps;
        if (row >= s.halo_height) continue;
        T* copy = reinterpret_cast<T*>(to + row * s.pitch);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int e = base + 32 * i;
          if (e >= s.elements) continue;
          copy[e] = value[u][i];
          if (sizeof(T) == 2 && e > 0) copy[2 * s.row_words + e - 1] = value[u][i];
        }
      }
    }
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    conv_picture_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ PictureConv picture,
                        const __grid_constant__ ConvSchedule schedule, const __grid_constant__ PictureShape s) {
#ifdef STYLEFORGE_HAS_MMA
  using Traits = PictureTraits<T>;
  constexpr int kRows = Traits::kRows;
  extern __shared__ uint4 dynamic[];
  __shared__ float2 parts[kWarps][kColumns];
  unsigned char* weights = reinterpret_cast<unsigned char*>(dynamic);
  uint32_t* halo = reinterpret_cast<uint32_t*>(weights + s.weight_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int n = blockIdx.z;
  const int first_column = blockIdx.y * kColumns;

  for (int i = threadIdx.x; i < s.weight_bytes / 16; i += kThreads) dynamic[i] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < s.halo_height * s.pitch; i += kThreads) halo[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  bring_weights<T>(p, picture, s, first_column, weights);

  // Words between a lane's pixel in the first row of a tile and its neighbours.
  const int numbers = g * p.stride_w * p.in_channels;
  const int own = Traits::kHalf ? numbers % 2 * s.row_words + numbers / 2 + t : numbers + t;
  const int eight = 8 * p.stride_w * p.in_channels / (Traits::kHalf ? 2 : 1);
  const uint32_t* lane_halo = halo + warp * kRows * p.stride_h * s.pitch + own;
  const int row_pitch = p.stride_h * s.pitch;

  for (int tile = blockIdx.x; tile < schedule.entries; tile += gridDim.x) {
    const ConvTileAt at = conv_tile(p, schedule, tile);
    bring_input<T>(p, picture, s, n, at, halo);
    __syncthreads();

    float total[kRows][kTiles][4] = {};
    const uint4* taken = dynamic + lane;
    for (int r = 0; r < p.kernel_h; ++r) {
      const uint32_t* from = lane_halo + r * s.pitch;
      if constexpr (Traits::kHalf) {
#pragma unroll 2
        for (int step = 0; step < s.steps; ++step, from += 8, taken += 64) {
          const uint4 b01 = taken[0], b23 = taken[32];
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            const uint32_t* row = from + m * row_pitch;
            const uint32_t a[4] = {row[0], row[eight], row[4], row[eight + 4]};
            multiply<T>(total[m][0], a, b01.x, b01.y, total[m][0]);
            multiply<T>(total[m][1], a, b01.z, b01.w, total[m][1]);
            multiply<T>(total[m][2], a, b23.x, b23.y, total[m][2]);
            multiply<T>(total[m][3], a, b23.z, b23.w, total[m][3]);
          }
        }
      } else {
        float d[kRows][kTiles][4] = {};
#pragma unroll 1
        for (int step = 0; step < s.steps; ++step, from += 8, taken += 128) {
          uint32_t high[kRows][4], low[kRows][4];
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            const uint32_t* row = from + m * row_pitch;
            const uint32_t a[4] = {row[0], row[eight], row[4], row[eight + 4]};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              high[m][i] = round_tf32(__uint_as_float(a[i]));
              low[m][i] = round_tf32(__uint_as_float(a[i]) - __uint_as_float(high[m][i]));
            }
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint4 b = taken[32 * j];
#pragma unroll
            for (int m = 0; m < kRows; ++m) multiply<T>(d[m][j], low[m], b.x, b.y, d[m][j]);
#pragma unroll
            for (int m = 0; m < kRows; ++m) multiply<T>(d[m][j], high[m], b.z, b.w, d[m][j]);
#pragma unroll
            for (int m = 0; m < kRows; ++m) multiply<T>(d[m][j], high[m], b.x, b.y, d[m][j]);
          }
        }
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
          for (int i = 0; i < 4 * kTiles; ++i) total[m][i / 4][i % 4] += d[m][i / 4][i % 4];
        }
      }
    }
    if (tile + static_cast<int>(gridDim.x) >= schedule.entries) release_successor();

    // A lane has channels 8 t .. 8 t + 7 of the pixels g and g + 8 of its rows: total[m][j][2 h + e] is channel
    // 2 j + e of pixel g + 8 h.
    const int first_row = warp * kRows;
    const bool writes = first_column + t * kWidth < p.out_channels;
    const int rows = min(max(at.rows - first_row, 0), kRows);
    const float count = static_cast<float>(rows * at.columns);
    float sum[kWidth] = {}, squares[kWidth] = {};
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (m >= rows || g + 8 * h >= at.columns) continue;
        float v[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[c] += v[c] = total[m][c / 2][2 * h + c % 2];
        if (!writes) continue;
        const int64_t pixel =
            (static_cast<int64_t>(n) * p.out_height + at.y + first_row + m) * p.out_width + at.x + g + 8 * h;
        T* output = static_cast<T*>(p.output) + pixel * p.out_channels + first_column + t * kWidth;
        if constexpr (Traits::kHalf) {
          *reinterpret_cast<Vec<T, kWidth>*>(output) = rounded<T>(v);
        } else {
          reinterpret_cast<float4*>(output)[0] = make_float4(v[0], v[1], v[2], v[3]);
          reinterpret_cast<float4*>(output)[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
      }
    }
    const float share = count > 0 ? 1.0f / count : 0.0f;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], mask);
      sum[c] *= share;  // the mean
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (m >= rows || g + 8 * h >= at.columns) continue;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float difference = total[m][c / 2][2 * h + c % 2] - sum[c];
          squares[c] += difference * difference;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) squares[c] += __shfl_xor_sync(0xffffffffu, squares[c], mask);
      if (g == c) parts[warp][t * kWidth + c] = make_float2(sum[c], squares[c]);
    }
    __syncthreads();  // and the tile's input has been read
    const int column = threadIdx.x;
    if (column < kColumns && first_column + column < p.out_channels) {
      float tile_mean = 0, tile_m2 = 0;
      int before = 0;
      for (int w = 0; w < kWarps; ++w) {
        const int more = min(max(at.rows - w * kRows, 0), kRows);
        if (more == 0) break;
        const float2 part = parts[w][column];
        const float difference = part.x - tile_mean;
        const float part_share = static_cast<float>(more) / static_cast<float>(before + more);
        tile_mean += difference * part_share;
        tile_m2 += part.y + difference * difference * (static_cast<float>(before * at.columns) * part_share);
        before += more;
      }
      p.moments[(static_cast<int64_t>(n) * schedule.entries + tile) * p.out_channels + first_column + column] =
          make_float2(tile_mean, tile_m2);
    }
  }
#endif
}

PictureShape shape_of(const ConvParams& p, int height, int step, int element) {
  PictureShape s;
  const int numbers = p.kernel_w * p.in_channels;
  s.steps = static_cast<int>(ceil_div(numbers, step));
  s.elements = ((ConvSchedule::kTileWidth - 1) * p.stride_w + p.kernel_w) * p.in_channels;
  const int read = (ConvSchedule::kTileWidth - 1) * p.stride_w * p.in_channels + s.steps * step;
  if (element == 2) {
    s.row_words = (read / 2 + 1 + 15) / 32 * 32 + 16;
    s.pitch = 2 * s.row_words;
  } else {
    s.row_words = s.pitch = read;
  }
  s.halo_height = (height - 1) * p.stride_h + p.kernel_h;
  s.channels_divisor = rounded_reciprocal(p.in_channels);
  s.taps_divisor = rounded_reciprocal(p.kernel_h * p.kernel_w);
  s.filter_divisor = rounded_reciprocal(p.in_channels * p.kernel_h * p.kernel_w);
  s.width_divisor = rounded_reciprocal(p.kernel_w);
  return s;
}

template <typename T>
PictureShape shape_of(const ConvParams& p) {
  using Traits = PictureTraits<T>;
  PictureShape s = shape_of(p, Traits::kHeight, Traits::kStep, static_cast<int>(sizeof(T)));
  s.weight_bytes = p.kernel_h * s.steps * Traits::kStepBytes;
  return s;
}

size_t shared_bytes(const PictureShape& s) {
  return static_cast<size_t>(s.weight_bytes) + 4 * static_cast<size_t>(s.halo_height) * static_cast<size_t>(s.pitch);
}

}  // namespace

cudaError_t schedule_picture_conv(const ConvParams& p, ConvSchedule& schedule, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_CONV_TUNE");
  if (overrides.forced() && !overrides.forced("picture")) return cudaSuccess;
  if (facts.major < 8 || facts.compiled_for < 80) return cudaSuccess;
  if (p.dtype == DType::kFloat64 || p.phases != 1 || p.in_channels > kMaxChannels) return cudaSuccess;
  if (p.out_channels % kWidth != 0 || p.batch > 65535 || p.out_channels > 65535) return cudaSuccess;
  const bool half = size_of(p.dtype) == 2;
  const PictureShape shape = half ? shape_of<__half>(p) : shape_of<float>(p);
  if (shared_bytes(shape) > kMaxShared) return cudaSuccess;
  schedule = {};
  schedule.columns = kColumns;
  schedule.tile_height = half ? PictureTraits<__half>::kHeight : PictureTraits<float>::kHeight;
  schedule.tiles_x = static_cast<int>(ceil_div(p.out_width, ConvSchedule::kTileWidth));
  schedule.tiles_y = static_cast<int>(ceil_div(p.out_height, schedule.tile_height));
  schedule.tiles_x_divisor = rounded_reciprocal(schedule.tiles_x);
  schedule.entries = schedule.tiles_x * schedule.tiles_y;
  if (int64_t{schedule.entries} * schedule.tiles_x > INT32_MAX) return cudaSuccess;
  schedule.shared_bytes = shared_bytes(shape);
  supported = true;
  return cudaSuccess;
}

cudaError_t launch_picture_conv(const ConvParams& p, const PictureConv& picture, const ConvSchedule& schedule,
                                const InstanceNormParams& norm, cudaStream_t stream, const char*& name) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  name = p.dtype == DType::kFloat32 ? "picture:3xtf32" : "picture";
  const int64_t groups = ceil_div(p.out_channels, kColumns) * p.batch;
  const int64_t wanted = std::clamp<int64_t>(2 * facts.multiprocessors / groups, 1, schedule.entries);
  const int64_t blocks = ceil_div(schedule.entries, ceil_div(schedule.entries, wanted));
  const auto grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.out_channels, kColumns)),
                         static_cast<unsigned>(p.batch));
  const auto error = switch_dtype(p.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      return launch(conv_picture_kernel<T>, grid, dim3(kThreads), schedule.shared_bytes, 1, facts, stream, p, picture,
                    schedule, shape_of<T>(p));
    }
  });
  if (error != cudaSuccess) return error;
  return launch_conv_finish(p, schedule, norm, stream);
}

}  // namespace styleforge::cuda
