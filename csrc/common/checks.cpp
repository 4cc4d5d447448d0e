// Checks of the ops' tensors. The public functions check first, with better messages.
#include "common/checks.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace dblocks {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& a) {
  std::string text = "[";
  for (int64_t i = 0; i < a.dim(); ++i) text += (i ? ", " : "") + std::to_string(a.size(i));
  return text + "]";
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

void check_floating(const char* op, const Argument& a) {
  const ScalarType type = a.tensor->scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
          type == ScalarType::Double,
      op, ": ", a.name, " must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(a.tensor->is_cpu(), op, ": ", a.name, " must be on the CPU");
}

// Whether S segments divide T tokens.
bool divides(int64_t S, int64_t T) { return S > 0 ? T % S == 0 : T == 0; }

void check_samples(const char* op, const Arguments& samples) {
  const Argument& first = *samples.begin();
  for (const Argument& a : samples) {
    if (!a.tensor) continue;
    check_floating(op, a);
    STD_TORCH_CHECK(a.tensor->dim() > 0, op, ": ", a.name, " must have shape [N, ...], got []");
    STD_TORCH_CHECK(same_shape(*a.tensor, *first.tensor), op, ": ", a.name,
                    " must have the shape of ", first.name, ", ", shape_of(*first.tensor), ", got ",
                    shape_of(*a.tensor));
  }
}

void check_levels(const char* op, const Tensor& x, const Arguments& levels) {
  int64_t segments = 1;
  for (const Argument& a : levels) {
    if (!a.tensor) continue;
    check_floating(op, a);
    const Tensor& s = *a.tensor;
    const int64_t dim = s.dim(), S = dim == 2 ? s.size(1) : 1;
    STD_TORCH_CHECK(
        dim == 0 || (dim <= 2 && s.size(0) == x.size(0) &&
                     (dim == 1 || (x.dim() == 3 && divides(S, x.size(1))))),
        op, ": ", a.name, " must be 0-d, [N], or [N, S] with an S that divides T, of tensors ",
        shape_of(x), ", got ", shape_of(s));
    STD_TORCH_CHECK(S == 1 || segments == 1 || S == segments, op, ": ", a.name, " must have ",
                    segments, " segments as the other has, got ", S);
    if (S != 1) segments = S;
  }
}

}  // namespace

void check_rows(const char* op, const Tensor& x, const Arguments& rows,
                const Arguments& modulation, const Arguments& channels) {
  check_floating(op, {"x", x});
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, op, ": x must not be float64");
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have shape [N, T, D], got ", shape_of(x));
  const int64_t N = x.size(0), T = x.size(1), D = x.size(2);
  for (const Argument& a : rows) {
    if (!a.tensor) continue;
    check_floating(op, a);
    STD_TORCH_CHECK(same_shape(*a.tensor, x), op, ": ", a.name, " must have the shape of x, ",
                    shape_of(x), ", got ", shape_of(*a.tensor));
  }
  int64_t segments = -1;
  for (const Argument& a : modulation) {
    if (!a.tensor) continue;
    check_floating(op, a);
    const Tensor& m = *a.tensor;
    const int64_t dim = m.dim(), S = dim == 3 ? m.size(1) : 1;
    STD_TORCH_CHECK(
        (dim == 2 || dim == 3) && m.size(0) == N && m.size(dim - 1) == D && divides(S, T), op, ": ",
        a.name, " must have shape [N, D] or [N, S, D] with an S that divides T, of x ", shape_of(x),
        ", got ", shape_of(m));
    STD_TORCH_CHECK(segments < 0 || S == segments, op, ": ", a.name, " must have ", segments,
                    " segments as the others have, got ", S);
    segments = S;
  }
  for (const Argument& a : channels) {
    if (!a.tensor) continue;
    check_floating(op, a);
    STD_TORCH_CHECK(a.tensor->dim() == 1 && a.tensor->size(0) == D, op, ": ", a.name,
                    " must have shape [D] = [", D, "], got ", shape_of(*a.tensor));
  }
}

void check_statistics(const char* op, const Tensor& x, const Argument& a) {
  STD_TORCH_CHECK(a.tensor, op, ": ", a.name, " must be a tensor");
  const Tensor& s = *a.tensor;
  STD_TORCH_CHECK(
      s.is_cpu() && s.scalar_type() == ScalarType::Float && s.dim() == 2 &&
          s.size(0) == x.size(0) && s.size(1) == x.size(1) && s.is_contiguous(),
      op, ": ", a.name, " must be contiguous float32 [N, T] of x ", shape_of(x), ", got ",
      shape_of(s));
}

void check_per_sample(const char* op, const Tensor& x, const Argument& a) {
  check_floating(op, a);
  STD_TORCH_CHECK(a.tensor->dim() == 1 && a.tensor->size(0) == x.size(0), op, ": ", a.name,
                  " must have shape [N] = [", x.size(0), "], got ", shape_of(*a.tensor));
}

void check_noised(const char* op, const Arguments& samples, const Arguments& levels) {
  check_samples(op, samples);
  check_levels(op, *samples.begin()->tensor, levels);
}

void check_weight(const char* op, const Tensor& y, const Argument& weight) {
  if (!weight.tensor) return;
  if (weight.tensor->dim() != 2) return check_per_sample(op, y, weight);
  check_floating(op, weight);
  const Tensor& w = *weight.tensor;
  STD_TORCH_CHECK(y.dim() == 3 && w.size(0) == y.size(0) && w.size(1) == y.size(1), op, ": ",
                  weight.name, " must have shape [N], or [N, T] of [N, T, D], for ", shape_of(y),
                  ", got ", shape_of(w));
}

void check_seed(const Argument& a) {
  if (!a.tensor) return;
  STD_TORCH_CHECK(a.tensor->is_cpu() && a.tensor->scalar_type() == ScalarType::Long &&
                      a.tensor->dim() == 0,
                  "dblocks: ", a.name, " must be a 0-d int64 tensor on the CPU, got ",
                  shape_of(*a.tensor));
}

}  // namespace dblocks
