// Checks of an op's tensors before it reads them: an op may be called by name, without the checks
// of the public function.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace dblocks {

// A tensor argument and its name in messages; absent if `tensor` is null.
struct Argument {
  const char* name;
  const torch::stable::Tensor* tensor;

  Argument(const char* n, const torch::stable::Tensor& a) : name(n), tensor(&a) {}
  Argument(const char* n, const std::optional<torch::stable::Tensor>& a)
      : name(n), tensor(a ? &*a : nullptr) {}
};
using Arguments = std::initializer_list<Argument>;

// x is [N, T, D] and not float64, the rows have its shape, modulations are [N, D] or [N, S, D] of
// one S that divides T, and channels [D]; all are floating tensors on the CPU.
void check_rows(const char* op, const torch::stable::Tensor& x, const Arguments& rows,
                const Arguments& modulation, const Arguments& channels);

// Contiguous float32 [N, T], for x [N, T, D].
void check_statistics(const char* op, const torch::stable::Tensor& x, const Argument& statistics);

// The samples are floating tensors [N, ...] of one shape, the levels [], [N], or, for [N, T, D],
// [N, S] of one S that divides T.
void check_noised(const char* op, const Arguments& samples, const Arguments& levels);

// The weights are [N], [N, T] for y [N, T, D], or absent.
void check_weight(const char* op, const torch::stable::Tensor& y, const Argument& weight);

// [N] for x [N, ...].
void check_per_sample(const char* op, const torch::stable::Tensor& x, const Argument& values);

// One int64 number on the CPU.
void check_seed(const Argument& seed);

}  // namespace dblocks
