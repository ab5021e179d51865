// The launch of conv_sm90.cuh: the copy engine's maps of input and weights, and the kernel of a tile's size.
#pragma once

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "conv_sm90.cuh"
#include "kernels.h"

namespace styleforge::cuda {
namespace {

cuuint64_t extent(int value) { return static_cast<cuuint64_t>(value); }
cuuint32_t chunk_elements(const ConvParams& p) { return static_cast<cuuint32_t>(kChunk / size_of(p.dtype)); }

// [rows, taps, channels], one tap and some rows a box.
cudaError_t weight_map(const ConvParams& p, const void* weight, int rows, CUtensorMap& map) {
  const cuuint64_t sizes[3] = {extent(p.in_channels), extent(p.kernel_h * p.kernel_w),
                               extent(p.phases) * extent(p.out_channels)};
  const cuuint64_t tap = sizes[0] * size_of(p.dtype);
  const cuuint64_t strides[2] = {tap, tap * sizes[1]};
  const cuuint32_t box[3] = {chunk_elements(p), 1, static_cast<cuuint32_t>(rows)};
  return tensor_map(p.dtype, weight, sizes, strides, box, map);
}

// [batch, height, width, channels], a tile with its halo a box.
cudaError_t input_map(const ConvParams& p, const ConvSchedule& s, CUtensorMap& map) {
  const cuuint64_t sizes[4] = {extent(p.in_channels), extent(p.width), extent(p.height), extent(p.batch)};
  const cuuint64_t element = size_of(p.dtype);
  const cuuint64_t pixel = p.pixel_stride > 0 ? static_cast<cuuint64_t>(p.pixel_stride) : sizes[0];
  const cuuint64_t row = p.row_stride > 0 ? static_cast<cuuint64_t>(p.row_stride) : pixel * sizes[1];
  const cuuint64_t strides[3] = {pixel * element, row * element, row * element * sizes[2]};
  const cuuint32_t box[4] = {chunk_elements(p), static_cast<cuuint32_t>(s.halo_width),
                             static_cast<cuuint32_t>(s.halo_height), 1};
  return tensor_map(p.dtype, p.input, sizes, strides, box, map);
}

template <typename T, int kColumns, int kGroups, bool kSplit, int kShare = 1, int kLean = 0>
cudaError_t launch_tile(const ConvParams& p, const ConvSchedule& s, const InstanceNormParams& norm,
                        const DeviceFacts& facts, cudaStream_t stream) {
  using Traits = ConvTraits<T, kColumns, kGroups, kSplit, kShare>;
  CUtensorMap input, weights, weights_lo = {};
  if (const auto error = input_map(p, s, input)) return error;
  if (const auto error = weight_map(p, p.weight, kColumns, weights)) return error;
  if (s.split_before) {
    if (const auto error = weight_map(p, p.weight_lo, kColumns, weights_lo)) return error;
  }
  const auto grid =
      dim3(static_cast<unsigned>(ceil_div(s.entries, s.tiles) * kShare * s.same_input + (kLean > 0 ? s.spare : 0)),
           static_cast<unsigned>(ceil_div(p.out_channels, kColumns) / s.same_input), static_cast<unsigned>(p.batch));
  auto* kernel = conv_kernel<T, kColumns, kGroups, kSplit, 0, kShare, kLean>;
  if constexpr (!kSplit) {
    if (p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1) {
      kernel = conv_kernel<T, kColumns, kGroups, kSplit, 3, kShare, kLean>;
    }
  }
  GateOfLaunch gate;
  ConvSchedule own = s;
  if constexpr (kGated<T, Traits, kLean>) {
    if (s.gated) gate = gate_of_launch(facts, stream);
    if (!norm.output_channels_last) own.early = 0;  // the input is what the launch before makes
  }
  return launch(kernel, grid, dim3(Traits::kThreads), s.shared_bytes,
                Together{kShare * s.same_input, s.resident && gate.place == 0}, facts, stream, p, own, norm, input,
                weights, weights_lo, gate);
}

}  // namespace
}  // namespace styleforge::cuda
