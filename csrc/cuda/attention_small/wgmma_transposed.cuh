// As wgmma_shared.cuh, for results of few columns, and with a left operand that may lie transposed: D[64 x N] +=
// A[64 x 16] * B[N x 16]^T, 16-bit. Descriptors are those of wgmma_descriptor in both cases. A as it is: rows of 64 of
// K, the next 16 of K are 2 further on. A transposed: rows of K, 64 of the result's rows each; the next 16 of K are 128
// further on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/wgmma.cuh"

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_WGMMA

// clang-format off
#define STYLEFORGE_WGMMA_16(type)                                                                                    \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred p;\n"                                                                                              \
      "setp.ne.b32 p, %11, 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                                                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %10, 0;\n"                                                \
      "}\n"                                                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])               \
      : "l"(a), "l"(b), "n"(static_cast<int>(kTransposed)), "r"(static_cast<int>(accumulate)))
#define STYLEFORGE_WGMMA_32(type)                                                                                    \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred p;\n"                                                                                              \
      "setp.ne.b32 p, %19, 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %18, 0;\n"        \
      "}\n"                                                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),              \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])         \
      : "l"(a), "l"(b), "n"(static_cast<int>(kTransposed)), "r"(static_cast<int>(accumulate)))
// clang-format on

// 16 or 32 columns, two for each register; without `accumulate` D is overwritten.
template <typename T, bool kTransposed, int kCount>
__device__ __forceinline__ void multiply_boxes(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kCount == 8 || kCount == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kCount == 8) {
      STYLEFORGE_WGMMA_16("f16");
    } else {
      STYLEFORGE_WGMMA_32("f16");
    }
  } else {
    if constexpr (kCount == 8) {
      STYLEFORGE_WGMMA_16("bf16");
    } else {
      STYLEFORGE_WGMMA_32("bf16");
    }
  }
}

#undef STYLEFORGE_WGMMA_16
#undef STYLEFORGE_WGMMA_32

// Pieces of 8 x 8 of a result, as wgmma has them, with rows and columns exchanged: lanes 8 i .. 8 i + 7 give the
// addresses of 16 bytes for the columns of piece i.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                                          uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
