// The row and block kernels, as a table of functions per instruction set.
//
// Kernels take plain pointers: no tensors, no threads. Arithmetic is float32; a row is float32,
// bfloat16 or float16 in memory.
#pragma once

#include <cstdint>

namespace dblocks {

// Rows have one of the first three dtypes; float64 is only converted.
enum Dtype { kFloat32, kBFloat16, kFloat16, kRowDtypes, kFloat64 = kRowDtypes, kDtypes };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// One row of adaln. weight, bias, scale and shift may be null: 1, 0, 0 and 0.
struct NormRow {
  const void* x;
  void* y;
  const float *weight, *bias, *scale, *shift;
  int64_t D;
  bool rms;
  float eps;
  float *mean, *rstd;  // written; mean not for rms, neither where null
  float* scratch;      // [D], for a row that is not float32
};

constexpr int kRows = 4;     // rows per call of the backward
constexpr int kFewRows = 2;  // if more would compete for the same cache lines

// Up to kRows rows of one modulation. With dh = d(x_new):
//   A += dy*xhat, B += dy, G += dh*branch
struct NormBackward {
  int rows;
  const void* dy[kRows];      // null: the norm has no gradient
  const void* x[kRows];       // input of the norm
  const void* dx_new[kRows];  // null: no gradient of x_new from upstream
  const void* branch[kRows];  // null: there is no branch
  void* dx[kRows];
  void* dbranch[kRows];
  float mean[kRows], rstd[kRows];
  const float* factor;  // (1 + scale) * weight, [D]
  const float* gate;    // [D]
  float *A, *B, *G;     // [D]
  int64_t D;
  bool rms;
};

struct Kernels {
  const char* name;

  void (*to_float[kDtypes])(const void* from, float* to, int64_t n);
  void (*from_float[kDtypes])(const float* from, void* to, int64_t n);

  // out = x + gate*branch; gate may be null (1).
  void (*gated_sum[kRowDtypes])(
      const void* x, const void* branch, const float* gate, void* out, int64_t n);
  void (*norm[kRowDtypes][kRowDtypes])(const NormRow&);  // by the dtypes of x and y
  void (*norm_backward[kRowDtypes])(const NormBackward&);

  // out = (1 + scale) * weight; both may be null.
  void (*factor)(const float* scale, const float* weight, float* out, int64_t n);
  // out += a * b; a may be null (1). plus_one adds 1 to a.
  void (*accumulate)(const float* a, bool plus_one, const float* b, float* out, int64_t n);

  // The normals of elements first .. first + n - 1 of the stream of seed.
  void (*normals)(float* out, int64_t n, uint64_t seed, uint64_t first);
  // out = a*x + b*y; y may be null (0). out may be x or y.
  void (*blend)(float a, const float* x, float b, const float* y, float* out, int64_t n);
  // Sum over n of rest^2, with rest = f - (p*y - q*eps), written if not null.
  float (*squared_error)(
      const float* f, const float* y, const float* eps, float p, float q, float* rest,
      int64_t n);
};

extern const Kernels kBase, kAvx2, kAvx512;

// The widest set of this processor, chosen once; DBLOCKS_CPU=base|avx2 limits it.
const Kernels& kernels();

}  // namespace dblocks
