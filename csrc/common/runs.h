// Runs of elements, and the blocks of a run that fit the cache, for elementwise ops.
//
// A run is a range of elements that is contiguous in every operand and inside one segment of sigma:
// the whole sample if strides allow it, else one token. A coefficient is computed once per run, and
// an element's number in the noise is run * L + its index.
#pragma once

#include "common/tensors.h"

namespace dblocks {

constexpr int64_t kBlock = 1024;      // elements: a few float32 blocks fit the L1 cache
constexpr int64_t kPerTask = 4 * kBlock;

// A tensor [N, ...] as [N, T, D]; T = 1 unless it has three dimensions.
struct Samples {
  Tensor owner;
  char* data;
  Dtype dtype;
  int64_t N, T, D, stride_n, stride_t;  // strides in elements

  explicit Samples(const Tensor& a) : owner(unit_last(a)) {
    if (owner.dim() != 3 && owner.numel() > 0 && !sample_is_dense()) {
      owner = torch::stable::contiguous(owner);
    }
    data = (char*)owner.data_ptr();
    dtype = dtype_of(owner.scalar_type());
    N = owner.size(0);
    stride_n = owner.stride(0);
    const bool tokens = owner.dim() == 3;
    T = tokens ? owner.size(1) : 1;
    D = tokens ? owner.size(2) : N ? owner.numel() / N : 0;
    stride_t = tokens ? owner.stride(1) : D;
  }

  char* at(int64_t n, int64_t t, int64_t start) const {
    return data + (n * stride_n + t * stride_t + start) * size_of(dtype);
  }

 private:
  bool sample_is_dense() const {
    int64_t step = 1;
    for (int64_t i = owner.dim() - 1; i > 0; --i) {
      if (owner.size(i) != 1 && owner.stride(i) != step) return false;
      step *= owner.size(i);
    }
    return true;
  }
};

// A small tensor [], [N], [N, S] or [N, T], read once.
struct Table {
  std::vector<double> values;
  int64_t stride_n = 0, stride_s = 0, S = 1;

  explicit Table(double value) : values{value} {}
  explicit Table(const Tensor& a) {
    const int64_t dim = a.dim(), rows = dim > 0 ? a.size(0) : 1;
    S = dim > 1 ? a.size(1) : 1;
    const int64_t step = dim > 1 ? a.stride(1) : 0, row_step = dim > 0 ? a.stride(0) : 0;
    stride_n = dim > 0 ? S : 0;
    stride_s = S > 1;
    const Dtype dtype = dtype_of(a.scalar_type());
    const char* data = (const char*)a.data_ptr();
    values.resize(rows * S);
    for (int64_t i = 0; i < rows * S; ++i) {
      const char* p = data + (i / S * row_step + i % S * step) * size_of(dtype);
      values[i] = dtype == kFloat64 ? *(const double*)p : number(p, dtype);
    }
  }
  double at(int64_t n, int64_t s) const { return values[n * stride_n + s * stride_s]; }

 private:
  static float number(const char* p, Dtype dtype) {
    float value;
    kernels().to_float[dtype](p, &value, 1);
    return value;
  }
};

// The division of operands into runs: R per sample, of L elements each, in S segments.
struct Runs {
  int64_t N, R, L, S, tokens;  // tokens in a run

  Runs(std::initializer_list<const Samples*> operands, int64_t segments, bool by_token = false)
      : S(std::max<int64_t>(segments, 1)) {
    const Samples& first = **operands.begin();
    N = first.N;
    bool dense = !by_token;
    for (const Samples* a : operands) dense = dense && (a->T == 1 || a->stride_t == a->D);
    R = dense ? S : first.T;
    tokens = R ? first.T / R : 1;
    L = tokens * first.D;
  }
  int64_t count() const { return N * R; }
  int64_t blocks() const { return (L + kBlock - 1) / kBlock; }  // of a run
};

struct Block {
  int64_t n, segment, token;  // of the run's first element
  int64_t run, start, size;   // elements start .. start + size - 1 of the run
  int64_t number;             // of the block, in all runs
};

// Calls visit(block, scratch) for every block of every run.
template <class F>
void each_block(const Runs& runs, int64_t scratch_rows, int64_t cost, const F& visit) {
  const int64_t blocks = runs.blocks(), total = runs.count() * blocks;
  const int64_t size = std::min(runs.L, kBlock);
  const int64_t per_task = std::max<int64_t>(kPerTask / std::max<int64_t>(size, 1), 1);
  const int64_t tasks = (total + per_task - 1) / per_task;
  parallel(tasks, per_task * size * cost, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_rows, kBlock);
    for (int64_t i = begin * per_task; i < std::min(end * per_task, total); ++i) {
      Block b;
      b.number = i;
      b.run = i / blocks;
      b.start = i % blocks * kBlock;
      b.size = std::min(kBlock, runs.L - b.start);
      b.n = b.run / runs.R;
      const int64_t r = b.run % runs.R;
      b.token = r * runs.tokens;
      b.segment = r / (runs.R / runs.S);
      visit(b, scratch);
    }
  });
}

inline const float* read(const Samples& a, const Block& b, float* scratch) {
  return as_float(a.at(b.n, b.token, b.start), a.dtype, scratch, b.size);
}

// Memory to compute a block of a contiguous result in: the result for float32, else scratch.
inline float* place(const Samples& out, const Runs& runs, const Block& b, float* scratch) {
  if (out.dtype != kFloat32) return scratch;
  return (float*)out.data + b.run * runs.L + b.start;
}

inline void finish(const Samples& out, const Runs& runs, const Block& b, const float* values) {
  if (out.dtype == kFloat32) return;
  char* to = out.data + (b.run * runs.L + b.start) * size_of(out.dtype);
  kernels().from_float[out.dtype](values, to, b.size);
}

}  // namespace dblocks
