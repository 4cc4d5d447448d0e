// Kernels for blocks of the loss.
#pragma once

#include "common/simd.h"

namespace dblocks {
namespace {

float squared_error(
    const float* f, const float* y, const float* eps, float p, float q, float* rest, int64_t n) {
  const vf vp = splat(p), vq = splat(q);
  vf total[UNROLL] = {};
  each(n, [&](int64_t i, int k, auto lanes) {
    const vf e = lanes.load(f + i) - (vp * lanes.load(y + i) - vq * lanes.load(eps + i));
    if (rest != nullptr) lanes.store(rest + i, e);
    total[k] = fma(e, e, total[k]);
  });
  return sum(total);
}

}  // namespace
}  // namespace dblocks
