// Which products the kernels take, and how they are cut: a function of the shape and the device.
#include <algorithm>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

// STYLEFORGE_GEMM_TUNE="small=1,columns=32,cluster=4,stages=3,band=16" (small: 1 never, 2 always)
constexpr const char* kTuneVariable = "STYLEFORGE_GEMM_TUNE";

// Where these kernels are faster than cuBLAS with its passes around it, and not less accurate: read off one H200. A few
// rows alone are a matter of reading the weights once; below 64 numbers a sum of float32 is hard to beat in accuracy;
// in TF32 only what launches and latencies bound is won, and what the wide kernel takes before.
bool pays(const GemmParams& p) {
  constexpr int kFewestRows = 32, kShortestSum = 64;
  constexpr int64_t kTF32Most = int64_t{1} << 25;
  if (p.m < kFewestRows || p.k < kShortestSum) return false;
  return p.precision == GemmPrecision::kIeee || int64_t{p.m} * p.n * p.k < kTF32Most;
}

// Where the wide kernel with all that follows is at least as fast as cuBLAS with passes after it: read off one H200.
// `taken` and `needed`: columns of 128 rows on all multiprocessors, one after the other, and without any idle.
bool wide_pays(const GemmParams& p, double taken, double needed) {
  constexpr int kShortest = 512, kLongestGradient = 1024;
  if (p.k < kShortest || (p.gradient && p.k > kLongestGradient)) return false;
  return needed >= 0.8 * taken;
}

// Products of wide_sm90.cuh: 16-bit, and float32 rounded to TF32.
// STYLEFORGE_GEMM_TUNE="columns=192,stages=3,band=8,narrow=4,wide=2" (narrow: 1 none, else one more than how
// many tiles, as far as no block gets two of their pieces; of TF32: wide 1 never, 2 always; mix 2 leaves products
// without activation to cuBLAS, at most 1% faster)
void schedule_wide(const GemmParams& p, GemmSchedule& s, bool& supported, const DeviceFacts& facts,
                   const Overrides& overrides) {
  const bool half = p.dtype != DType::kFloat32;
  const int vector = half ? 8 : 4;  // what the copy engine takes: rows of whole vectors of 16 bytes
  const auto fits = [&](int64_t stride, int width) { return stride % vector == 0 && stride >= width; };
  if (p.k % vector != 0 || p.n % vector != 0 || !fits(p.a_stride, p.k)) return;
  if (p.b_stride[p.gradient ? 0 : 1] != 1 || !fits(p.b_stride[p.gradient ? 1 : 0], p.gradient ? p.n : p.k)) return;
  if (!aligned16(p.a) || !aligned16(p.b) || !aligned16(p.output) || !aligned16(p.product)) return;
  const auto words = [&](const void* from, int64_t stride) {
    return reinterpret_cast<uintptr_t>(from) % 4 == 0 && (!half || stride % 2 == 0);
  };
  if (!words(p.bias, 0) || !words(p.residual, p.residual_stride)) return;
  const auto tuned = [&](const char* key, int64_t chosen) { return static_cast<int>(overrides.tuned(key, chosen)); };
  s = {};
  s.wide = true;
  s.vectors = aligned16(p.residual) && p.residual_stride % vector == 0;
  const int64_t room = facts.multiprocessors;
  const auto tiles_of = [&](int columns) { return ceil_div(p.m, 128) * ceil_div(p.n, columns); };
  const auto time_of = [&](int columns) { return ceil_div(tiles_of(columns), room) * columns; };
  s.columns = !p.gradient && tuned("columns", time_of(192) < time_of(256) ? 192 : 256) == 192 ? 192 : 256;
  const int places = s.columns == 256 ? 4 : half ? 3 : 6;  // as wide_tiles.cuh has them; more would cost a stage
  const int shared = facts.max_shared_per_block - 2560 - places * 8192;
  s.stages =
      std::clamp(tuned("stages", kMaxGemmStages), 2, std::min(kMaxGemmStages, shared / ((128 + s.columns) * 128)));
  s.band = std::max(1, tuned("band", 16));
  const int64_t tiles = tiles_of(s.columns);
  if (tiles > INT32_MAX / 4) return;
  // Where the last round of tiles leaves most blocks without work, more and smaller ones take less time: half of a
  // round's, about.
  const int64_t rest = tiles % room;
  const int pieces = s.columns / 64;
  const int cut = tuned("narrow", 0);
  if (cut == 0 && rest * pieces <= room) s.narrow = static_cast<int>(rest);
  if (cut > 1) s.narrow = static_cast<int>(std::min({tiles, int64_t{cut} - 1, room / pieces}));
  s.blocks = static_cast<int>(std::min<int64_t>(tiles + s.narrow * int64_t{pieces - 1}, room));
  const double rounds = static_cast<double>(ceil_div(tiles, room)) - (s.narrow > 0 ? 0.5 : 0.0);
  const double needed = static_cast<double>(p.m) / 128 * p.n / facts.multiprocessors;
  if (!half && !p.activate && overrides.tuned("mix", 1) == 2) return;
  supported = overrides.forced() || wide_pays(p, rounds * s.columns, needed);
}

}  // namespace

cudaError_t schedule_gemm(const GemmParams& p, GemmSchedule& s, bool& supported) {
  supported = false;
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides(kTuneVariable);
  const bool wanted = !overrides.forced() || overrides.forced("sm90");
  if (!wanted || facts.major != 9 || !facts.has_cluster()) return cudaSuccess;
  if (p.dtype != DType::kFloat32) {
    if (p.m > 0 && p.n > 0 && p.k > 0) schedule_wide(p, s, supported, facts, overrides);
    return cudaSuccess;
  }
  if (p.precision == GemmPrecision::kTF32 && p.m > 0 && p.n > 0 && p.k > 0) {
    const auto wide = overrides.tuned("wide", 0);
    if (wide == 2 || (wide == 0 && !overrides.forced())) schedule_wide(p, s, supported, facts, overrides);
    if (supported) return cudaSuccess;
    if (wide == 2 && overrides.forced()) return cudaSuccess;  // nothing else stands in for it
  }
  if (p.m < 1 || p.n < 1 || p.k < 4 || (!overrides.forced() && !pays(p))) return cudaSuccess;
  // What the copy engine takes: rows of a that begin at multiples of 16 bytes.
  if (p.k % 4 != 0 || p.a_stride % 4 != 0 || !aligned16(p.a)) return cudaSuccess;
  const bool b_as_it_is = p.b_stride[1] == 1 && p.b_stride[0] % 4 == 0 && p.b_stride[0] >= p.k && aligned16(p.b);

  const auto tuned = [&](const char* key, int64_t chosen) { return static_cast<int>(overrides.tuned(key, chosen)); };
  const int chunks = static_cast<int>(ceil_div(p.k, 32));
  const int64_t large = ceil_div(p.m, 128) * ceil_div(p.n, 128);
  s = {};
  s.vectors = p.n % 4 == 0 && p.residual_stride % 4 == 0 && aligned16(p.bias) && aligned16(p.residual) &&
              aligned16(p.output) && aligned16(p.product);
  const int wish = tuned("small", 0);
  const bool few = large * 3 <= facts.multiprocessors;
  s.small = b_as_it_is && (wish != 0 ? wish == 2 : few);
  if (few && !s.small && !overrides.forced()) return cudaSuccess;
  if (s.small) {
    const auto tiles = [&] { return ceil_div(p.m, 64) * ceil_div(p.n, s.columns); };
    const auto parts = [&] {
      int c = 1;
      while (c < kMaxGemmParts && tiles() * c * 2 <= facts.multiprocessors && c * 2 <= chunks) c *= 2;
      return c;
    };
    s.columns = 64;
    // More blocks rather than fewer chunks a block: where there are blocks to spare, and where there are few chunks.
    constexpr int kFewChunks = 8;
    if (tiles() * parts() * 2 <= facts.multiprocessors || chunks <= kFewChunks || p.n <= 32) s.columns = 32;
    s.columns = tuned("columns", s.columns);
    s.cluster = std::min(kMaxGemmParts, tuned("cluster", parts()));
    while (64 % s.cluster != 0) --s.cluster;  // each block ends with a share of the tile's rows
    // At least two where there is a second chunk; at most so many that two blocks of 64 columns, three of 32, find room
    // on a multiprocessor.
    const int longest = static_cast<int>(ceil_div(chunks, s.cluster));
    s.stages = std::min({longest, kMaxGemmStages, std::max(2, tuned("stages", s.columns == 64 ? 3 : 4))});
    s.blocks = static_cast<int>(tiles()) * s.cluster;
    supported = tiles() * s.cluster <= INT32_MAX;
    return cudaSuccess;
  }
  s.columns = 128;
  // A chunk's fragments are loaded before the stage of the one before it is free: two at least.
  s.stages = std::clamp(tuned("stages", p.precision == GemmPrecision::kIeee ? 4 : 6), 2, kMaxGemmStages);
  s.band = tuned("band", 16);
  if (large > INT32_MAX) return cudaSuccess;
  s.blocks = static_cast<int>(std::min<int64_t>(large, facts.multiprocessors));
  supported = true;
  return cudaSuccess;
}

cudaError_t launch_gemm(const GemmParams& params, const GemmSchedule& schedule, cudaStream_t stream) {
  if (schedule.wide) {
    return params.dtype == DType::kFloat32 ? launch_tf32_gemm_sm90(params, schedule, stream)
                                           : launch_half_gemm_sm90(params, schedule, stream);
  }
  return schedule.small ? launch_small_gemm_sm90(params, schedule, stream) : launch_gemm_sm90(params, schedule, stream);
}

}  // namespace styleforge::cuda
