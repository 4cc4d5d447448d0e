// noise_inject: elementwise, in the blocks of runs.h.
#include "common/runs.h"
#include "edm/coefficients.h"
#include "noise/seed.h"
#include "ops.h"

namespace dblocks {

std::tuple<Tensor, Tensor> noise_inject_forward(
    const Tensor& y, const Tensor& sigma, const MaybeTensor& seed, int64_t seed_number,
    int64_t offset, double sigma_data, ScalarType type, bool need_z) {
  check_noised("noise_inject_fwd_cpp", {{"y", y}}, {{"sigma", sigma}});
  Tensor z = need_z ? new_like(y, ScalarType::Float) : nothing(ScalarType::Float);
  Tensor z_in = new_like(y, type);
  if (y.numel() == 0) return {z, z_in};
  const Samples in(y), to_z(z), to_in(z_in);
  const Table levels(sigma);
  const Runs runs({&in}, levels.S);
  const uint64_t key = seed_of(seed, seed_number);
  each_block(runs, 3, kNoiseCost, [&](const Block& b, Scratch& scratch) {
    const Kernels& k = kernels();
    const double s = levels.at(b.n, b.segment);
    float* noised = need_z ? place(to_z, runs, b, scratch[0]) : scratch[0];
    k.normals(scratch[1], b.size, key, (uint64_t)(offset + b.run * runs.L + b.start));
    const float* clean = read(in, b, scratch[2]);
    k.blend((float)s, scratch[1], 1, clean, noised, b.size);
    float* values = place(to_in, runs, b, scratch[1]);
    k.blend((float)Coefficients(s, sigma_data).in, noised, 0, nullptr, values, b.size);
    finish(to_in, runs, b, values);
  });
  return {z, z_in};
}

Tensor noise_inject_backward(
    const MaybeTensor& dz, const Tensor& dz_in, const Tensor& sigma, double sigma_data,
    ScalarType type) {
  check_noised("noise_inject_bwd_cpp", {{"dz_in", dz_in}, {"dz", dz}}, {{"sigma", sigma}});
  Tensor dy = new_like(dz_in, type);
  if (dz_in.numel() == 0) return dy;
  const Table levels(sigma);
  const Samples in(dz_in), direct(dz ? *dz : dz_in), to(dy);
  const Runs runs({&in, &direct}, levels.S);
  each_block(runs, 3, 1, [&](const Block& b, Scratch& scratch) {
    const double c_in = Coefficients(levels.at(b.n, b.segment), sigma_data).in;
    const float* g = read(in, b, scratch[0]);
    const float* added = dz ? read(direct, b, scratch[1]) : nullptr;
    float* values = place(to, runs, b, scratch[2]);
    kernels().blend((float)c_in, g, 1, added, values, b.size);
    finish(to, runs, b, values);
  });
  return dy;
}

}  // namespace dblocks
