// Vectors of the instruction set that the including file is compiled for (GCC/Clang vector extensions), and loads and
// stores that convert the storage types to float or double. Everything lives in namespace STYLEFORGE_CPU_ISA, because
// the same sources are compiled several times with different flags; nothing here may instantiate a std:: template,
// whose copy for AVX-512 the linker could otherwise choose for the whole library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef STYLEFORGE_CPU_ISA
#error "STYLEFORGE_CPU_ISA must name the instruction set (baseline, avx2 or avx512)"
#endif

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage types.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename Scalar, int N>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(N * sizeof(Scalar))));
};
template <typename Scalar, int N>
using Vector = typename VectorOf<Scalar, N>::Type;

// The type that a storage type is computed in, and how many of it one register holds.
template <typename T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::Type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute<T>));
constexpr int kDoubles = kVectorBytes / static_cast<int>(sizeof(double));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename To, typename Scalar>
inline To broadcast(Scalar value) {
  return To{} + value;
}

// float16 <-> float32 without hardware support, round to nearest even, after F. Giesen, "Half-to-float done quick"
// (2012), written without branches.
template <int N>
inline Vector<float, N> half_to_float_portable(Vector<uint16_t, N> half) {
  using U = Vector<uint32_t, N>;
  const U h = __builtin_convertvector(half, U);
  const U exponent_mask = broadcast<U>(uint32_t{0x7c00u << 13});
  const U shifted = (h & 0x7fffu) << 13;
  const U exponent = shifted & exponent_mask;
  const U normal = shifted + (uint32_t{127 - 15} << 23);
  const U infinite = normal + (uint32_t{128 - 16} << 23);
  const U magic = broadcast<U>(uint32_t{113u << 23});
  const U denormal = bit_cast<U>(bit_cast<Vector<float, N>>(normal + (1u << 23)) - bit_cast<Vector<float, N>>(magic));
  U result = exponent == exponent_mask ? infinite : normal;
  result = exponent == U{} ? denormal : result;
  return bit_cast<Vector<float, N>>(result | ((h & 0x8000u) << 16));
}

template <int N>
inline Vector<uint16_t, N> float_to_half_portable(Vector<float, N> value) {
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  U bits = bit_cast<U>(value);
  const U sign = bits & 0x80000000u;
  bits ^= sign;
  const U overflow = broadcast<U>(uint32_t{(127 + 16) << 23});
  const U infinity = broadcast<U>(uint32_t{255u << 23});
  const U denormal_magic = broadcast<U>(uint32_t{((127 - 15) + (23 - 10) + 1) << 23});
  const U special = bits > infinity ? broadcast<U>(0x7e00u) : broadcast<U>(0x7c00u);
  const U denormal = bit_cast<U>(bit_cast<F>(bits) + bit_cast<F>(denormal_magic)) - denormal_magic;
  const U odd = (bits >> 13) & 1u;
  const U normal = (bits + ((static_cast<uint32_t>(15 - 127) << 23) + 0xfffu) + odd) >> 13;
  U result = bits < broadcast<U>(uint32_t{113u << 23}) ? denormal : normal;
  result = bits >= overflow ? special : result;
  return __builtin_convertvector(result | (sign >> 16), Vector<uint16_t, N>);
}

template <int N>
inline Vector<float, N> half_to_float(Vector<uint16_t, N> half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vector<float, N>>(_mm512_cvtph_ps(bit_cast<__m256i>(half)));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return bit_cast<Vector<float, N>>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
  if constexpr (N == 4) return bit_cast<Vector<float, N>>(_mm_cvtph_ps(_mm_cvtsi64_si128(bit_cast<int64_t>(half))));
#endif
  return half_to_float_portable<N>(half);
}

template <int N>
inline Vector<uint16_t, N> float_to_half(Vector<float, N> value) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bit_cast<Vector<uint16_t, N>>(
        _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    return bit_cast<Vector<uint16_t, N>>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  return float_to_half_portable<N>(value);
}

// 16-bit <-> 32-bit integers; GCC 12 takes __builtin_convertvector apart into scalars here.
template <int N>
inline Vector<uint32_t, N> widen(Vector<uint16_t, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vector<uint32_t, N>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bit_cast<Vector<uint32_t, N>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
  if constexpr (N == 4) {
    return bit_cast<Vector<uint32_t, N>>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v))));
  }
#endif
  return __builtin_convertvector(v, Vector<uint32_t, N>);
}

template <int N>
inline Vector<uint16_t, N> narrow(Vector<uint32_t, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vector<uint16_t, N>>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
    return bit_cast<Vector<uint16_t, N>>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
  }
#endif
  return __builtin_convertvector(v, Vector<uint16_t, N>);
}

template <int N>
inline Vector<uint16_t, N> float_to_bfloat16(Vector<float, N> value) {
  using U = Vector<uint32_t, N>;
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const U is_nan = bit_cast<U>(value != value);
  return narrow<N>((rounded & ~is_nan) | (0x7fc0u & is_nan));
}

// N consecutive elements, converted to what they are computed in; no alignment is needed.
template <int N>
inline Vector<float, N> load(const float* from) {
  Vector<float, N> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
template <int N>
inline Vector<double, N> load(const double* from) {
  Vector<double, N> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
template <int N>
inline Vector<float, N> load(const Half* from) {
  Vector<uint16_t, N> bits;
  std::memcpy(&bits, from, sizeof(bits));
  return half_to_float<N>(bits);
}
template <int N>
inline Vector<float, N> load(const BFloat16* from) {
  Vector<uint16_t, N> bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Vector<float, N>>(widen<N>(bits) << 16);
}

template <int N>
inline void store(float* to, Vector<float, N> value) {
  std::memcpy(to, &value, sizeof(value));
}
template <int N>
inline void store(double* to, Vector<double, N> value) {
  std::memcpy(to, &value, sizeof(value));
}
template <int N>
inline void store(Half* to, Vector<float, N> value) {
  const Vector<uint16_t, N> bits = float_to_half<N>(value);
  std::memcpy(to, &bits, sizeof(bits));
}
template <int N>
inline void store(BFloat16* to, Vector<float, N> value) {
  const Vector<uint16_t, N> bits = float_to_bfloat16<N>(value);
  std::memcpy(to, &bits, sizeof(bits));
}

// The first `count` < N elements; the other lanes are 0 (load) or left alone (store).
template <int N, typename T>
inline Vector<Compute<T>, N> load_some(const T* from, int count) {
  T lanes[N] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load<N>(lanes);
}
template <int N, typename T>
inline void store_some(T* to, Vector<Compute<T>, N> value, int count) {
  T lanes[N];
  store<N>(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

// kDoubles consecutive elements as doubles, for sums.
template <typename T>
inline Vector<double, kDoubles> load_doubles(const T* from) {
  return __builtin_convertvector(load<kDoubles>(from), Vector<double, kDoubles>);
}

template <typename T>
inline double to_double(const T& value) {
  return static_cast<double>(load_some<kLanes<T>>(&value, 1)[0]);
}

// The lower and the upper half of a register of floats, as doubles; a register of doubles is its own only part.
struct DoublePair {
  Vector<double, kDoubles> low, high;
};
inline DoublePair to_doubles(Vector<float, 2 * kDoubles> v) {
  using F = Vector<float, kDoubles>;
  using D = Vector<double, kDoubles>;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const F low = bit_cast<F>(_mm512_castps512_ps256(bit_cast<__m512>(v)));
  const F high = bit_cast<F>(_mm512_extractf32x8_ps(bit_cast<__m512>(v), 1));
#elif defined(__AVX2__)
  const F low = bit_cast<F>(_mm256_castps256_ps128(bit_cast<__m256>(v)));
  const F high = bit_cast<F>(_mm256_extractf128_ps(bit_cast<__m256>(v), 1));
#else
  F low, high;
  std::memcpy(&low, &v, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
#endif
  return {__builtin_convertvector(low, D), __builtin_convertvector(high, D)};
}

inline double horizontal_sum(Vector<double, kDoubles> v) {
  double sum = 0;
  for (int i = 0; i < kDoubles; ++i) sum += v[i];
  return sum;
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
