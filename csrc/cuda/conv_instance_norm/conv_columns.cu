// The last layer of a network for pictures: a reflection-padded convolution of stride 1 with few output channels, in
// one kernel for mma.sync (sm_80 and newer).
//
// By the columns of its kernel: a [Co, Ci, kh, kw] kernel is the sum of its kw columns, each a kernel of kh x 1 that
// reads its input one pixel further right. So the products are those of a kernel of kh x 1 with kw * Co output
// channels (27 of 32 for 9 x 9 on RGB), and what they give is added up with a shift:
//
//   output[y][x][c] = bias[c] + sum over j of columns[y][x + j][j * Co + c]
//
//   block: a strip of the picture, 8 (or 4) rows high; a turn brings it 8 pixels a warp further to the right. The
//          columns of a turn and the last of the turn before lie in shared memory, where they are added up.
//   warp:  8 pixels x 8 (4) rows; the 16 rows of a matrix product are 8 pixels of one row and the same 8 of the row 4
//          (2) below. What a row of the kernel needs of a row of the picture the others need as well: the picture's
//          rows wander through the registers, each loaded once, as fragments. A lane has 16 bytes of a pixel's
//          channels: which channel is which k of a product does not matter, as long as the weights agree.
//
// Weights lie in shared memory as the lanes take them, and serve 8 rows a load.
//
// What limits it: half of the time are products at the rate of mma.sync, the rest what stands between them. A warp has
// few neighbours to fill its waits, so every instruction counts: with an address computed for each weight, and twice as
// many instructions for each row of the picture, 56.5 us instead of 39.8 (TF32, 1x32x512x512). H200, us, 9 x 9 to 3
// channels, beside the kernels before (a convolution into memory in 3xTF32 or 16 bits, columns.cu, a launch for the
// weights):
//
//                         fp16         TF32          3xTF32
//   1x32x512x512      28.8 / 52.3  39.8 / 105.6   83.2 / 105.6
//   8x32x512x512       210 /  352   265             608
//   1x32x128x128      11.2 / 13.2  12.5            14.1
//   1x64x512x512      55.3 / 51.7  91.0 / 193      193 / 193
//
// float32 is TF32, rounded to nearest, or 3xTF32 (a = hi + lo, b = hi + lo; lo * hi, hi * lo, then hi * hi), where the
// sum of 32 products moves on to float32 registers, because the units truncate when they add.
#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/mma.cuh"
#include "../common/tf32.cuh"
#include "../common/types.cuh"
#include "kernels.h"
#include "tile_in.cuh"
#include "tiles.h"

namespace styleforge::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 32;  // of the product; kernel_w * out_channels of them are used
constexpr int kTiles = kColumns / 8;
constexpr int kPixels = 8;               // of a warp in a row
constexpr int kTurn = kWarps * kPixels;  // of a block in a turn
constexpr int kChannels = 32;            // of the input at a time
constexpr int kMaxOut = 4;
constexpr int kBatch = 5;  // rows of the kernel whose weights a lane has in flight

template <typename T, bool kSplit>
struct ColumnsTraits {
  static constexpr int kPairs = kSplit ? 2 : 4;  // of rows of a warp, a matrix product each
  static constexpr int kRows = 2 * kPairs;
  static constexpr int kSharing = kPairs < kWarps ? kPairs : kWarps;           // warps that share a strip's last unit
  static constexpr int kQuads = kChannels * static_cast<int>(sizeof(T)) / 64;  // 16 bytes of each of four lanes
  static constexpr int kSteps = 2 * kQuads;                                    // products of 32 bytes of channels
  // Of one row of the kernel and kChannels channels.
  static constexpr int kWeightVectors = kSteps * kTiles * 32 / 2 * (kSplit ? 2 : 1);
  static constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;  // of a multiprocessor
  static constexpr int kDepth = kSplit ? 4 : 8;           // places of a warp for rows of the input
  static constexpr int kRingBytes = kWarps * kDepth * kQuads * 512;
  static_assert(kDepth <= kRows, "see RowStream");
  static_assert(kPairs <= kSharing, "or some rows of a strip's last unit would be nobody's");
  static_assert(kQuads >= 1);
};

struct ColumnsShape {
  int strip = 0;                      // pixels of a result's row that a block has
  int slots = 0;                      // places of pixels in shared memory
  int pitch = 0;                      // words between them: odd, so that neighbours fall into different banks
  int row_pitch = 0, line_pitch = 0;  // words between rows there; elements between rows of the input
  int twice_last = 0;                 // row of the input
  int chunks = 0;                     // of channels
  unsigned out_divisor = 0;           // 2^32 / out_channels, rounded up
  bool shares = false;                // a strip's last unit is shared by all warps where it is alone in its turn
  int weight_bytes = 0, shared_bytes = 0;
};

#ifdef STYLEFORGE_HAS_MMA

// The weights of all rows and channels to shared memory, in the order in which lanes take them. A lane has a channel, a
// warp eight columns, of which those that do not exist are copies of the last: nobody reads what they give.
template <typename T, bool kSplit>
__device__ __forceinline__ void bring_weights(const ColumnsConv& p, const ColumnsShape& s, unsigned char* to) {
  using Traits = ColumnsTraits<T, kSplit>;
  static_assert(kWarps == kTiles);
  constexpr int kRowBytes = Traits::kWeightVectors * 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int byte = lane * static_cast<int>(sizeof(T));
  const int taker = byte % 64 / 16, word = byte % 16 / 4;
  const int step = byte / 64 * 2 + word / 2;
  // Of the lane that takes it 16 bytes: of two columns, or of both halves of one.
  const int vector = kSplit ? step * kTiles + warp : (step * kTiles + warp) / 2;
  unsigned char* own = to + (vector * 32 + taker) * 16 + (kSplit ? 0 : warp % 2 * 8) + word % 2 * 4 + byte % 4;
  for (int chunk = 0; chunk < s.chunks; ++chunk) {
    const int channel = chunk * kChannels + lane;
    const bool exists = channel < p.in_channels;
    const T* from[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = min(warp * 8 + i, p.kernel_w * p.out_channels - 1);
      const int kx = p.out_channels == 1 ? column : static_cast<int>(__umulhi(column, s.out_divisor));
      from[i] = static_cast<const T*>(p.weight) + (exists ? channel : 0) * p.weight_stride[1] +
                (column - kx * p.out_channels) * p.weight_stride[0] + kx * p.weight_stride[3];
    }
    for (int first = 0; first < p.kernel_h; first += kBatch) {
      T value[kBatch][8];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (first + u < p.kernel_h) value[u][i] = *from[i];
          from[i] += p.weight_stride[2];
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (first + u >= p.kernel_h) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const T one = exists ? value[u][i] : from_acc<T>(0.0f);
          unsigned char* at = own + i * 64;
          if constexpr (kSplit) {
            const uint32_t high = round_tf32(one);
            reinterpret_cast<uint32_t*>(at)[0] = high;
            reinterpret_cast<uint32_t*>(at)[2] = round_tf32(one - __uint_as_float(high));
          } else if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<uint32_t*>(at) = round_tf32(one);
          } else {
            *reinterpret_cast<T*>(at) = one;
          }
        }
        own += kRowBytes;
      }
    }
  }
}

// The rows of the picture that a warp needs, one after the other, on their way to places in shared memory while those
// before are multiplied: a lane brings the 16 bytes that it takes itself, so nobody waits for another thread.
// It looks ahead by one part, a unit's rows for kChannels channels: so a part has as many rows as there are places.
template <typename T, bool kSplit>
struct RowStream {
  using Traits = ColumnsTraits<T, kSplit>;
  static constexpr int kRows = Traits::kRows;  // of a result, of a warp; but for a last unit, which all share
  static constexpr int kDepth = Traits::kDepth;
  static constexpr int kQuads = Traits::kQuads;
  static constexpr int kWidth = kFullWidth<T>;

  static constexpr int kRowBytes = kQuads * 512;

  // The rows of a unit for kChannels channels.
  struct Part {
    const T* pixel;  // the lane's first piece in the picture's first row
    int y;           // the next row
    int rows;        // that are left
    int turn, chunk;
  };
  const T* sample;
  uint32_t places;    // the lane's first one
  int units;          // of the strip
  Part now, then;     // what is asked for, and what after it
  uint32_t to, from;  // places

  __device__ __forceinline__ Part part(const ColumnsConv& p, const ColumnsShape& s, int turn, int chunk) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool shared = s.shares && units - turn == 1;
    const int unit = shared ? turn : turn + warp;
    const bool has = shared ? kWarps == Traits::kSharing || warp < Traits::kSharing : unit < units;
    const int x = blockIdx.x * s.strip + unit * kPixels + lane / 4 - p.kernel_w / 2;
    const int channel = chunk * kChannels + lane % 4 * kWidth;
    return {sample + (padded_source(x, p.width, PaddingMode::kReflect) * p.in_channels + channel),
            static_cast<int>(blockIdx.y) * kRows - p.kernel_h / 2 + (shared ? 2 * warp : 0),
            has ? (shared ? 2 : kRows) + p.kernel_h - 1 : 0, turn, chunk};
  }
  __device__ __forceinline__ void begin(const ColumnsConv& p, const ColumnsShape& s) {
    now = part(p, s, 0, 0);
    to = from = places;
  }
  // Before the rows of a part are taken: what comes behind the one that is asked for.
  __device__ __forceinline__ void look_ahead(const ColumnsConv& p, const ColumnsShape& s) {
    const bool same = now.chunk + 1 < s.chunks;
    then = part(p, s, same ? now.turn : now.turn + kWarps, same ? now.chunk + 1 : 0);
  }
  __device__ __forceinline__ void ask(const ColumnsConv& p, const ColumnsShape& s) {
    if (now.rows > 0) {
      const int row = max(min(abs(now.y), s.twice_last - now.y), 0);  // reflected; beyond the padding it stays inside
      const T* source = now.pixel + static_cast<int64_t>(row) * s.line_pitch;
      const int channels = p.in_channels - now.chunk * kChannels - threadIdx.x % 4 * kWidth;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        copy_async(to + q * 512, source + 4 * q * kWidth, 4 * q * kWidth < channels);
      }
      ++now.y;
      if (--now.rows == 0) now = then;
    }
    copy_commit();
    to = to == places + (kDepth - 1) * kRowBytes ? places : to + kRowBytes;
  }
  __device__ __forceinline__ void take(const ColumnsConv& p, const ColumnsShape& s, uint4 (&values)[kQuads]) {
    copy_wait<kDepth - 2>();
#pragma unroll
    for (int q = 0; q < kQuads; ++q) values[q] = load_shared16(from + q * 512);
    from = from == places + (kDepth - 1) * kRowBytes ? places : from + kRowBytes;
    ask(p, s);  // into the place of the row before, which has been used
  }
};

// To the nearest number that the matrix units' cut leaves, as round_tf32 but for the lower bits, which they cut.
__device__ __forceinline__ uint32_t raise_to_tf32(uint32_t bits) {
  return fabsf(__uint_as_float(bits)) < __int_as_float(0x7f800000) ? bits + 0x1000 : bits;
}

// A warp's unit, 8 pixels of 2 * kPairs rows: total[m][j][e] is row m + kPairs * (e / 2), pixel lane / 4, column
// 8 j + 2 (lane % 4) + e % 2.
template <typename T, bool kSplit, int kPairs>
__device__ __forceinline__ void multiply_unit(const ColumnsConv& p, const ColumnsShape& s, RowStream<T, kSplit>& stream,
                                              const uint4* weights, float (&total)[kPairs][kTiles][4]) {
  using Traits = ColumnsTraits<T, kSplit>;
  constexpr int kQuads = Traits::kQuads;
  constexpr int kSteps = Traits::kSteps;
#pragma unroll
  for (int i = 0; i < kPairs * kTiles * 4; ++i) total[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0;

#pragma unroll 1
  for (int chunk = 0; chunk < s.chunks; ++chunk) {
    stream.look_ahead(p, s);
    // Fragments as the units take them, so that none has to be put together in the loop: row r in the registers of the
    // upper eight rows of a product, row r + kPairs in those of the lower ones.
    uint32_t held[kPairs][kSteps][4];
    [[maybe_unused]] uint32_t low[kSplit ? kPairs : 1][kSteps][4];
    const auto place = [&](const uint4(&row)[kQuads], int pair, int half) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const uint4& v = row[i / 4];
        const uint32_t bits = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
        uint32_t& to = held[pair][i / 2][i % 2 * 2 + half];
        if constexpr (kSplit) {
          split_fragment(bits, to, low[pair][i / 2][i % 2 * 2 + half]);
        } else if constexpr (sizeof(T) == 4) {
          to = raise_to_tf32(bits);
        } else {
          to = bits;
        }
      }
    };
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      uint4 row[kQuads];
      stream.take(p, s, row);
      place(row, i % kPairs, i / kPairs);
    }

    const uint4* taken = weights + chunk * p.kernel_h * Traits::kWeightVectors + threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < p.kernel_h; first += kPairs) {
#pragma unroll
      for (int u = 0; u < kPairs; ++u) {
        const int ky = first + u;
        if (ky >= p.kernel_h) break;
        const bool more = ky + 1 < p.kernel_h;
        uint4 row[kQuads];
        if (more) stream.take(p, s, row);
        [[maybe_unused]] float part[kSplit ? kPairs : 1][kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if constexpr (kSplit) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const uint4 b = taken[(step * kTiles + j) * 32];
#pragma unroll
              for (int m = 0; m < kPairs; ++m) {
                multiply<T>(part[m][j], low[(u + m) % kPairs][step], b.x, b.y, part[m][j]);
              }
#pragma unroll
              for (int m = 0; m < kPairs; ++m) {
                multiply<T>(part[m][j], held[(u + m) % kPairs][step], b.z, b.w, part[m][j]);
              }
#pragma unroll
              for (int m = 0; m < kPairs; ++m) {
                multiply<T>(part[m][j], held[(u + m) % kPairs][step], b.x, b.y, part[m][j]);
              }
            }
          } else {
#pragma unroll
            for (int j = 0; j < kTiles; j += 2) {
              const uint4 b = taken[(step * kTiles + j) / 2 * 32];
#pragma unroll
              for (int m = 0; m < kPairs; ++m) {
                const uint32_t (&a)[4] = held[(u + m) % kPairs][step];
                multiply<T>(total[m][j], a, b.x, b.y, total[m][j]);
                multiply<T>(total[m][j + 1], a, b.z, b.w, total[m][j + 1]);
              }
            }
          }
        }
        if constexpr (kSplit) {
#pragma unroll
          for (int i = 0; i < kPairs * kTiles * 4; ++i) {
            total[i / (kTiles * 4)][i / 4 % kTiles][i % 4] += part[i / (kTiles * 4)][i / 4 % kTiles][i % 4];
          }
        }
        if (more) {  // the pair of the first rows has been used: its lower row is the upper one of the next pair
#pragma unroll
          for (int i = 0; i < 2 * kSteps; ++i) {
            held[u][i / 2][i % 2 * 2] = held[u][i / 2][i % 2 * 2 + 1];
            if constexpr (kSplit) low[u][i / 2][i % 2 * 2] = low[u][i / 2][i % 2 * 2 + 1];
          }
          place(row, u, 1);
        }
        taken += Traits::kWeightVectors;
      }
    }
  }
}

// What multiply_unit gave to shared memory: `to` is the lane's place in the first row.
template <int kPairs>
__device__ __forceinline__ void store_unit(const float (&total)[kPairs][kTiles][4], float* to, int row_pitch,
                                           int columns) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (8 * j + threadIdx.x % 4 * 2 + e >= columns) continue;
#pragma unroll
      for (int row = 0; row < 2 * kPairs; ++row) {
        to[row * row_pitch + 8 * j + e] = total[row % kPairs][j][row / kPairs * 2 + e];
      }
    }
  }
}

#endif

template <typename T, bool kSplit>
__global__ void __launch_bounds__(kThreads, ColumnsTraits<T, kSplit>::kBlocks)
    conv_columns_kernel(const __grid_constant__ ColumnsConv p, const __grid_constant__ ColumnsShape s) {
#ifdef STYLEFORGE_HAS_MMA
  using Traits = ColumnsTraits<T, kSplit>;
  constexpr int kPairs = Traits::kPairs;
  constexpr int kRows = Traits::kRows;
  extern __shared__ uint4 dynamic[];
  uint4* rings = dynamic + s.weight_bytes / 16;
  float* columns = reinterpret_cast<float*>(rings + Traits::kRingBytes / 16);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = blockIdx.z;
  const int top = blockIdx.y * kRows;
  const int left = blockIdx.x * s.strip;
  const int width = min(s.strip, p.width - left);
  const int used = p.kernel_w * p.out_channels;
  const int carried = p.kernel_w - 1;  // pixels of the turn before that a turn reads
  const T* sample = static_cast<const T*>(p.input) + static_cast<int64_t>(n) * p.height * p.width * p.in_channels;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  T* output = static_cast<T*>(p.output) + n * plane * p.out_channels;
  const int64_t to_channel = p.channels_last ? 1 : plane, to_pixel = p.channels_last ? p.out_channels : 1;

  const int units = (width + carried + kPixels - 1) / kPixels;
  const int own_ring = warp * Traits::kDepth * Traits::kQuads * 32 + lane;
  RowStream<T, kSplit> stream{sample, shared_address(rings + own_ring), units};
  stream.begin(p, s);
  stream.look_ahead(p, s);
  wait_for_predecessor();
#pragma unroll 1
  for (int i = 0; i < Traits::kDepth - 1; ++i) stream.ask(p, s);
  bring_weights<T, kSplit>(p, s, reinterpret_cast<unsigned char*>(dynamic));
  float bias[kMaxOut];
#pragma unroll
  for (int c = 0; c < kMaxOut; ++c) {
    bias[c] = c < p.out_channels && p.bias != nullptr ? to_acc(static_cast<const T*>(p.bias)[c]) : 0.0f;
  }
  __syncthreads();

  int write = 0;                 // slot of the turn's first pixel, and
  int read = s.slots - carried;  // of the first that its sums read
  for (int turn = 0; turn < units; turn += kWarps) {
    if (turn + kWarps >= units) release_successor();
    const auto place = [&](int unit, int row) {
      int slot = write + unit * kPixels + lane / 4;
      slot -= slot >= s.slots ? s.slots : 0;
      return columns + row * s.row_pitch + slot * s.pitch + lane % 4 * 2;
    };
    if (s.shares && units - turn == 1) {  // a last one: each warp has two of its rows
      float total[1][kTiles][4];
      const int row = 2 * warp;
      const bool has = kWarps == Traits::kSharing || warp < Traits::kSharing;
      if (has) multiply_unit<T, kSplit, 1>(p, s, stream, dynamic, total);
      __syncthreads();
      if (has) store_unit<1>(total, place(0, row), s.row_pitch, used);
    } else {
      float total[kPairs][kTiles][4];
      const bool has = turn + warp < units;
      if (has) multiply_unit<T, kSplit, kPairs>(p, s, stream, dynamic, total);
      __syncthreads();  // the sums of the turn before have been read
      if (has) store_unit<kPairs>(total, place(warp, 0), s.row_pitch, used);
    }
    __syncthreads();
    // A lane has a pixel of the result, a warp every fourth row.
    const int x = turn * kPixels - carried + lane;
    int first = read + lane;
    first -= first >= s.slots ? s.slots : 0;
#pragma unroll 1
    for (int row = warp; row < kRows; row += kWarps) {
      if (x < 0 || x >= width || top + row >= p.height) continue;
      float sum[kMaxOut];
#pragma unroll
      for (int c = 0; c < kMaxOut; ++c) sum[c] = bias[c];
      const float* line = columns + row * s.row_pitch;
      int slot = first;
#pragma unroll 3
      for (int kx = 0; kx < p.kernel_w; ++kx) {
        const float* own = line + slot * s.pitch + kx * p.out_channels;
#pragma unroll
        for (int c = 0; c < kMaxOut; ++c) {
          if (c < p.out_channels) sum[c] += own[c];
        }
        if (++slot == s.slots) slot = 0;
      }
      T* at = output + (static_cast<int64_t>(top + row) * p.width + left + x) * to_pixel;
#pragma unroll
      for (int c = 0; c < kMaxOut; ++c) {
        if (c < p.out_channels) at[c * to_channel] = from_acc<T>(sum[c]);
      }
    }
    write += kTurn;
    write -= write >= s.slots ? s.slots : 0;
    read += kTurn;
    read -= read >= s.slots ? s.slots : 0;
  }
#endif
}

template <typename T, bool kSplit>
ColumnsShape shape_of(const ColumnsConv& p) {
  using Traits = ColumnsTraits<T, kSplit>;
  ColumnsShape s;
  s.chunks = static_cast<int>(ceil_div(p.in_channels, kChannels));
  s.slots = kTurn + static_cast<int>(ceil_div(p.kernel_w - 1, kPixels)) * kPixels;
  s.pitch = p.kernel_w * p.out_channels | 1;
  s.row_pitch = s.slots * s.pitch;
  s.out_divisor = rounded_reciprocal(p.out_channels);
  s.shares = p.kernel_h + 1 >= Traits::kDepth;
  s.line_pitch = p.width * p.in_channels;
  s.twice_last = 2 * (p.height - 1);
  s.weight_bytes = static_cast<int>(
      std::min<int64_t>(int64_t{p.kernel_h} * s.chunks * Traits::kWeightVectors * 16, 1 << 20));  // more than there is
  s.shared_bytes = s.weight_bytes + Traits::kRingBytes + Traits::kRows * s.row_pitch * static_cast<int>(sizeof(float));
  return s;
}

ColumnsShape shape_of(const ColumnsConv& p) {
  if (size_of(p.dtype) == 2) return shape_of<__half, false>(p);
  return p.precision == ConvPrecision::kIeee ? shape_of<float, true>(p) : shape_of<float, false>(p);
}

// How many strips a row is cut in. Each computes kernel_w - 1 columns that its neighbour has as well; but all
// multiprocessors are to have some, as many blocks at a time as they have room for.
void cut(const ColumnsConv& p, int rows, int resident, int tuned, ColumnsShape& s) {
  const int64_t bands = ceil_div(p.height, rows) * p.batch;
  const int64_t most = std::min<int64_t>(ceil_div(p.width, kTurn), 64);
  double least = 0;
  for (int64_t strips = 1; strips <= most; ++strips) {
    const int64_t strip = ceil_div(p.width, strips);
    const int64_t units = ceil_div(strip + p.kernel_w - 1, kPixels);
    const double rest = units % kWarps == 0 ? 0 : units % kWarps == 1 && s.shares ? 0.3 : 1;
    const double turns = static_cast<double>(units / kWarps) + rest + 0.5;  // and what stands before the first
    const auto cost = static_cast<double>(ceil_div(bands * strips, resident)) * turns;
    if (strips > 1 && strips != tuned && cost >= least) continue;
    least = strips == tuned ? 0 : cost;
    s.strip = static_cast<int>(strip);
  }
}

}  // namespace

cudaError_t takes_columns_conv(const ColumnsConv& p, bool& taken) {
  taken = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_CONV_TUNE");
  if (overrides.forced() && !overrides.forced("columns")) return cudaSuccess;
  if (facts.major < 8 || facts.compiled_for < 80 || p.dtype == DType::kFloat64) return cudaSuccess;
  if (p.out_channels > kMaxOut || int64_t{p.kernel_w} * p.out_channels > kColumns) return cudaSuccess;
  if (p.in_channels * static_cast<int>(size_of(p.dtype)) % 16 != 0 || p.batch > 65535) return cudaSuccess;
  if (int64_t{p.height} * p.width * p.in_channels > INT32_MAX || ceil_div(p.height, 4) > 65535) return cudaSuccess;
  // Many channels in 16 bits: the weights leave room for one block, and wgmma is faster than that.
  const bool wgmma = facts.major == 9 && facts.has_cluster();
  if (wgmma && size_of(p.dtype) == 2 && p.in_channels > kChannels && !overrides.forced()) return cudaSuccess;
  const ColumnsShape s = shape_of(p);
  taken = s.shared_bytes <= facts.max_shared_per_block;
  return cudaSuccess;
}

cudaError_t launch_columns_conv(const ColumnsConv& p, cudaStream_t stream, const char*& name) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const bool split = p.precision == ConvPrecision::kIeee;
  name = split ? "one_kernel:3xtf32" : "one_kernel";
  ColumnsShape s = shape_of(p);
  const int rows = split ? ColumnsTraits<float, true>::kRows : ColumnsTraits<float, false>::kRows;
  const Overrides overrides("STYLEFORGE_CONV_TUNE");
  const int most = size_of(p.dtype) == 2 ? ColumnsTraits<__half, false>::kBlocks : ColumnsTraits<float, false>::kBlocks;
  constexpr int kOwn = 1024;  // bytes of a block that the system keeps
  const int blocks = std::clamp((facts.max_shared_per_block + kOwn) / (s.shared_bytes + kOwn), 1, most);
  cut(p, rows, blocks * facts.multiprocessors, static_cast<int>(overrides.tuned("strips", 0)), s);
  const auto grid = dim3(static_cast<unsigned>(ceil_div(p.width, s.strip)),
                         static_cast<unsigned>(ceil_div(p.height, rows)), static_cast<unsigned>(p.batch));
  return switch_dtype(p.dtype, [&]<typename T>() -> cudaError_t {
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      auto* kernel = conv_columns_kernel<T, false>;
      if constexpr (sizeof(T) == 4) {
        if (split) kernel = conv_columns_kernel<T, true>;
      }
      return launch(kernel, grid, dim3(kThreads), static_cast<size_t>(s.shared_bytes), 1, facts, stream, p, s);
    }
  });
}

}  // namespace styleforge::cuda
