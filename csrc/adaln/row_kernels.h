// Rows of adaln, residual_adaln and gated_residual, forward and backward.
#pragma once

#include "common/simd.h"

namespace dblocks {
namespace {

template <class T>
void gated_sum(const void* px, const void* pb, const float* gate, void* out, int64_t n) {
  const T *x = (const T*)px, *branch = (const T*)pb;
  T* x_new = (T*)out;
  if (gate == nullptr) {
    each(n, [&](int64_t i, int, auto lanes) {
      lanes.store(x_new + i, lanes.load(x + i) + lanes.load(branch + i));
    });
    return;
  }
  each(n, [&](int64_t i, int, auto lanes) {
    const vf g = lanes.load(gate + i);
    lanes.store(x_new + i, fma(g, lanes.load(branch + i), lanes.load(x + i)));
  });
}

// The first pass over a row, which converts it to float32: body(k, lanes, value).
template <class T, class Body>
DBLOCKS_INLINE const float* read_row(const NormRow& r, Body body) {
  const T* x = (const T*)r.x;
  each(r.D, [&](int64_t i, int k, auto lanes) {
    const vf v = lanes.load(x + i);
    if (sizeof(T) != sizeof(float)) lanes.store(r.scratch + i, v);
    body(k, v);
  });
  return sizeof(T) == sizeof(float) ? (const float*)r.x : r.scratch;
}

template <class T>
DBLOCKS_INLINE const float* layer_stats(const NormRow& r, float& mean, float& variance) {
  vf total[UNROLL] = {};
  const float* x = read_row<T>(r, [&](int k, vf v) { total[k] += v; });
  const float per_element = 1.0f / (float)r.D;
  mean = sum(total) * per_element;
  const vf m = splat(mean);
  vf rest[UNROLL] = {}, square[UNROLL] = {};
  each(r.D, [&](int64_t i, int k, auto lanes) {
    const vf c = lanes.keep(lanes.load(x + i) - m);
    rest[k] += c;
    square[k] = fma(c, c, square[k]);
  });
  // The mean has a rounding error, which a variance near zero would amplify.
  const float correction = sum(rest) * per_element;
  mean += correction;
  variance = sum(square) * per_element - correction * correction;
  variance = variance < 0 ? 0 : variance;
  return x;
}

template <class T>
DBLOCKS_INLINE const float* mean_square(const NormRow& r, float& result) {
  vf square[UNROLL] = {};
  const float* x = read_row<T>(r, [&](int k, vf v) { square[k] = fma(v, v, square[k]); });
  result = sum(square) / (float)r.D;
  return x;
}

template <class T, bool AFFINE, bool MODULATED>
DBLOCKS_INLINE void norm_out(const NormRow& r, const float* x, T* y, vf mean, vf rstd) {
  each(r.D, [&](int64_t i, int, auto lanes) {
    vf h = (lanes.load(x + i) - mean) * rstd;
    if (AFFINE) {
      if (r.weight) h *= lanes.load(r.weight + i);
      if (r.bias) h += lanes.load(r.bias + i);
    }
    if (MODULATED) {
      if (r.scale) h = fma(h, lanes.load(r.scale + i), h);
      if (r.shift) h += lanes.load(r.shift + i);
    }
    lanes.store(y + i, h);
  });
}

template <class In, class Out>
void norm(const NormRow& r) {
  Out* y = (Out*)r.y;
  float mean = 0, variance;
  const float* x = r.rms ? mean_square<In>(r, variance) : layer_stats<In>(r, mean, variance);
  const float rstd = 1 / __builtin_sqrtf(variance + r.eps);
  if (r.mean) *r.mean = mean;
  if (r.rstd) *r.rstd = rstd;
  const vf m = splat(mean), s = splat(rstd);
  const bool modulated = r.scale || r.shift;
  if (r.weight || r.bias) {
    modulated ? norm_out<Out, true, true>(r, x, y, m, s)
              : norm_out<Out, true, false>(r, x, y, m, s);
  } else {
    modulated ? norm_out<Out, false, true>(r, x, y, m, s)
              : norm_out<Out, false, false>(r, x, y, m, s);
  }
}

// R rows at once, so that A, B and G are read and written once for them.
template <class T, int R, bool NORM, bool DX_NEW, bool BRANCH>
DBLOCKS_INLINE void backward_rows(const NormBackward& a, int first) {
  const int64_t D = a.D;
  vf mean[R], rstd[R], mean_a[R], mean_ax[R];
  if (NORM) {
    for (int r = 0; r < R; ++r) {
      const T *dy = (const T*)a.dy[first + r], *x = (const T*)a.x[first + r];
      mean[r] = splat(a.mean[first + r]);
      rstd[r] = splat(a.rstd[first + r]);
      vf sum_a[UNROLL] = {}, sum_ax[UNROLL] = {};
      each(D, [&](int64_t i, int k, auto lanes) {
        const vf xhat = (lanes.load(x + i) - mean[r]) * rstd[r];
        const vf v = lanes.load(dy + i) * lanes.load(a.factor + i);
        sum_a[k] += v;
        sum_ax[k] = fma(v, xhat, sum_ax[k]);
      });
      mean_a[r] = splat(a.rms ? 0.0f : sum(sum_a) / (float)D);
      mean_ax[r] = splat(sum(sum_ax) / (float)D);
    }
  }
  each(D, [&](int64_t i, int, auto lanes) {
    vf A = {}, B = {}, G = {};
    const vf factor = NORM ? lanes.load(a.factor + i) : vf{};
    const vf gate = BRANCH ? lanes.load(a.gate + i) : vf{};
    if (NORM) {
      A = lanes.load(a.A + i);
      B = lanes.load(a.B + i);
    }
    if (BRANCH) G = lanes.load(a.G + i);
    for (int r = 0; r < R; ++r) {
      vf dh = {};
      if (NORM) {
        const vf xhat = (lanes.load((const T*)a.x[first + r] + i) - mean[r]) * rstd[r];
        const vf dy = lanes.load((const T*)a.dy[first + r] + i);
        A = fma(dy, xhat, A);
        B += dy;
        const vf v = dy * factor;
        dh = fma(-xhat, mean_ax[r], v - mean_a[r]) * rstd[r];
      }
      if (DX_NEW) dh += lanes.load((const T*)a.dx_new[first + r] + i);
      lanes.store((T*)a.dx[first + r] + i, dh);
      if (BRANCH) {
        lanes.store((T*)a.dbranch[first + r] + i, gate * dh);
        G = fma(dh, lanes.load((const T*)a.branch[first + r] + i), G);
      }
    }
    if (NORM) {
      lanes.store(a.A + i, A);
      lanes.store(a.B + i, B);
    }
    if (BRANCH) lanes.store(a.G + i, G);
  });
}

template <class T, bool NORM, bool DX_NEW, bool BRANCH>
void backward_all(const NormBackward& a) {
  if (a.rows == kRows) {
    backward_rows<T, kRows, NORM, DX_NEW, BRANCH>(a, 0);
  } else if (a.rows == kFewRows) {
    backward_rows<T, kFewRows, NORM, DX_NEW, BRANCH>(a, 0);
  } else {
    for (int r = 0; r < a.rows; ++r) backward_rows<T, 1, NORM, DX_NEW, BRANCH>(a, r);
  }
}

template <class T>
void norm_backward(const NormBackward& a) {
  const bool has_new = a.dx_new[0] != nullptr, has_branch = a.branch[0] != nullptr;
  if (a.dy[0] == nullptr) {
    backward_all<T, false, true, true>(a);
  } else if (has_branch) {
    has_new ? backward_all<T, true, true, true>(a) : backward_all<T, true, false, true>(a);
  } else {
    has_new ? backward_all<T, true, true, false>(a) : backward_all<T, true, false, false>(a);
  }
}

void factor(const float* scale, const float* weight, float* out, int64_t n) {
  each(n, [&](int64_t i, int, auto lanes) {
    vf v = splat(1.0f);
    if (scale) v += lanes.load(scale + i);
    if (weight) v *= lanes.load(weight + i);
    lanes.store(out + i, v);
  });
}

void accumulate(const float* a, bool plus_one, const float* b, float* out, int64_t n) {
  const vf one = splat(plus_one ? 1.0f : 0.0f);
  each(n, [&](int64_t i, int, auto lanes) {
    vf v = lanes.load(b + i);
    if (a) v *= one + lanes.load(a + i);
    lanes.store(out + i, lanes.load(out + i) + v);
  });
}

}  // namespace
}  // namespace dblocks
