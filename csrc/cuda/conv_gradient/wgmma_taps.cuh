// As ../common/wgmma.cuh (A in registers, B in shared memory), 16-bit, 96 columns, with B the other way round: rows of
// K that hold 32 columns each, side by side in 64 bytes with the 64-byte swizzle, and the three 32s of columns at a
// distance of one's choice: D[64 x 96] += A[64 x 16] * B[16 x 96].
//
// The distance may be that of two rows: then the second 32 columns are the first ones a row further on, and a
// convolution's three taps in a row of pixels are one multiplication. The swizzle is one of addresses, not of rows, so
// B may begin at any row of a box.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/wgmma.cuh"

namespace styleforge::cuda {

constexpr int kTapColumns = 32;
constexpr int kTapRowBytes = kTapColumns * 2;

#ifdef STYLEFORGE_HAS_WGMMA

// All of a descriptor but the address: rows of 64 bytes, the columns' parts `distance` bytes apart. What follows in
// memory is its bytes / 16 further on in a descriptor.
__device__ __forceinline__ uint64_t taps_descriptor(uint32_t distance) {
  return (uint64_t{2} << 62) | (uint64_t{8 * kTapRowBytes >> 4} << 32) | (static_cast<uint64_t>(distance >> 4) << 16);
}

// clang-format off
#define STYLEFORGE_WGMMA_96(type)                                                                                    \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred p;\n"                                                                                              \
      "setp.ne.b32 p, %53, 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type " "                                                \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                             \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "                            \
      "{%48, %49, %50, %51}, %52, p, 1, 1, 1;\n"                                                                     \
      "}\n"                                                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                                      \
        "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                    \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),                                \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                                \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),                                \
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                                \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),                                \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
// clang-format on

template <typename T>
__device__ __forceinline__ void multiply_taps(float (&d)[48], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    STYLEFORGE_WGMMA_96("f16");
  } else {
    STYLEFORGE_WGMMA_96("bf16");
  }
}

#undef STYLEFORGE_WGMMA_96

#endif  // STYLEFORGE_HAS_WGMMA

}  // namespace styleforge::cuda
