// Warp-wide matrix multiply-accumulate (sm_80+; PTX ISA, "mma.sync"): D[16 x 8] += A[16 x K] * B[8 x K]^T, accumulated
// in float32. K is 32 bytes: 16 halves or 8 TF32 numbers.
//
//   A: a[0] row l / 4 of lane l, columns of byte 4 (l % 4); a[1] the row 8 below; a[2], a[3] the same, 16 bytes to the
//      right (what ldmatrix.x4 gives of four 8 x 16-byte matrices)
//   B: b[0] row l / 4, columns of byte 4 (l % 4); b[1] the same, 16 bytes to the right
//   D: d[0], d[1] row l / 4, columns 2 (l % 4) and the next; d[2], d[3] the row 8 below
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define STYLEFORGE_HAS_MMA 1
#endif

namespace styleforge::cuda {

#ifdef STYLEFORGE_HAS_MMA

// Four matrices of 8 x 16 bytes: lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// As load_matrices, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// d = c + A * B; T is float for TF32, whose lower 13 bits the units cut off.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// bits = hi + lo as the units cut them, but for 2^-23 of it at most; hi to nearest, lo with either sign. Infinity gives
// Inf + NaN, and every NaN has one in hi or in lo.
__device__ __forceinline__ void split_fragment(uint32_t bits, uint32_t& hi, uint32_t& lo) {
  const float value = __uint_as_float(bits);
  hi = (bits + 0x1000u) & ~0x1fffu;
  lo = __float_as_uint(value - __uint_as_float(hi));
}

// 16 bytes, zeros where not valid; nothing at all where not wanted.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid, bool wanted) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(static_cast<int>(wanted))
      : "memory");
}

// 0 where not wanted.
__device__ __forceinline__ int load_shared(uint32_t address, bool wanted) {
  int value;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "mov.b32 %0, 0;\n"
      "@p ld.shared.b32 %0, [%1];\n"
      "}\n"
      : "=&r"(value)
      : "r"(address), "r"(static_cast<int>(wanted))
      : "memory");
  return value;
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending groups of this thread's copies are still on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif  // STYLEFORGE_HAS_MMA

}  // namespace styleforge::cuda
