// Convolution whose epilogue takes the instance norm's statistics, and the pass that normalises: what the operator
// layer calls. Everything is channels_last inside; the result is channels_last or NCHW.
//
//   file             what it does
//   conv_sm90.cu     implicit GEMM with (mean, M2) of each tile's channels; where all tiles are on the chip at the
//                    same time, all that follows, too; else it writes the raw result
//   conv_mma.cu      the same for sm_80 and newer, always in two passes
//   conv_picture.cu  the same for one to four input channels, in two passes
//   finish.cu        merges the tiles' moments; normalises, adds the residual, activates, in place
//   finish_nchw.cu   the same, to another tensor, which is NCHW
//   conv_columns.cu  a convolution with few output channels by the columns of its kernel, no norm
//   columns.cu       adds up a convolution that ran by the columns of its kernel (few output channels, no norm)
//   weights.cu       brings weights to [rows][taps][channels], or splits them for float32 accuracy
#pragma once

#include <cuda_runtime.h>

#include "../../instance_norm_params.h"
#include "../../pad_params.h"
#include "../layout/launch.h"

namespace styleforge::cuda {

enum class ConvPrecision : int { kNative = 0, kTF32 = 1, kIeee = 2 };  // kNative: 16-bit inputs

struct ConvParams {
  // tensors
  const void* input = nullptr;      // [batch, height, width, in_channels], see row_stride
  const void* weight = nullptr;     // [phases * out_channels, kernel_h * kernel_w, in_channels]
  const void* weight_lo = nullptr;  // schedule.split_before: what the TF32 weights leave out, the same shape
  void* output = nullptr;           // [batch, out_height, out_width, out_channels]
  // [batch, entries, out_channels]: (mean, M2) of each tile's valid pixels; then [batch, out_channels]: mean and rstd
  // times the norm's weight
  float2* moments = nullptr;  // null: no norm follows
  bool norm_follows = true;   // known before there are moments

  // sizes
  int batch = 0, in_channels = 0, height = 0, width = 0;
  int out_channels = 0, out_height = 0, out_width = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
  PaddingMode mode = PaddingMode::kZeros;
  // Of input, in elements; 0: dense. Pixels may overlap (mode kZeros without padding): a few channels times the taps of
  // a kernel's row as the channels of one tap.
  int64_t pixel_stride = 0, row_stride = 0;
  // 4: the phases of a 3x3 convolution after a 2x upsampling (csrc/cuda/upsample/launch.h), each a 2x2 convolution of
  // the input that fills every second pixel of every second row; 1: a plain convolution.
  int phases = 1;
  DType dtype = DType::kFloat32;
  ConvPrecision precision = ConvPrecision::kNative;
};

// How the result is cut. `entries` tiles a sample, each of kTileWidth x tile_height pixels (of one phase).
struct ConvSchedule {
  static constexpr int kTileWidth = 16;
  int tile_height = 8;
  int columns = 128;  // output channels of a tile
  int tiles_x = 0, tiles_y = 0, entries = 0;
  int input_stages = 1, weight_stages = 2;
  int halo_height = 0, halo_width = 0, halo_bytes = 0;  // of a tile's input, one stage
  unsigned halo_divisor = 0, tiles_x_divisor = 0;       // 2^32 / halo_width and / tiles_x, rounded up
  int tiles = 1;                                        // of a block, one after the other
  // Blocks of a cluster: with the same input, of which each brings a part for all; or that share a tile, where each has
  // a part of the input channels, and then of the columns.
  int same_input = 1, share = 1;
  bool marks_first = false;    // places of moments are marked before the first input is there
  bool split_before = false;   // float32 weights come in two TF32 parts; else the blocks split them
  bool mma = false;            // conv_mma.cu, else conv_sm90.cu
  int chunks_ahead = 1;        // mma: chunks of input that are on their way before they are multiplied,
  int pixels_a_step = 0;       // and how many of their pixels a step of the loop asks for
  int swizzle_shift = 0;       // mma: of a pixel's index
  int sources_offset = 0;      // mma: the list of the halo's sources in shared memory
  int mma_tile = 0;            // which of mma_shapes.h
  bool resident = false;       // the grid is on the chip as a whole, and the convolution's kernel normalises
  bool resident_nchw = false;  // it does so also where the result is NCHW
  bool merge_apart = false;    // resident: moments are merged in a step of their own
  // resident: which kernels of conv_sm90_lean.cu run where they take the tensors (tiles.h), and whether they ask the L2
  // cache for the input while the kernel before is still running.
  int lean = 0;
  bool prefetch = false;
  int first_boxes = 1, first_weights = 1;  // lean: stages that are asked for before anything else
  int spare = 0;                           // lean: blocks along x without a tile, one for each multiprocessor in all
  bool gated = false;                      // lean: in graphs, the launch is not cooperative (gate.h)
  int early = 0;                           // gated: blocks that ask the L2 cache for the input of all
  // Behind the rings in shared memory: the results of all but a block's last tile, then the moments of its warps. What
  // belongs to the last tile lies over the rings.
  int stash_offset = 0, parts_offset = 0;
  int sums_offset = 0;  // share: what comes from the other block, over nothing else
  size_t shared_bytes = 0;
  size_t moments_bytes(const ConvParams& p) const {
    return sizeof(float2) * static_cast<size_t>(p.batch) * static_cast<size_t>(entries + 1) *
           static_cast<size_t>(p.out_channels);
  }
};

// Whether the fused kernels take this shape on the current device; fills the schedule if so. Pointers may still be
// null; input and weight must come 16-byte aligned.
cudaError_t schedule_conv(const ConvParams& params, ConvSchedule& schedule, bool& supported);

// The path's name, for what ends in a kernel of its own.
const char* conv_name(const ConvParams& params, const ConvSchedule& schedule);

// The convolution alone, where params.moments is null.
cudaError_t launch_conv(const ConvParams& params, ConvSchedule schedule, cudaStream_t stream);

// And the norm, in one pass: the result goes to norm.output, in the format norm.output_channels_last, which is also the
// residual's; params.output is not used. `name` is the path that ran; null where this schedule and these tensors take
// two passes, or where this process has only some of the multiprocessors (MPS, a green context) or no cooperative
// launches.
cudaError_t launch_conv_one_pass(const ConvParams& params, const ConvSchedule& schedule, const InstanceNormParams& norm,
                                 cudaStream_t stream, const char*& name);
// In two: the convolution writes params.output, channels_last, which norm.output may be if it is channels_last, too.
cudaError_t launch_conv_two_passes(const ConvParams& params, ConvSchedule schedule, const InstanceNormParams& norm,
                                   cudaStream_t stream, const char*& name);

// A convolution of few input channels, read where they lie: strides in elements, of [N, C, H, W] and [Co, Ci, kh, kw].
// params.in_channels is the picture's own number of channels.
struct PictureConv {
  int64_t input_stride[4] = {};
  int64_t weight_stride[4] = {};
};
cudaError_t schedule_picture_conv(const ConvParams& params, ConvSchedule& schedule, bool& supported);
// Writes params.output, channels_last, and what follows goes to norm.output, as for launch_conv_two_passes.
cudaError_t launch_picture_conv(const ConvParams& params, const PictureConv& picture, const ConvSchedule& schedule,
                                const InstanceNormParams& norm, cudaStream_t stream, const char*& name);

struct ConvWeightsParams {
  const void* weight = nullptr;  // [out_channels, in_channels, kernel_h, kernel_w], any strides
  void* output = nullptr;        // [out_channels, kernel_h, kernel_w, in_channels]
  void* output_lo = nullptr;     // given: output is rounded to TF32 and this takes the difference
  int64_t stride[4] = {};        // of weight, in elements
  int out_channels = 0, in_channels = 0, kernel_h = 1, kernel_w = 1;
  // Not 0: by columns, output is [column_rows, kernel_h, in_channels]; row j * out_channels + c is column j of the
  // kernel of output channel c, rows beyond them are zeros.
  int column_rows = 0;
  DType dtype = DType::kFloat32;
};
cudaError_t launch_conv_weights(const ConvWeightsParams& params, cudaStream_t stream);
// The same, not by columns, and the transposition of an input to channels_last, in one launch. Both have the element
// size of weights.dtype.
cudaError_t launch_conv_operands(const ConvWeightsParams& weights, const TransposeParams& input, cudaStream_t stream);

// A convolution of stride 1 with few output channels, padded by reflection to the input's size (odd kernels), in one
// kernel.
struct ColumnsConv {
  const void* input = nullptr;   // [batch, height, width, in_channels], 16-byte aligned
  const void* weight = nullptr;  // [out_channels, in_channels, kernel_h, kernel_w], any strides
  const void* bias = nullptr;    // [out_channels] or null
  void* output = nullptr;        // [batch, out_channels, height, width] in either format
  int64_t weight_stride[4] = {};
  int batch = 0, in_channels = 0, out_channels = 0, height = 0, width = 0, kernel_h = 1, kernel_w = 1;
  bool channels_last = false;
  DType dtype = DType::kFloat32;
  ConvPrecision precision = ConvPrecision::kNative;
};
cudaError_t takes_columns_conv(const ColumnsConv& params, bool& taken);
cudaError_t launch_columns_conv(const ColumnsConv& params, cudaStream_t stream, const char*& name);

struct SumColumnsParams {
  const void* columns = nullptr;  // [batch, height, width + kernel_w - 1, pitch]
  const void* bias = nullptr;     // [channels] or null
  void* output = nullptr;         // [batch, channels, height, width] in either format
  int batch = 0, channels = 0, height = 0, width = 0, kernel_w = 1;
  int pitch = 0;  // channels of `columns`: kernel_w * channels or more
  bool channels_last = false;
  DType dtype = DType::kFloat32;
};
bool takes_sum_columns(const SumColumnsParams& params);
cudaError_t launch_sum_columns(const SumColumnsParams& params, cudaStream_t stream);

}  // namespace styleforge::cuda
