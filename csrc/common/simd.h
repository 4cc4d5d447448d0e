// A vector of LANES floats for the instruction set that the including file is compiled for.
//
// The arithmetic is that of GCC's and Clang's vector extensions, the same source for every set;
// intrinsics are used where extensions have no equivalent. Only fma() makes a fused multiply-add, so
// terms that cancel exactly do so everywhere.
#pragma once

#if DBLOCKS_LANES > 4
#include <immintrin.h>
#endif

#include "common/kernels.h"

namespace dblocks {
namespace {

#define DBLOCKS_INLINE inline __attribute__((always_inline))

constexpr int LANES = DBLOCKS_LANES;
typedef float vf __attribute__((vector_size(4 * DBLOCKS_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * DBLOCKS_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * DBLOCKS_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * DBLOCKS_LANES)));

DBLOCKS_INLINE vf splat(float a) { return a - vf{}; }
DBLOCKS_INLINE vu splat_u(uint32_t a) { return a - vu{}; }
DBLOCKS_INLINE vu bits(vf a) { return (vu)a; }
DBLOCKS_INLINE vf floats(vu a) { return (vf)a; }
DBLOCKS_INLINE vu select(vi mask, vu a, vu b) { return ((vu)mask & a) | (~(vu)mask & b); }

DBLOCKS_INLINE vf fma(vf a, vf b, vf c) {
#if DBLOCKS_LANES == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DBLOCKS_LANES == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

DBLOCKS_INLINE vf larger(vf a, vf b) {
#if DBLOCKS_LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif DBLOCKS_LANES == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return floats(select(a > b, bits(a), bits(b)));
#endif
}

DBLOCKS_INLINE vf root(vf a) {
#if DBLOCKS_LANES == 16
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif DBLOCKS_LANES == 8
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  vf r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}

// 32-bit numbers in LANES/2 lanes of 64 bits; the upper halves are ignored.
typedef uint64_t vw __attribute__((vector_size(4 * DBLOCKS_LANES)));

DBLOCKS_INLINE vw multiply(vw a, uint32_t factor) {
#if DBLOCKS_LANES == 16
  return (vw)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif DBLOCKS_LANES == 8
  return (vw)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#else
  return (a & 0xFFFFFFFFu) * (uint64_t)factor;
#endif
}

// The lower halves of even and odd, interleaved.
DBLOCKS_INLINE vu merge(vw even, vw odd) {
#if DBLOCKS_LANES == 16
  const __m512i upper = _mm512_slli_epi64((__m512i)odd, 32);
  return (vu)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, upper);
#elif DBLOCKS_LANES == 8
  return (vu)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
#else
  return (vu)((even & 0xFFFFFFFFu) | odd << 32);
#endif
}

// Interleaves a[0] b[0] a[1] b[1] ..: the lower and the upper half.
DBLOCKS_INLINE void interleave(vf a, vf b, vf& low, vf& high) {
#if DBLOCKS_LANES == 16
  low = __builtin_shufflevector(
      a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(
      a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif DBLOCKS_LANES == 8
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

DBLOCKS_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

DBLOCKS_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

DBLOCKS_INLINE vf load(const bf16* p) {
#if DBLOCKS_LANES == 16
  const vu w = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif DBLOCKS_LANES == 8
  const vu w = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  const vu w = __builtin_convertvector(h, vu);
#endif
  return floats(w << 16);
}

DBLOCKS_INLINE void store(bf16* p, vf v) {
  const vu u = bits(v);
  const vu nearest = u + 0x7FFF + ((u >> 16) & 1);  // ties to even
#if DBLOCKS_LANES == 16
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i w = _mm512_mask_blend_epi32(number, _mm512_set1_epi32(0x7FC00000), (__m512i)nearest);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)));
#elif DBLOCKS_LANES == 8
  const __m256 number = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q);
  const __m256 nan = (__m256)_mm256_set1_epi32(0x7FC00000);
  const __m256i w = _mm256_srli_epi32((__m256i)_mm256_blendv_ps(nan, (__m256)nearest, number), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  const vh h = __builtin_convertvector(select(v == v, nearest, splat_u(0x7FC00000)) >> 16, vh);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

DBLOCKS_INLINE vf load(const f16* p) {
#if DBLOCKS_LANES == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif DBLOCKS_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  const vu w = __builtin_convertvector(h, vu), magnitude = (w & 0x7FFF) << 13;
  const vu exponent = magnitude & 0x0F800000, normal = magnitude + (112u << 23);
  const vf least = splat(0x1p-14f);
  const vu subnormal = bits(floats(normal + (1u << 23)) - least);
  const vu finite = select(exponent == 0, subnormal, normal);
  const vu value = select(exponent == 0x0F800000, normal + (112u << 23), finite);
  return floats(value | (w & 0x8000) << 16);
#endif
}

DBLOCKS_INLINE void store(f16* p, vf v) {
#if DBLOCKS_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif DBLOCKS_LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const vu u = bits(v), sign = u & 0x80000000u, magnitude = u ^ sign;
  // Adding 0.5 leaves a subnormal's bits, rounded to the nearest even, at the end of the sum.
  const vu subnormal = bits(floats(magnitude) + 0.5f) - 0x3F000000u;
  const vu normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const vu finite = select(magnitude < 113u << 23, subnormal, normal);
  const vu value = select(magnitude < 143u << 23, finite, splat_u(0x7C00));
  const vh h = __builtin_convertvector(
      select(v == v, value, splat_u(0x7E00)) | sign >> 16, vh);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// All lanes, or the first n: loops pass this to their body for whole vectors and for the rest.
struct All {
  template <class T>
  DBLOCKS_INLINE vf load(const T* p) const {
    return dblocks::load(p);
  }
  template <class T>
  DBLOCKS_INLINE void store(T* p, vf v) const {
    dblocks::store(p, v);
  }
  DBLOCKS_INLINE vf keep(vf v) const { return v; }
};

struct First {
  int n;

  template <class T>
  DBLOCKS_INLINE vf load(const T* p) const {
    T values[LANES] = {};
    for (int i = 0; i < n; ++i) values[i] = p[i];
    return dblocks::load(values);
  }
  template <class T>
  DBLOCKS_INLINE void store(T* p, vf v) const {
    T values[LANES];
    dblocks::store(values, v);
    for (int i = 0; i < n; ++i) p[i] = values[i];
  }
  DBLOCKS_INLINE vf keep(vf v) const {
    for (int i = n; i < LANES; ++i) v[i] = 0;
    return v;
  }
};

constexpr int UNROLL = 4;  // accumulators that hide the latency of an addition

// body(i, k, lanes) for every vector of n elements; k counts the accumulators.
template <class Body>
DBLOCKS_INLINE void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
    for (int k = 0; k < UNROLL; ++k) body(i + k * LANES, k, All{});
  for (; i + LANES <= n; i += LANES) body(i, 0, All{});
  if (i < n) body(i, 0, First{(int)(n - i)});
}

// In halves: lane i and lane i + width meet, down to width 1.
DBLOCKS_INLINE float sum(vf v) {
#if DBLOCKS_LANES == 16
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
#elif DBLOCKS_LANES == 8
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0);
#else
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 1, 0);
#endif
  return v[0];
}

DBLOCKS_INLINE float sum(const vf (&v)[UNROLL]) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

}  // namespace
}  // namespace dblocks
