// Pieces of the kernels of small networks in one launch (whole_registers.cu, and what whole_tf32.cu shares with it):
// who does what, products of pieces in registers, sums on their way through a cluster.
#pragma once

#include "../common/cluster.cuh"
#include "../common/launch.h"
#include "../common/mbarrier.cuh"
#include "../common/mma.cuh"
#include "../common/overrides.h"
#include "../common/types.cuh"
#include "launch.h"

namespace styleforge::cuda::small_ffn {

constexpr int kRows = 16;  // of a unit
constexpr int kUnitThreads = 128;
constexpr int kMaxUnits = 2;
constexpr int kHidden = 64;  // columns at a time
constexpr int kMaxParts = 8;

struct SmallFfnSchedule {
  int parts = 1;  // of the hidden width, the blocks of a cluster: a power of two
  int parts_log2 = 0;
  int units = 1;
  int blocks = 0;
};

// --- host ---

inline int most_parts(const WholeFfnParams& p) {
  int parts = 1;
  while (parts < kMaxParts && parts * 2 * kHidden <= (p.hidden + kHidden - 1) / kHidden * kHidden) parts *= 2;
  return parts;
}

// With what STYLEFORGE_GEMM_TUNE asks for.
inline SmallFfnSchedule small_ffn_schedule(const WholeFfnParams& p, const Overrides& overrides, int parts, int units) {
  SmallFfnSchedule s;
  const auto wanted = overrides.tuned("parts", parts);
  const int most = most_parts(p);
  while (s.parts * 2 <= wanted && s.parts * 2 <= most) {
    s.parts *= 2;
    ++s.parts_log2;
  }
  s.units = units;
  s.blocks = static_cast<int>(ceil_div(ceil_div(p.rows, kRows), units)) * s.parts;
  return s;
}

// Whether a kernel can, and may: STYLEFORGE_GEMM_TUNE="one=1" (`wish`: 1 never, 2 always; not where "small" asks for
// others).
inline bool small_ffn_takes(const WholeFfnParams& p, int widest, int64_t wish, const Overrides& overrides,
                            const DeviceFacts& facts) {
  if (wish == 1 || (wish == 0 && overrides.tuned("small", 0) != 0)) return false;
  if (overrides.forced() && !overrides.forced("sm90")) return false;
  if (facts.major != 9 || !facts.has_cluster()) return false;
  if (p.rows < 1 || p.embed < 1 || p.hidden < 1 || p.out < 1 || p.embed > widest || p.out > widest) return false;
  const int64_t line = 16 / static_cast<int64_t>(size_of(p.dtype));
  for (const int64_t one : {int64_t{p.embed}, int64_t{p.hidden}, int64_t{p.out}, p.input_stride, p.fc1_stride,
                            p.fc2_stride, p.residual_stride}) {
    if (one % line != 0) return false;
  }
  return aligned16(p.input) && aligned16(p.fc1_weight) && aligned16(p.fc2_weight) && aligned16(p.fc1_bias) &&
         aligned16(p.fc2_bias) && aligned16(p.residual);
}

#ifdef STYLEFORGE_HAS_CLUSTER

struct Line {
  uint32_t word[4];
};

// A load that leaves alone what it does not want, so that zeros can be put there at any time before. (As C++ it would
// be a load and moves after it, which wait for one load before the next one is on its way.)
__device__ __forceinline__ void load_wanted(uint32_t (&v)[4], const void* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ void load_wanted(uint32_t (&v)[2], const void* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p ld.global.nc.v2.b32 {%0, %1}, [%2];\n"
      "}\n"
      : "+r"(v[0]), "+r"(v[1])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}
// Four neighbouring numbers.
template <typename T>
struct Four {
  uint32_t word[sizeof(T)] = {};
  __device__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i / 2]));
      return i % 2 == 0 ? pair.x : pair.y;
    }
  }
};

// The same place of two rows of shared memory.
template <typename T>
__device__ __forceinline__ void load_lines(Line (&lines)[2], const T* from, int distance) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto v = *reinterpret_cast<const uint4*>(from + i * distance);
    lines[i] = {{v.x, v.y, v.z, v.w}};
  }
}

// d[j] += a b[j]^T over a granule of k. a: lines of rows l / 4 and l / 4 + 8 of lane l; b[j]: of row l / 4.
template <typename T, int kWide>
__device__ __forceinline__ void multiply_granule(float (&d)[kWide][4], const Line (&a)[2], const Line (&b)[kWide]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint32_t rows[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) rows[r] = a[r % 2].word[2 * s + r / 2];
#pragma unroll
    for (int j = 0; j < kWide; ++j) multiply<T>(d[j], rows, b[j].word[2 * s], b[j].word[2 * s + 1], d[j]);
  }
}

__device__ __forceinline__ void prefetch_bytes(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Where a thread stands, and what its block and its unit do.
struct Place {
  int unit, warp, lane;
  int quad, place;  // the lane's rows of a tile are quad and quad + 8, its pieces of 16 bytes place, place + 4, ...
  // Eight columns of a product may be any eight. Those of two neighbouring tiles are taken in turn, so that a lane has
  // four that follow each other: 4 place and on. The row of the weights that this lane has for the first of two tiles:
  int tile_row;
  int rank, tile, tiles;  // of the block in its cluster; the cluster's number of the grid's
  int first_row;          // of the unit
  int first_chunk, chunks;

  __device__ __forceinline__ Place(const WholeFfnParams& p, const SmallFfnSchedule& s)
      : unit(__shfl_sync(0xffffffffu, threadIdx.x / kUnitThreads, 0)),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0)),
        lane(threadIdx.x % 32),
        quad(lane / 4),
        place(lane % 4),
        tile_row(quad / 2 * 4 + quad % 2),
        rank(static_cast<int>(cluster_rank())),
        tile(static_cast<int>(blockIdx.x >> s.parts_log2)),
        tiles(static_cast<int>(gridDim.x >> s.parts_log2)),
        first_row((tile * s.units + unit) * kRows) {
    const int all = (p.hidden + kHidden - 1) / kHidden;
    first_chunk = (all * rank) >> s.parts_log2;
    chunks = ((all * (rank + 1)) >> s.parts_log2) - first_chunk;
  }
};

// What this block is going to read, `rows` of the input among it, on its way to the L2 cache while the kernel's
// predecessor runs: a hint, which sees no values. The clusters share the rows of the weights.
template <typename T, typename Where>
__device__ __forceinline__ void prefetch(const WholeFfnParams& p, const Where& at, int parts, int rows) {
  const int column = at.first_chunk * kHidden, count = min(p.hidden - column, at.chunks * kHidden);
  if (at.unit == 0) {
    if (at.warp == 0) {
      for (int row = at.tile + at.lane * at.tiles; row < count; row += 32 * at.tiles) {
        prefetch_bytes(static_cast<const T*>(p.fc1_weight) + (column + row) * p.fc1_stride, p.embed * sizeof(T));
      }
    } else if (at.warp == 1) {
      for (int row = at.tile + at.lane * at.tiles; row < p.out; row += 32 * at.tiles) {
        prefetch_bytes(static_cast<const T*>(p.fc2_weight) + row * p.fc2_stride + column, count * sizeof(T));
      }
    } else if (at.warp == 2) {
      const int end = min(p.rows - at.first_row, rows);
      for (int row = at.rank + at.lane * parts; row < end; row += 32 * parts) {
        prefetch_bytes(static_cast<const T*>(p.input) + (at.first_row + row) * p.input_stride, p.embed * sizeof(T));
      }
    }
  }
  __syncwarp();
}

// Sums on their way to the block that adds them up, and what is added to them. 16 outputs of all rows are a group, a
// group's rows 0 to 7 and 8 to 15 a piece; the blocks of a cluster have as many groups each.
template <typename T, int kTiles>
class Outputs {
 public:
  struct Added {
    Four<T> bias, residual;
  };

  // sums: [own piece][part][lane] of 16 bytes, whose bytes `merged` counts
  __device__ __forceinline__ Outputs(const WholeFfnParams& p, const SmallFfnSchedule& s, const Place& at,
                                     unsigned char* sums, uint64_t* merged)
      : p_(p), s_(s), at_(at), sums_(sums), merged_(merged), own_log2_((kTiles == 4 ? 3 : 4) - s.parts_log2) {}

  __device__ __forceinline__ Added added(int piece) const {
    Added v;
    const bool here = wanted(piece);
    load_wanted(v.bias.word, static_cast<const T*>(p_.fc2_bias) + column(piece), here && p_.fc2_bias != nullptr);
    load_wanted(v.residual.word, static_cast<const T*>(p_.residual) + row(piece) * p_.residual_stride + column(piece),
                here && p_.residual != nullptr);
    return v;
  }

  // Once the cluster's blocks have made their barriers.
  __device__ __forceinline__ void send_all(const float (&total)[kTiles][4]) const {
#pragma unroll
    for (int q = 0; q < kTiles / 2; ++q) {
      const int group = at_.warp * (kTiles / 2) + q, owner = group >> own_log2_;
      const int piece = (group & ((1 << own_log2_) - 1)) * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = {total[2 * q][2 * i], total[2 * q][2 * i + 1], total[2 * q + 1][2 * i],
                             total[2 * q + 1][2 * i + 1]};
        const int to = ((piece + i) * s_.parts + at_.rank) * 32 + at_.lane;
        if (s_.parts > 1) {
          store_remote(map_shared(shared_address(sums_) + to * 16, owner), four,
                       map_shared(shared_address(merged_), owner));
        } else {  // no cluster to send anything in
          reinterpret_cast<float4*>(sums_)[to] = four;
        }
      }
    }
  }

  // Adds up in the order of the blocks. `next`: of the warp's first piece.
  __device__ __forceinline__ void finish(Added next) const {
    if (s_.parts == 1) named_barrier(1 + at_.unit, kUnitThreads);
    const int pieces = 2 << own_log2_;
    if (at_.warp >= pieces) return;
    if (s_.parts > 1) mbarrier_wait_cluster(shared_address(merged_), 0);
    for (int piece = at_.warp; piece < pieces; piece += 4) {
      const Added end = next;
      if (piece + 4 < pieces) next = added(piece + 4);
      const float4* from = reinterpret_cast<const float4*>(sums_) + piece * s_.parts * 32 + at_.lane;
      float4 one[kMaxParts];
#pragma unroll
      for (int part = 0; part < kMaxParts; ++part) {
        if (part < s_.parts) one[part] = from[part * 32];
      }
      float v[4] = {};
#pragma unroll
      for (int part = 0; part < kMaxParts; ++part) {
        if (part >= s_.parts) continue;
        v[0] += one[part].x;
        v[1] += one[part].y;
        v[2] += one[part].z;
        v[3] += one[part].w;
      }
      if (!wanted(piece)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] += end.bias[j] + end.residual[j];
      *reinterpret_cast<Vec<T, 4>*>(static_cast<T*>(p_.output) + row(piece) * p_.out + column(piece)) = rounded<T>(v);
    }
  }

 private:
  __device__ __forceinline__ int64_t row(int piece) const { return at_.first_row + at_.quad + piece % 2 * 8; }
  __device__ __forceinline__ int column(int piece) const {
    return ((at_.rank << own_log2_) + piece / 2) * 16 + at_.place * 4;
  }
  __device__ __forceinline__ bool wanted(int piece) const {
    return piece < 2 << own_log2_ && row(piece) < p_.rows && column(piece) < p_.out;
  }

  const WholeFfnParams& p_;
  const SmallFfnSchedule& s_;
  const Place& at_;
  unsigned char* sums_;
  uint64_t* merged_;
  int own_log2_;
};

#endif  // STYLEFORGE_HAS_CLUSTER

}  // namespace styleforge::cuda::small_ffn
