// What the schedule and the kernels behind launch.h share.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

constexpr int kTiledAttentionRows = 128;  // queries a block
constexpr int kTiledAttentionMaxHead = 128;
constexpr int kTiledAttentionBackwardHead = 64;

}  // namespace styleforge::cuda
