// Shared by all ops: operands as pointers and strides, outputs, and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/kernels.h"

namespace dblocks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 32768;  // below this, waking a thread costs more

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, "dblocks: the C++ ops take floating dtypes only");
  }
}

inline int64_t size_of(Dtype dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) {
  int64_t strides[64];  // PyTorch's own limit of dimensions
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(sizes.begin(), (int64_t)sizes.size(), type);
}

inline Tensor new_like(const Tensor& a, ScalarType type) {
  const auto sizes = a.sizes();
  return empty(sizes.data(), (int64_t)sizes.size(), type);
}

inline Tensor new_like(const Tensor& a) { return new_like(a, a.scalar_type()); }

// A tensor without elements, for a result that is not needed.
inline Tensor nothing(ScalarType type) { return empty({0}, type); }

// The tensor with a last stride of 1; a copy if it has another.
inline Tensor unit_last(const Tensor& a) {
  const int64_t last = a.dim() - 1;
  if (last < 0 || a.stride(last) == 1 || a.size(last) <= 1) return a;
  return torch::stable::contiguous(a);
}

// The rows of a tensor [N, T, D], or of [N, D] with T = 1; absent without a tensor.
struct Rows {
  std::optional<Tensor> owner;
  char* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t stride_n = 0, stride_t = 0;  // in bytes

  Rows() = default;
  explicit Rows(const Tensor& a) : owner(unit_last(a)) {
    dtype = dtype_of(owner->scalar_type());
    data = (char*)owner->data_ptr();
    const int64_t dim = owner->dim(), size = size_of(dtype);
    stride_n = dim > 1 ? owner->stride(0) * size : 0;
    stride_t = dim > 2 ? owner->stride(1) * size : 0;
  }
  explicit Rows(const std::optional<Tensor>& a) {
    if (a) *this = Rows(*a);
  }

  explicit operator bool() const { return owner.has_value(); }
  char* row(int64_t n, int64_t t) const { return data + n * stride_n + t * stride_t; }
  // Row i of a contiguous result.
  char* result_row(int64_t i, int64_t D) const { return data + i * D * size_of(dtype); }
};

// A row in float32: the row itself, or converted into `scratch`.
inline const float* as_float(const void* row, Dtype dtype, float* scratch, int64_t n) {
  if (dtype == kFloat32) return (const float*)row;
  kernels().to_float[dtype](row, scratch, n);
  return scratch;
}

// Runs f(begin, end) over `tasks` in parallel; each task takes as long as copying about `elements`
// elements. A task must not depend on those it shares a call with, so that results do not depend on
// the number of threads.
template <class F>
void parallel(int64_t tasks, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(elements, 1), 1);
  if (tasks <= grain) {
    if (tasks > 0) f(0, tasks);
    return;
  }
  torch::stable::parallel_for(0, tasks, grain, f);
}

// Scratch rows of floats for a thread, aligned to a cache line.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t n) : stride_((n + 15) / 16 * 16), data_(new float[rows * stride_ + 16]) {
    const uintptr_t at = (uintptr_t)data_.get();
    first_ = data_.get() + (64 - at % 64) % 64 / 4;
  }
  float* operator[](int64_t row) { return first_ + row * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float[]> data_;
  float* first_;
};

}  // namespace dblocks
