// euler_step: elementwise, in the blocks of runs.h.
#include "common/runs.h"
#include "edm/scaled.h"
#include "ops.h"

namespace dblocks {
namespace {

// a = sigma_next / sigma of each sample and segment.
struct EulerLevels {
  Table sigma, next;
  EulerLevels(const MaybeTensor& s, const MaybeTensor& n, double value, double next_value)
      : sigma(s ? Table(*s) : Table(value)), next(n ? Table(*n) : Table(next_value)) {}
  int64_t segments() const { return std::max(sigma.S, next.S); }
  double a(const Block& b) const {
    return next.at(b.n, b.segment) / sigma.at(b.n, b.segment);
  }
};

}  // namespace

Tensor euler_step_forward(
    const Tensor& z, const Tensor& denoised, const MaybeTensor& sigma,
    const MaybeTensor& sigma_next, double sigma_value, double sigma_next_value) {
  check_noised("euler_step_fwd_cpp", {{"z", z}, {"denoised", denoised}},
               {{"sigma", sigma}, {"sigma_next", sigma_next}});
  Tensor z_next = new_like(z, ScalarType::Float);
  if (z.numel() == 0) return z_next;
  const EulerLevels levels(sigma, sigma_next, sigma_value, sigma_next_value);
  const Samples in_z(z), in_d(denoised), to(z_next);
  const Runs runs({&in_z, &in_d}, levels.segments());
  each_block(runs, 2, 1, [&](const Block& b, Scratch& scratch) {
    const double a = levels.a(b);
    const float *state = read(in_z, b, scratch[0]), *goal = read(in_d, b, scratch[1]);
    kernels().blend((float)a, state, (float)(1 - a), goal, place(to, runs, b, nullptr), b.size);
  });
  return z_next;
}

std::tuple<Tensor, Tensor> euler_step_backward(
    const Tensor& grad, const MaybeTensor& sigma, const MaybeTensor& sigma_next,
    double sigma_value, double sigma_next_value, const MaybeType& z_type,
    const MaybeType& denoised_type) {
  check_noised("euler_step_bwd_cpp", {{"grad", grad}},
               {{"sigma", sigma}, {"sigma_next", sigma_next}});
  const EulerLevels levels(sigma, sigma_next, sigma_value, sigma_next_value);
  return scaled(grad, levels.segments(), z_type, denoised_type, [&](const Block& b) {
    const double a = levels.a(b);
    return std::make_pair(a, 1 - a);
  });
}

}  // namespace dblocks
