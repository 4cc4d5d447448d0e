// Blocks of elements, for every family: dtypes, and a linear combination.
#pragma once

#include "common/simd.h"

namespace dblocks {
namespace {

template <class T>
void to_float(const void* from, float* to, int64_t n) {
  const T* x = (const T*)from;
  each(n, [&](int64_t i, int, auto lanes) { lanes.store(to + i, lanes.load(x + i)); });
}

template <class T>
void from_float(const float* from, void* to, int64_t n) {
  T* out = (T*)to;
  each(n, [&](int64_t i, int, auto lanes) { lanes.store(out + i, lanes.load(from + i)); });
}

void from_double(const void* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = (float)((const double*)from)[i];
}

void to_double(const float* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) ((double*)to)[i] = from[i];
}

void blend(float a, const float* x, float b, const float* y, float* out, int64_t n) {
  const vf va = splat(a), vb = splat(b);
  if (y == nullptr) {
    each(n, [&](int64_t i, int, auto lanes) { lanes.store(out + i, va * lanes.load(x + i)); });
    return;
  }
  each(n, [&](int64_t i, int, auto lanes) {
    lanes.store(out + i, fma(va, lanes.load(x + i), vb * lanes.load(y + i)));
  });
}

}  // namespace
}  // namespace dblocks
