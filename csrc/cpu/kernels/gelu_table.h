// gelu in float32 by a table, for processors whose registers hold one: AVX-512 looks 16 values up among 32 in one
// instruction. The tail Phi(-z), z = |x|, is a polynomial of degree 6 in z - k/4 around each k = 0 .. 31, and
//
//   gelu(x) = max(x, 0) - z Phi(-z)
//
// is then one multiply-add, with one rounding. 20 instructions, where normal_distribution (gelu_math.h) takes 60: with
// those, the pass between the products of a small network took longer than PyTorch's over the same values. Behind -4
// the tail falls too steeply for polynomials of this width to keep their relative error, and a vector that has such a
// value goes to the caller's formula as a whole. In all |Phi - exact| < 2^-24, and a result is within 2 units in the
// last place. The polynomials interpolate at Chebyshev's nodes, made in 40 digits.
#pragma once

#if defined(__AVX512F__)

#include "vec.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

// Coefficient 6 - i of all polynomials. Those around 0 that are 0 but for the rounding of a fit are 0 here: as the
// denormal numbers that they would be, they slow the whole down to a tenth.
alignas(64) inline constexpr float kTail[7][32] = {
    {0.0f,
     0.00192406226f,
     0.00306186406f,
     0.00303203217f,
     0.00201314176f,
     0.00057777029f,
     -0.000652930525f,
     -0.00130487571f,
     -0.00134662678f,
     -0.000990597415f,
     -0.000514261366f,
     -0.000120601457f,
     0.000109607077f,
     0.000191082654f,
     0.000180285322f,
     0.000132459201f,
     8.26353935e-05f,
     4.53592147e-05f,
     2.2317221e-05f,
     9.95212304e-06f,
     4.05187575e-06f,
     1.51381346e-06f,
     5.20936339e-07f,
     1.65586215e-07f,
     4.87252336e-08f,
     1.32967228e-08f,
     3.36996298e-09f,
     7.94176114e-10f,
     1.74203929e-10f,
     3.55976255e-11f,
     6.78150548e-12f,
     1.20517626e-12f},
    {-0.0099411523f,   -0.00844530761f,  -0.00457526697f,  0.000137685551f,  0.00401188806f,   0.00596496277f,
     0.00585352909f,   0.00430596853f,   0.002252826f,     0.000469029561f,  -0.000659265905f, -0.00111784798f,
     -0.00110565044f,  -0.00086519483f,  -0.000579188694f, -0.000342781452f, -0.000182483418f, -8.82990571e-05f,
     -3.91002177e-05f, -1.59207048e-05f, -5.98162706e-06f, -2.07920812e-06f, -6.70028783e-07f, -2.00502853e-07f,
     -5.57905437e-08f, -1.44508796e-08f, -3.487582e-09f,   -7.84860732e-10f, -1.64812983e-10f, -3.23127324e-11f,
     -5.91779317e-12f, -1.01284486e-12f},
    {0.0f,
     -0.0118315909f,
     -0.0201703347f,
     -0.0229381397f,
     -0.020164201f,
     -0.013674913f,
     -0.00607117452f,
     0.000393152324f,
     0.00449922262f,
     0.0061371522f,
     0.00593406567f,
     0.00475400174f,
     0.00332389562f,
     0.00207793037f,
     0.00117721478f,
     0.000609467155f,
     0.000289964664f,
     0.000127279869f,
     5.16967593e-05f,
     1.94725817e-05f,
     6.81393294e-06f,
     2.21815731e-06f,
     6.72512726e-07f,
     1.90077429e-07f,
     5.0121546e-08f,
     1.23387718e-08f,
     2.83740298e-09f,
     6.09797601e-10f,
     1.22532789e-10f,
     2.3029469e-11f,
     4.04971369e-12f,
     6.66501251e-13f},
    {0.0664901286f,    0.0604166947f,    0.0440080948f,    0.0219580103f,    1.63620243e-07f,  -0.0171231776f,
     -0.0269827135f,   -0.0296577886f,   -0.026995508f,    -0.0214904454f,   -0.0153373191f,   -0.00994612277f,
     -0.00590914907f,  -0.00323379831f,  -0.00163627556f,  -0.000767623715f, -0.000334570126f, -0.000135696231f,
     -5.12791012e-05f, -1.80737552e-05f, -5.94641278e-06f, -1.82751921e-06f, -5.24955567e-07f, -1.41010659e-07f,
     -3.54351712e-08f, -8.3335383e-09f,  -1.83474269e-09f, -3.78262283e-10f, -7.30449035e-11f, -1.32147938e-11f,
     -2.24021019e-12f, -3.5591823e-13f},
    {0.0f,
     0.0483335145f,
     0.0880163312f,
     0.112926535f,
     0.120985359f,
     0.11415568f,
     0.0971381962f,
     0.0754926577f,
     0.0539909676f,
     0.0357071087f,
     0.021910375f,
     0.0125036482f,
     0.00664777262f,
     0.00329720299f,
     0.00152719475f,
     0.000661116908f,
     0.000267660449f,
     0.000101402104f,
     3.59634178e-05f,
     1.19450806e-05f,
     3.71679926e-06f,
     1.08372376e-06f,
     2.9616848e-07f,
     7.5878269e-08f,
     1.82276576e-08f,
     4.10625844e-09f,
     8.67606653e-10f,
     1.71954354e-10f,
     3.19715712e-11f,
     5.577211e-12f,
     9.12872425e-13f,
     1.40209337e-13f},
    {-0.398942292f,    -0.386668116f,    -0.352065325f,    -0.301137418f,    -0.241970718f,    -0.182649091f,
     -0.1295176f,      -0.086277321f,    -0.0539909676f,   -0.0317396522f,   -0.0175283011f,   -0.00909356214f,
     -0.00443184841f,  -0.00202904805f,  -0.000872682722f, -0.0003525957f,   -0.000133830239f, -4.77186441e-05f,
     -1.59837455e-05f, -5.02950934e-06f, -1.48672041e-06f, -4.1284747e-07f,  -1.07697737e-07f, -2.63924793e-08f,
     -6.07589756e-09f, -1.31400602e-09f, -2.6695679e-10f,  -5.09496577e-11f, -9.13478494e-12f, -1.53855162e-12f,
     -2.43434775e-13f, -3.61834484e-14f},
    {0.5f,
     0.401293665f,
     0.308537543f,
     0.22662735f,
     0.158655256f,
     0.105649777f,
     0.066807203f,
     0.0400591567f,
     0.0227501318f,
     0.0122244731f,
     0.00620966544f,
     0.00297976332f,
     0.00134989806f,
     0.000577025057f,
     0.000232629085f,
     8.84172841e-05f,
     3.16712431e-05f,
     1.06885254e-05f,
     3.39767303e-06f,
     1.01708326e-06f,
     2.86651584e-07f,
     7.60496022e-08f,
     1.89895619e-08f,
     4.46217241e-09f,
     9.865877e-10f,
     2.05226336e-10f,
     4.01600073e-11f,
     7.39225781e-12f,
     1.27981252e-12f,
     2.08385812e-13f,
     3.1908917e-14f,
     4.59462731e-15f},
};

// `beyond` is gelu of vectors with values below -4.125. NaN stays NaN.
template <typename Beyond>
inline Vector<float, 16> gelu_by_table(Vector<float, 16> given, const Beyond& beyond) {
  const __m512 x = bit_cast<__m512>(given);
  if (__builtin_expect(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-4.125f), _CMP_LT_OQ) != 0, 0)) return beyond(given);
  const __m512 z = _mm512_min_ps(_mm512_set1_ps(7.75f), _mm512_abs_ps(x));  // of a NaN the second one
  const __m512 magic = _mm512_set1_ps(3145728.0f);                          // 1.5 * 2^21: adding it rounds to quarters
  const __m512 shifted = _mm512_add_ps(z, magic);
  const __m512i k = _mm512_castps_si512(shifted);  // its lower five bits count
  const __m512 r = _mm512_sub_ps(z, _mm512_sub_ps(shifted, magic));
  const auto coefficient = [&](int i) {
    return _mm512_permutex2var_ps(_mm512_load_ps(kTail[i]), k, _mm512_load_ps(kTail[i] + 16));
  };
  __m512 tail = coefficient(0);
  for (int i = 1; i < 7; ++i) tail = _mm512_fmadd_ps(tail, r, coefficient(i));
  const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);  // of two zeros the second one
  return bit_cast<Vector<float, 16>>(_mm512_fnmadd_ps(z, tail, positive));
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA

#endif
