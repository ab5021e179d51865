// The first layer of a network for pictures: a convolution of one to four input channels, with per-tile channel moments
// in the epilogue, for mma.sync (sm_80 and newer). Reads the picture as it lies, in either format, and pads by index
// arithmetic; writes channels_last.
//
//   tile:  16 pixels x 16 (3xTF32: 8) rows x 32 output channels; a warp has 8 pixels of 8 (4) rows, of which two, 4 (2)
//          apart, are the 16 rows of a matrix product
//   K:     for each row of the kernel kernel_w * in_channels numbers, which lie one behind the other in memory:
//          27 of 32 are used in a 9 x 9 kernel on RGB. (With a pixel padded to 16 bytes, as the copy engine wants it,
//          it was 27 of 128: 104 us against the few that the arithmetic takes, 3 -> 32 on 512x512 in half precision.)
//
// The tile's input lies in shared memory row by row, channels innermost. A lane's pairs of halves begin at any number
// of halves, so rows are there twice, the second time one number further on; the two copies are 16 banks apart. What
// all rows of a 9 x 9 kernel need of a row of the picture wanders through the registers as fragments.
// Weights stay in shared memory as the lanes take them, for all tiles of a block. A column of the matrix product is not
// the channel of the same number: the channels are dealt out so that a lane has neighbouring ones of a pixel.
//
// What limits it is not the arithmetic (a third of the time in TF32), but what each warp does before and behind it:
// rows that wander (fewer reads of shared memory) gained nothing in TF32, fewer instructions for each weight and the
// next tile on its way 3 us. With the norm, 3 -> 32 on 512x512: 37.6 us in 16 bits, 53.7 in TF32, 104 in 3xTF32
// (before: 38.5, 113 and 113).
//
// float32 is TF32, rounded to nearest, or 3xTF32 (a = hi + lo, b = hi + lo; lo * hi, hi * lo, then hi * hi), where a
// kernel row's sum moves on to float32 registers, because the units truncate when they add.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "kernels.h"
#include "tile_in.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kAcross = 2, kDown = 2;  // warps of a block
constexpr int kWarps = kAcross * kDown;
constexpr int kThreads = 32 * kWarps;
constexpr int kPixels = 8;    // of a warp in a row
constexpr int kColumns = 32;  // output channels of a block
constexpr int kTiles = 4;     // of eight columns each
constexpr int kWidth = 8;     // channels of a lane
constexpr int kMaxChannels = 4;
constexpr int kMaxShared = 96 * 1024;
constexpr int kPieces = 3;  // of 32 numbers of a row, and
constexpr int kLoads = 6;   // rows whose loads a lane has in flight
constexpr int kBatch = 5;   // and rows of the kernel, for weights
static_assert(kAcross * kPixels == ConvSchedule::kTileWidth);

// kSplit: 3xTF32.
template <typename T, bool kSplit>
struct PictureTraits {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kPairs = kSplit ? 2 : 4;  // of rows of a warp, a matrix product each
  static constexpr int kRows = 2 * kPairs;
  static constexpr int kStep = kHalf ? 16 : 8;  // numbers of K of an instruction
  static constexpr int kHeight = kDown * kRows;
  static constexpr int kStepBytes = kTiles * 32 * (kSplit ? 16 : 8);  // weights of a step
  static constexpr int kUsualSteps = kHalf ? 2 : 4;                   // of 9 x 9 on RGB
  static constexpr int kBlocks = kHalf ? 3 : 2;                       // of a multiprocessor
  static constexpr int kBuffers = kHalf ? 1 : 2;                      // for a tile's input
  static_assert(!(kHalf && kSplit));

  // Where an output channel of a block lies in the product, and which one a lane's c-th is: it has eight neighbours of
  // 16 bits or twice four of 32, so that four lanes write whole sectors of memory at a time.
  static __device__ __forceinline__ int tile_of(int channel) {
    return kHalf ? channel % 8 / 2 : channel / 16 * 2 + channel % 4 / 2;
  }
  static __device__ __forceinline__ int column_of(int channel) {
    return (kHalf ? channel / 8 : channel % 16 / 4) * 2 + channel % 2;
  }
  static __device__ __forceinline__ int channel_of(int t, int c) {
    return kHalf ? 8 * t + c : c / 4 * 16 + 4 * t + c % 4;
  }
};

// What depends on the sizes alone.
struct PictureShape {
  int steps = 0;      // of a row of the kernel
  int row_words = 0;  // of four bytes, of one copy of a row of the tile's input
  int pitch = 0;      // and of a row
  int elements = 0;   // of a row that come from the picture
  int halo_height = 0, buffers = 1;
  int weight_bytes = 0;
  unsigned channels_divisor = 0;  // 2^32 / in_channels, rounded up
};

__device__ __forceinline__ int divide(int value, int by, unsigned divisor) {
  return by == 1 ? value : static_cast<int>(__umulhi(value, divisor));
}

#ifdef STYLEFORGE_HAS_MMA

// The block's weights to shared memory, in the order in which lanes take them; zeros beyond a row's numbers. A lane has
// a number of K, a warp eight channels, of which those that do not exist are copies of the last: nobody reads what they
// give.
template <typename T, bool kSplit>
__device__ __forceinline__ void bring_weights(const ConvParams& p, const PictureConv& picture, const PictureShape& s,
                                              int first_column, unsigned char* to) {
  using Traits = PictureTraits<T, kSplit>;
  static_assert(kWarps * 8 == kColumns);
  const int warp = threadIdx.x / 32;
  const int numbers = p.kernel_w * p.in_channels;
  for (int k = threadIdx.x % 32; k < s.steps * Traits::kStep; k += 32) {
    const bool exists = k < numbers;
    const int kx = divide(exists ? k : 0, p.in_channels, s.channels_divisor);
    const T* lane_from = static_cast<const T*>(p.weight) + kx * picture.weight_stride[3] +
                         ((exists ? k : 0) - kx * p.in_channels) * picture.weight_stride[1];
    const T* from[8];
    uint32_t at[8];  // bytes
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = warp * 8 + i;
      from[i] = lane_from + min(first_column + channel, p.out_channels - 1) * picture.weight_stride[0];
      const int step = k / Traits::kStep, tile = Traits::tile_of(channel), column = Traits::column_of(channel);
      if constexpr (Traits::kHalf) {
        const int lane = column * 4 + k % 8 / 2;
        at[i] = (((step * 2 + tile / 2) * 32 + lane) * 8 + tile % 2 * 4 + k % 16 / 8 * 2 + k % 2) * 2;
      } else if constexpr (!kSplit) {
        const int lane = column * 4 + k % 4;
        at[i] = (((step * 2 + tile / 2) * 32 + lane) * 4 + tile % 2 * 2 + k % 8 / 4) * 4;
      } else {
        const int lane = column * 4 + k % 4;
        at[i] = (((step * kTiles + tile) * 32 + lane) * 4 + k % 8 / 4) * 4;
      }
    }
    unsigned char* row = to;
    for (int first = 0; first < p.kernel_h; first += kBatch) {
      T value[kBatch][8];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (first + u < p.kernel_h) value[u][i] = *from[i];
          from[i] += picture.weight_stride[2];
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (first + u >= p.kernel_h) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const T one = exists ? value[u][i] : from_acc<T>(0.0f);
          if constexpr (kSplit) {
            const uint32_t high = round_tf32(one);
            *reinterpret_cast<uint32_t*>(row + at[i]) = high;
            *reinterpret_cast<uint32_t*>(row + at[i] + 8) = round_tf32(one - __uint_as_float(high));
          } else if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<uint32_t*>(row + at[i]) = round_tf32(one);
          } else {
            *reinterpret_cast<T*>(row + at[i]) = one;
          }
        }
        row += s.steps * Traits::kStepBytes;
      }
    }
  }
}

// Four bytes, zeros where not valid.
__device__ __forceinline__ void copy_word_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// A tile's input to shared memory, a warp a row at a time; what no element of the picture lies in is zeros already.
// float32 is on its way while the tile before is multiplied; halves, which come twice, are there in the end.
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
    if constexpr (sizeof(T) == 4) {
#pragma unroll 2
      for (int line = warp; line < s.halo_height; line += kWarps) {
        const int y = top + line;
        const bool valid = !zeros || (y >= 0 && y < p.height);
        const int64_t row = padded_source(y, p.height, p.mode) * picture.input_stride[2];
        const uint32_t first = shared_address(to + line * s.pitch + base);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          if (base + 32 * i < s.elements) copy_word_async(first + 128 * i, column[i] + row, inside[i] && valid);
        }
      }
    } else {
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
            if (e > 0) copy[2 * s.row_words + e - 1] = value[u][i];
          }
        }
      }
    }
  }
}

#endif

// kSteps: of a row of a kernel whose stride is 1 vertically; the fragments of the picture's rows wander through the
// registers, each loaded once for all rows of the kernel. 0: any.
template <typename T, bool kSplit, int kSteps>
__global__ void __launch_bounds__(kThreads, PictureTraits<T, kSplit>::kBlocks)
    conv_picture_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ PictureConv picture,
                        const __grid_constant__ ConvSchedule schedule, const __grid_constant__ PictureShape s) {
#ifdef STYLEFORGE_HAS_MMA
  using Traits = PictureTraits<T, kSplit>;
  constexpr int kPairs = Traits::kPairs;
  constexpr int kRows = Traits::kRows;
  static_assert(Traits::kHeight == kDown * kRows);
  extern __shared__ uint4 dynamic[];
  __shared__ float2 parts[kWarps][kColumns];
  unsigned char* weights = reinterpret_cast<unsigned char*>(dynamic);
  uint32_t* halo = reinterpret_cast<uint32_t*>(weights + s.weight_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / kAcross * kRows, warp_pixel = warp % kAcross * kPixels;
  const int g = lane / 4, t = lane % 4;
  const int n = blockIdx.z;
  const int first_column = blockIdx.y * kColumns;

  const int halo_words = s.halo_height * s.pitch;
  for (int i = threadIdx.x; i < Traits::kBuffers * halo_words; i += kThreads) halo[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  if constexpr (Traits::kBuffers > 1) {
    bring_input<T>(p, picture, s, n, conv_tile(p, schedule, blockIdx.x), halo);
    copy_commit();
  }
  bring_weights<T, kSplit>(p, picture, s, first_column, weights);

  // Words to a lane's pixel in the first of the warp's rows, and between its rows.
  const int numbers = (warp_pixel + g) * p.stride_w * p.in_channels;
  const int own = Traits::kHalf ? numbers % 2 * s.row_words + numbers / 2 + t : numbers + t;
  const int row_pitch = p.stride_h * s.pitch;
  const uint32_t* lane_halo = halo + warp_row * row_pitch + own;
  const uint32_t* const last_halo = lane_halo + (Traits::kBuffers - 1) * halo_words;

  for (int tile = blockIdx.x; tile < schedule.entries; tile += gridDim.x) {
    const ConvTileAt at = conv_tile(p, schedule, tile);
    const int following = tile + static_cast<int>(gridDim.x);
    if constexpr (Traits::kBuffers > 1) {
      if (following < schedule.entries) {
        bring_input<T>(p, picture, s, n, conv_tile(p, schedule, following),
                       lane_halo == last_halo ? halo : halo + halo_words);
      }
      copy_commit();
      copy_wait<1>();
    } else {
      bring_input<T>(p, picture, s, n, at, halo);
    }
    __syncthreads();

    // total[m][j][2 h + e]: row m + h * kPairs of the warp's, pixel g of its eight, column 2 t + e of the j-th tile.
    float total[kPairs][kTiles][4] = {};
    const uint4* taken = dynamic + lane;
    // A step of all of the warp's rows; pair(m): the fragment of rows m and m + kPairs, low(m): what TF32 leaves out.
    [[maybe_unused]] float part[kSplit ? kPairs : 1][kTiles][4];
    const auto multiply_step = [&](const auto& pair, const auto& low) {
      if constexpr (kSplit) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint4 b = taken[32 * j];
#pragma unroll
          for (int m = 0; m < kPairs; ++m) multiply<T>(part[m][j], low(m), b.x, b.y, part[m][j]);
#pragma unroll
          for (int m = 0; m < kPairs; ++m) multiply<T>(part[m][j], pair(m), b.z, b.w, part[m][j]);
#pragma unroll
          for (int m = 0; m < kPairs; ++m) multiply<T>(part[m][j], pair(m), b.x, b.y, part[m][j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          const uint4 b = taken[16 * j];
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            multiply<T>(total[m][j], pair(m), b.x, b.y, total[m][j]);
            multiply<T>(total[m][j + 1], pair(m), b.z, b.w, total[m][j + 1]);
          }
        }
      }
      taken += Traits::kStepBytes / 16;
    };
    const auto begin_row = [&] {
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < kPairs * kTiles * 4; ++i) part[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0;
      }
    };
    const auto end_row = [&] {
      if constexpr (kSplit) {
#pragma unroll
        for (int i = 0; i < kPairs * kTiles * 4; ++i) {
          total[i / (kTiles * 4)][i / 4 % kTiles][i % 4] += part[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
        }
      }
    };
    const auto rounded_bits = [](uint32_t bits) {
      if constexpr (Traits::kHalf) return bits;
      return round_tf32(__uint_as_float(bits));
    };
    const auto split = [](uint32_t bits, uint32_t& high, uint32_t& low) {
      high = round_tf32(__uint_as_float(bits));
      low = round_tf32(__uint_as_float(bits) - __uint_as_float(high));
    };

    if constexpr (kSteps > 0) {
      uint32_t held[kPairs][kSteps][4];
      [[maybe_unused]] uint32_t low[kSplit ? kPairs : 1][kSteps][4];
      const auto load = [&](int row, uint32_t (&bits)[2 * kSteps]) {
        const uint32_t* from = lane_halo + row * s.pitch;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) bits[i] = from[4 * i];
      };
      // A row into the upper (0) or lower (1) eight rows of a pair's fragments.
      const auto place = [&](const uint32_t (&bits)[2 * kSteps], int pair, int half) {
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          uint32_t& to = held[pair][i / 2][i % 2 * 2 + half];
          if constexpr (kSplit) {
            split(bits[i], to, low[pair][i / 2][i % 2 * 2 + half]);
          } else {
            to = rounded_bits(bits[i]);
          }
        }
      };
      uint32_t bits[2 * kSteps];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        load(row, bits);
        place(bits, row % kPairs, row / kPairs);
      }
#pragma unroll 1
      for (int first = 0; first < p.kernel_h; first += kPairs) {
#pragma unroll
        for (int u = 0; u < kPairs; ++u) {
          if (first + u >= p.kernel_h) break;
          const bool more = first + u + 1 < p.kernel_h;
          if (more) load(first + u + kRows, bits);
          begin_row();
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            using Fragment = uint32_t[4];
            multiply_step([&](int m) -> Fragment& { return held[(u + m) % kPairs][step]; },
                          [&](int m) -> Fragment& { return low[kSplit ? (u + m) % kPairs : 0][step]; });
          }
          end_row();
          if (more) {  // the pair of the first rows has been used: its lower row is the upper one of the next pair
#pragma unroll
            for (int i = 0; i < 2 * kSteps; ++i) {
              held[u][i / 2][i % 2 * 2] = held[u][i / 2][i % 2 * 2 + 1];
              if constexpr (kSplit) low[u][i / 2][i % 2 * 2] = low[u][i / 2][i % 2 * 2 + 1];
            }
            place(bits, u, 1);
          }
        }
      }
    } else {
      for (int r = 0; r < p.kernel_h; ++r) {
        const uint32_t* from = lane_halo + r * s.pitch;
        begin_row();
#pragma unroll 1
        for (int step = 0; step < s.steps; ++step, from += 8) {
          uint32_t a[kPairs][4];
          [[maybe_unused]] uint32_t low[kSplit ? kPairs : 1][4];
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            const uint32_t* upper = from + m * row_pitch;
            const uint32_t* lower = upper + kPairs * row_pitch;
            const uint32_t bits[4] = {upper[0], lower[0], upper[4], lower[4]};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if constexpr (kSplit) {
                split(bits[i], a[m][i], low[m][i]);
              } else {
                a[m][i] = rounded_bits(bits[i]);
              }
            }
          }
          using Fragment = uint32_t[4];
          multiply_step([&](int m) -> Fragment& { return a[m]; },
                        [&](int m) -> Fragment& { return low[kSplit ? m : 0]; });
        }
        end_row();
      }
    }
    if (following >= schedule.entries) release_successor();
    if constexpr (Traits::kBuffers > 1) {
      lane_halo = lane_halo == last_halo ? lane_halo - halo_words : lane_halo + halo_words;
    }

    const int rows = min(max(at.rows - warp_row, 0), kRows);
    const bool inside = warp_pixel + g < at.columns;
    const float count = static_cast<float>(rows * min(max(at.columns - warp_pixel, 0), kPixels));
    float sum[kWidth] = {}, squares[kWidth] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows || !inside) continue;
      float v[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum[c] += v[c] = total[row % kPairs][c / 2][row / kPairs * 2 + c % 2];
      const int64_t pixel =
          (static_cast<int64_t>(n) * p.out_height + at.y + warp_row + row) * p.out_width + at.x + warp_pixel + g;
      T* output = static_cast<T*>(p.output) + pixel * p.out_channels + first_column;
      if constexpr (Traits::kHalf) {
        if (first_column + 8 * t < p.out_channels) *reinterpret_cast<Vec<T, kWidth>*>(output + 8 * t) = rounded<T>(v);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel = 16 * i + 4 * t;
          if (first_column + channel >= p.out_channels) continue;
          *reinterpret_cast<float4*>(output + channel) =
              make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
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
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows || !inside) continue;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float difference = total[row % kPairs][c / 2][row / kPairs * 2 + c % 2] - sum[c];
        squares[c] += difference * difference;
      }
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) squares[c] += __shfl_xor_sync(0xffffffffu, squares[c], mask);
      if (g == c) parts[warp][Traits::channel_of(t, c)] = make_float2(sum[c], squares[c]);
    }
    __syncthreads();  // and the tile's input has been read
    const int column = threadIdx.x;
    if (column < kColumns && first_column + column < p.out_channels) {
      float tile_mean = 0, tile_m2 = 0;
      int before = 0;
      for (int w = 0; w < kWarps; ++w) {
        const int more = min(max(at.rows - w / kAcross * kRows, 0), kRows) *
                         min(max(at.columns - w % kAcross * kPixels, 0), kPixels);
        if (more == 0) continue;
        const float2 part_of = parts[w][column];
        const float difference = part_of.x - tile_mean;
        const float part_share = static_cast<float>(more) / static_cast<float>(before + more);
        tile_mean += difference * part_share;
        tile_m2 += part_of.y + difference * difference * (static_cast<float>(before) * part_share);
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
  return s;
}

template <typename T, bool kSplit>
PictureShape shape_of(const ConvParams& p) {
  using Traits = PictureTraits<T, kSplit>;
  PictureShape s = shape_of(p, Traits::kHeight, Traits::kStep, static_cast<int>(sizeof(T)));
  s.weight_bytes = p.kernel_h * s.steps * Traits::kStepBytes;
  s.buffers = Traits::kBuffers;
  return s;
}

PictureShape shape_of(const ConvParams& p) {
  if (size_of(p.dtype) == 2) return shape_of<__half, false>(p);
  return p.precision == ConvPrecision::kIeee ? shape_of<float, true>(p) : shape_of<float, false>(p);
}

size_t shared_bytes(const PictureShape& s) {
  return static_cast<size_t>(s.weight_bytes) +
         4 * static_cast<size_t>(s.buffers) * static_cast<size_t>(s.halo_height) * static_cast<size_t>(s.pitch);
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
  const PictureShape shape = shape_of(p);
  if (shared_bytes(shape) > kMaxShared) return cudaSuccess;
  schedule = {};
  schedule.columns = kColumns;
  schedule.tile_height =
      p.precision == ConvPrecision::kIeee ? PictureTraits<float, true>::kHeight : PictureTraits<float, false>::kHeight;
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
  const bool split = p.precision == ConvPrecision::kIeee;
  name = split ? "picture:3xtf32" : "picture";
  const int64_t groups = ceil_div(p.out_channels, kColumns) * p.batch;
  const int resident =
      size_of(p.dtype) == 2 ? PictureTraits<__half, false>::kBlocks : PictureTraits<float, false>::kBlocks;
  static_assert(PictureTraits<float, false>::kBlocks == PictureTraits<float, true>::kBlocks);
  const int64_t wanted = std::clamp<int64_t>(resident * facts.multiprocessors / groups, 1, schedule.entries);
  const auto grid = dim3(static_cast<unsigned>(wanted), static_cast<unsigned>(ceil_div(p.out_channels, kColumns)),
                         static_cast<unsigned>(p.batch));
  const auto error = switch_dtype(p.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      const PictureShape shape = shape_of(p);
      const auto kernel_for = [&]<bool kSplit>() {
        constexpr int kUsual = PictureTraits<T, kSplit>::kUsualSteps;
        const bool usual = shape.steps == kUsual && p.stride_h == 1;
        return usual ? conv_picture_kernel<T, kSplit, kUsual> : conv_picture_kernel<T, kSplit, 0>;
      };
      auto* kernel = kernel_for.template operator()<false>();
      if constexpr (sizeof(T) == 4) {
        if (split) kernel = kernel_for.template operator()<true>();
      }
      return launch(kernel, grid, dim3(kThreads), schedule.shared_bytes, 1, facts, stream, p, picture, schedule, shape);
    }
  });
  if (error != cudaSuccess) return error;
  return launch_conv_finish(p, schedule, norm, stream);
}

}  // namespace styleforge::cuda
