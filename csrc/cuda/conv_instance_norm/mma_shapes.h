// The tiles of conv_mma.cu; shared by the kernel and its schedule.
#pragma once

namespace styleforge::cuda {

// From 16 x 8 pixels by 128 channels and 16 x 16 by 32 down to 16 x 4 by 32: kAcross x kDown warps, each of kRows_ rows
// of 16 pixels and kWide output channels.
template <int kAcross, int kDown, int kRows_, int kWide, int kStages_, int kBlocks_>
struct MmaTile {
  static constexpr int kChunk = 128;  // bytes of input channels of a stage
  static constexpr int kWarpsAcross = kAcross;
  static constexpr int kWarpsDown = kDown;
  static constexpr int kWarpRows = kRows_;
  static constexpr int kWarpColumns = kWide;
  static constexpr int kColumns = kAcross * kWide;
  static constexpr int kRows = kDown * kRows_;  // of pixels
  static constexpr int kThreads = kAcross * kDown * 32;
  static constexpr int kStages = kStages_;  // of weights
  static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor's registers
  static constexpr int kWeightBytes = kColumns * kChunk;
  // The split needs three times the fragments and twice the sums, so a smaller share of a tile for each warp; without
  // it four warps do what eight would.
  static constexpr bool takes(bool split) { return split ? kRows_ * kWide <= 64 : kThreads <= 128; }
};

constexpr int kMmaTiles = 7;

// Calls body.template operator()<MmaTile>().
template <typename Body>
auto switch_mma_tile(int tile, Body&& body) {
  switch (tile) {
    case 0:
      return body.template operator()<MmaTile<2, 2, 4, 64, 3, 2>>();
    case 1:
      return body.template operator()<MmaTile<2, 2, 4, 32, 4, 3>>();
    case 2:
      return body.template operator()<MmaTile<2, 4, 2, 32, 4, 2>>();
    case 3:
      return body.template operator()<MmaTile<1, 4, 4, 32, 4, 3>>();
    case 4:
      return body.template operator()<MmaTile<1, 4, 2, 32, 4, 3>>();
    case 5:
      return body.template operator()<MmaTile<2, 2, 2, 32, 4, 3>>();
    default:
      return body.template operator()<MmaTile<1, 4, 1, 32, 4, 4>>();
  }
}

}  // namespace styleforge::cuda
