// The backward of a linear combination: two gradients, each a multiple of the upstream gradient.
#pragma once

#include "common/runs.h"
#include "ops.h"

namespace dblocks {

// out = factor(n, segment) * grad, for each of the two gradients that is needed.
template <class F>
std::tuple<Tensor, Tensor> scaled(
    const Tensor& grad, int64_t S, const MaybeType& type_a, const MaybeType& type_b,
    const F& factors) {
  Tensor a = type_a ? new_like(grad, *type_a) : nothing(ScalarType::Float);
  Tensor b = type_b ? new_like(grad, *type_b) : nothing(ScalarType::Float);
  if (grad.numel() == 0) return {a, b};
  const Samples in(grad), to_a(a), to_b(b);
  const Runs runs({&in}, S);
  each_block(runs, 3, 1, [&](const Block& block, Scratch& scratch) {
    const float* g = read(in, block, scratch[0]);
    const auto [factor_a, factor_b] = factors(block);
    const auto write = [&](const Samples& to, double factor, float* own) {
      float* values = place(to, runs, block, own);
      kernels().blend((float)factor, g, 0, nullptr, values, block.size);
      finish(to, runs, block, values);
    };
    if (type_a) write(to_a, factor_a, scratch[1]);
    if (type_b) write(to_b, factor_b, scratch[2]);
  });
  return {a, b};
}

}  // namespace dblocks
