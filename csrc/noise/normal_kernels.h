// Counter-based normals: Philox 4x32-10 and Box-Muller.
//
// The same numbers as in the reference and the Triton kernels (kernels/_common/philox.py):
// bits and uniforms equal, normals to 1e-6. Logarithm, sine and cosine are polynomials, so they do
// not depend on a library.
#pragma once

#include "common/simd.h"

namespace dblocks {
namespace {

constexpr uint32_t ROUND_A = 0xD2511F53, ROUND_B = 0xCD9E8D57;  // Salmon et al. 2011, table 2
constexpr uint32_t KEY_A = 0x9E3779B9, KEY_B = 0xBB67AE85;
constexpr int ROUNDS = 10;
constexpr float UNIFORM_SCALE = 0x1.fffffep-32f;
constexpr float UNIFORM_MIN = 1e-7f;  // so |eps| <= sqrt(-2 ln 1e-7) = 5.678
constexpr float TWO_PI = 6.2831855f;
constexpr float HALF_PI_HIGH = 0x1.921fap+0f;  // multiples up to 4 are exact
constexpr float HALF_PI_LOW = 1.2675908465098473e-06f;
constexpr float ROUND_MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer

DBLOCKS_INLINE vf uniform(vu word) {
  const vi s = (vi)word;
  return __builtin_convertvector(s ^ (s >> 31), vf) * UNIFORM_SCALE;
}

DBLOCKS_INLINE vf minus_2_log(vf u) {
  const vi word = (vi)u, shifted = (word - 0x3F3504F3) & (vi)splat_u(0xFF800000u);
  // u = (1 + f) * 2^e with 1 + f in [sqrt(1/2), sqrt(2))
  const vf f = (vf)(word - shifted) - 1.0f, e = __builtin_convertvector(shifted >> 23, vf);
  vf p = fma(f, splat(-0.17469686269760132f), splat(0.28615042567253113f));
  p = fma(p, f, splat(-0.2983594834804535f));
  p = fma(p, f, splat(0.33141016960144043f));
  p = fma(p, f, splat(-0.39924144744873047f));
  p = fma(p, f, splat(0.5000351071357727f));
  p = fma(p, f, splat(-0.6666790246963501f));
  p = fma(p, f, splat(0.9999998211860657f));
  return fma(e, splat(-1.3862943649291992f), fma(f * f, p, -2.0f * f));
}

DBLOCKS_INLINE void cos_sin(vf theta, vf& cos, vf& sin) {
  const vf rounded = fma(theta, splat(0.6366197466850281f), splat(ROUND_MAGIC));
  const vu quadrant = bits(rounded);
  const vf k = rounded - ROUND_MAGIC;
  const vf x = fma(-k, splat(HALF_PI_LOW), fma(-k, splat(HALF_PI_HIGH), theta)), x2 = x * x;
  vf s = fma(x2, splat(-0.0001951729936990887f), splat(0.008332177996635437f));
  s = fma(x2 * x, fma(s, x2, splat(-0.16666655242443085f)), x);
  vf c = fma(x2, splat(2.4438451873720624e-05f), splat(-0.001388736767694354f));
  c = fma(c, x2, splat(0.04166664555668831f));
  c = fma(x2 * x2, c, fma(x2, splat(-0.5f), splat(1.0f)));
  const vi swap = -(vi)(quadrant & 1);
  // Quadrants 1 and 2 negate the cosine, 2 and 3 the sine: bit 1 moves into the sign.
  cos = floats(select(swap, bits(s), bits(c)) ^ (((quadrant + 1) & 2) << 30));
  sin = floats(select(swap, bits(c), bits(s)) ^ ((quadrant & 2) << 30));
}

DBLOCKS_INLINE void normal_pair(vu a, vu b, vf& even, vf& odd) {
  const vf r = root(minus_2_log(larger(uniform(a), splat(UNIFORM_MIN))));
  vf cos, sin;
  cos_sin(uniform(b) * TWO_PI, cos, sin);
  even = r * cos;
  odd = r * sin;
}

struct Words {
  vw c0, c1, c2, c3;

  // The words of quads quad, quad + 2, .. before the first round.
  DBLOCKS_INLINE explicit Words(uint64_t quad) : c2{}, c3{} {
    for (int i = 0; i < LANES / 2; ++i) c0[i] = 2 * i;
    c0 += quad;
    c1 = c0 >> 32;
  }
  DBLOCKS_INLINE void round(uint32_t k0, uint32_t k1) {
    const vw a = multiply(c0, ROUND_A), b = multiply(c2, ROUND_B);
    c0 = b >> 32 ^ c1 ^ (uint64_t)k0;
    c2 = a >> 32 ^ c3 ^ (uint64_t)k1;
    c1 = b;
    c3 = a;
  }
};

constexpr int64_t STEP = 4 * LANES;  // normals of LANES quads

// The words of LANES quads from number `quad`, one vector per lane of a quad.
DBLOCKS_INLINE void quad_words(float* out, uint64_t seed, uint64_t quad) {
  Words even(quad), odd(quad + 1);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < ROUNDS; ++round) {
    even.round(k0, k1);
    odd.round(k0, k1);
    k0 += KEY_A;
    k1 += KEY_B;
  }
  store(out, floats(merge(even.c0, odd.c0)));
  store(out + LANES, floats(merge(even.c1, odd.c1)));
  store(out + 2 * LANES, floats(merge(even.c2, odd.c2)));
  store(out + 3 * LANES, floats(merge(even.c3, odd.c3)));
}

// Converts these words to normals, in place and in the order of the elements.
DBLOCKS_INLINE void quad_normals(float* out) {
  vf n0, n1, n2, n3, even_low, even_high, odd_low, odd_high, result[4];
  normal_pair(bits(load(out)), bits(load(out + LANES)), n0, n1);
  normal_pair(bits(load(out + 2 * LANES)), bits(load(out + 3 * LANES)), n2, n3);
  interleave(n0, n2, even_low, even_high);
  interleave(n1, n3, odd_low, odd_high);
  interleave(even_low, odd_low, result[0], result[1]);
  interleave(even_high, odd_high, result[2], result[3]);
  for (int i = 0; i < 4; ++i) store(out + i * LANES, result[i]);
}

void normals(float* out, int64_t n, uint64_t seed, uint64_t first) {
  uint64_t quad = first >> 2;
  const auto part = [&](int64_t skip, int64_t take) {
    float block[STEP];
    quad_words(block, seed, quad);
    quad_normals(block);
    for (int64_t i = 0; i < take; ++i) out[i] = block[skip + i];
    out += take;
    n -= take;
    quad += LANES;
  };
  const int64_t skip = (int64_t)(first & 3);
  if (skip) part(skip, n < STEP - skip ? n : STEP - skip);
  // Two loops: the rounds of the words depend on each other, and need the whole out-of-order window
  // of the processor.
  const int64_t whole = n / STEP * STEP;
  for (int64_t i = 0; i < whole; i += STEP, quad += LANES) quad_words(out + i, seed, quad);
  for (int64_t i = 0; i < whole; i += STEP) quad_normals(out + i);
  out += whole;
  n -= whole;
  if (n > 0) part(0, n);
}

}  // namespace
}  // namespace dblocks
