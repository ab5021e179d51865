// The activations that every kernel, CPU and CUDA, knows. Plain data: no torch header, no CUDA header.
#pragma once

namespace styleforge {

enum class Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kSigmoid = 4, kTanh = 5 };

// Element types of kernels; the operator layer maps PyTorch's onto these.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

}  // namespace styleforge
