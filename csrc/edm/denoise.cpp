// edm_denoise: elementwise, in the blocks of runs.h.
#include "common/runs.h"
#include "edm/coefficients.h"
#include "edm/scaled.h"
#include "ops.h"

namespace dblocks {

Tensor edm_denoise_forward(
    const Tensor& f, const Tensor& z, const Tensor& sigma, double sigma_data) {
  check_noised("edm_denoise_fwd_cpp", {{"f", f}, {"z", z}}, {{"sigma", sigma}});
  Tensor denoised = new_like(z, ScalarType::Float);
  if (z.numel() == 0) return denoised;
  const Table levels(sigma);
  const Samples in_f(f), in_z(z), to(denoised);
  const Runs runs({&in_f, &in_z}, levels.S);
  each_block(runs, 2, 1, [&](const Block& b, Scratch& scratch) {
    const Coefficients c(levels.at(b.n, b.segment), sigma_data);
    const float *raw = read(in_f, b, scratch[0]), *noised = read(in_z, b, scratch[1]);
    kernels().blend((float)c.out, raw, (float)c.skip, noised, place(to, runs, b, nullptr), b.size);
  });
  return denoised;
}

std::tuple<Tensor, Tensor> edm_denoise_backward(
    const Tensor& grad, const Tensor& sigma, double sigma_data, const MaybeType& f_type,
    const MaybeType& z_type) {
  check_noised("edm_denoise_bwd_cpp", {{"grad", grad}}, {{"sigma", sigma}});
  const Table levels(sigma);
  return scaled(grad, levels.S, f_type, z_type, [&](const Block& b) {
    const Coefficients c(levels.at(b.n, b.segment), sigma_data);
    return std::make_pair(c.out, c.skip);
  });
}

}  // namespace dblocks
