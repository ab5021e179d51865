// Products whose weights, prepared, would take more memory than the plain layers take for anything: b is prepared in
// pieces, each followed by its product, all in the same memory.
//
//   columns first: a piece is as many columns of the output as whole rounds of tiles on all multiprocessors, so that
//                  every product but the last fills the device, as the uncut one does (2048 rows: 16 tiles of 128 x 128
//                  down, 8 across are 128 of 132 multiprocessors)
//   then k:        where one round does not fit. The first piece's product takes bias and residual, the others add to
//                  the output, which is their residual. An activation comes after the whole sum, so k stays whole there
//
// Preparing and multiplying depend on each other in the order of the stream, so nothing has to be waited for besides.
#include <algorithm>

#include "../common/launch.h"
#include "../common/overrides.h"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

constexpr int kTile = 128;
// Less is not worth a cut; and shorter sums lose to their products' starts and ends.
constexpr size_t kLeastBytes = size_t{16} << 20;
constexpr int kLeastK = 1024;
constexpr int kStepK = 32;  // of the product's kernel

size_t prepared_bytes(const GemmParams& p, int64_t columns, int64_t k) {
  const size_t parts = p.precision == GemmPrecision::kIeee ? 2 : 1;
  return static_cast<size_t>(columns) * static_cast<size_t>(gemm_padded_k(k)) * sizeof(float) * parts;
}

}  // namespace

// STYLEFORGE_GEMM_TUNE="memory=64,depth=96,room=4": KB instead of `most_bytes`, and what then is the shortest sum;
// tiles of a round.
cudaError_t cut_gemm(const GemmParams& p, size_t most_bytes, GemmSlabs& slabs) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const Overrides overrides("STYLEFORGE_GEMM_TUNE");
  const auto forced = static_cast<size_t>(overrides.tuned("memory", 0)) * 1024;
  const size_t most = forced > 0 ? forced : std::max(most_bytes, kLeastBytes);
  slabs = {p.n, p.k, prepared_bytes(p, p.n, p.k)};
  if (slabs.bytes <= most) return cudaSuccess;

  const int64_t down = ceil_div(p.m, kTile), across = ceil_div(p.n, kTile);
  const int64_t room = overrides.tuned("room", facts.multiprocessors);
  const auto columns_of = [&](int64_t rounds) {
    const int64_t tiles = std::max<int64_t>(1, rounds * room / down);
    return std::min<int64_t>(p.n, std::min(tiles, across) * kTile);
  };
  int64_t rounds = 1;
  while (columns_of(rounds + 1) < p.n && prepared_bytes(p, columns_of(rounds + 1), p.k) <= most) ++rounds;
  slabs.columns = static_cast<int>(columns_of(rounds));
  if (!p.activate && p.product == nullptr) {
    const auto pieces = static_cast<int64_t>(
        ceil_div(static_cast<int64_t>(prepared_bytes(p, slabs.columns, p.k)), static_cast<int64_t>(most)));
    const int64_t even = ceil_div(ceil_div(p.k, pieces), kStepK) * kStepK;
    const int64_t least = forced > 0 ? overrides.tuned("depth", kLeastK) : kLeastK;
    slabs.k = static_cast<int>(std::min<int64_t>(p.k, std::max(even, least)));
  }
  slabs.bytes = prepared_bytes(p, slabs.columns, slabs.k);
  return cudaSuccess;
}

cudaError_t launch_gemm_slabs(const GemmParams& params, const GemmSchedule& schedule, const GemmSlabs& slabs,
                              void* memory, cudaStream_t stream) {
  DeviceFacts facts;
  if (const auto error = device_facts(facts)) return error;
  const auto after = [](const auto* from, int64_t elements) {
    return from == nullptr ? nullptr : static_cast<const float*>(from) + elements;
  };
  const auto into = [](void* to, int64_t elements) {
    return to == nullptr ? nullptr : static_cast<float*>(to) + elements;
  };
  for (int column = 0; column < params.n; column += slabs.columns) {
    for (int k = 0; k < params.k; k += slabs.k) {
      GemmParams part = params;
      part.n = std::min(slabs.columns, params.n - column);
      part.k = std::min(slabs.k, params.k - k);
      part.pitch = params.n;
      part.a = after(params.a, k);
      part.b = after(params.b, column * params.b_stride[0] + k * params.b_stride[1]);
      part.bias = after(params.bias, column);
      part.residual = after(params.residual, column);
      part.output = into(params.output, column);
      part.product = into(params.product, column);
      if (k > 0) {
        part.bias = nullptr;
        part.residual = part.output;
        part.residual_stride = params.n;
      }
      GemmWeightsParams prepare;
      prepare.weight = static_cast<const float*>(part.b);
      prepare.stride[0] = params.b_stride[0];
      prepare.stride[1] = params.b_stride[1];
      prepare.rows = part.n;
      prepare.k = part.k;
      prepare.hi = static_cast<float*>(memory);
      if (params.precision == GemmPrecision::kIeee) {
        prepare.lo = prepare.hi + static_cast<int64_t>(part.n) * gemm_padded_k(part.k);
      }
      part.b_hi = prepare.hi;
      part.b_lo = prepare.lo;
      GemmSchedule own = schedule;
      own.blocks =
          static_cast<int>(std::min<int64_t>(ceil_div(part.m, kTile) * ceil_div(part.n, kTile), facts.multiprocessors));
      if (const auto error = launch_gemm_weights(prepare, stream)) return error;
      if (const auto error = launch_gemm(part, own, stream)) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace styleforge::cuda
