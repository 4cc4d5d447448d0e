// noise_inject, edm_denoise, edm_loss and euler_step: elementwise, in the blocks of runs.h.
#include <cmath>

#include "ops.h"
#include "runs.h"
#include "tensors.h"

namespace dblocks {
namespace {

constexpr int64_t kNoiseCost = 8;     // of an element's noise, in copies of an element

uint64_t seed_of(const std::optional<Tensor>& seed, int64_t number) {
  check_seed({"seed", seed});
  return seed ? *(const uint64_t*)seed->data_ptr() : (uint64_t)number;
}

// The coefficients of Karras et al. 2022, table 1.
struct Coefficients {
  double skip, out, in, target_y, target_eps;

  Coefficients(double sigma, double sigma_data) {
    const double total = sigma * sigma + sigma_data * sigma_data;
    in = 1 / std::sqrt(total);
    skip = sigma_data * sigma_data / total;
    out = sigma * sigma_data * in;
    target_y = in * sigma / sigma_data;
    target_eps = in * sigma_data;
  }
};

// out = factor(n, segment) * grad, for each of two gradients that is wanted.
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

}  // namespace

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

namespace {

// Factors [N] or [N, T] of the loss, or 1.
struct RowWeight {
  Table table;
  bool by_token;

  explicit RowWeight(const MaybeTensor& a)
      : table(a ? Table(*a) : Table(1)), by_token(a && a->dim() == 2) {}
  double at(int64_t n, int64_t token) const { return table.at(n, by_token ? token : 0); }
};

// The loss: operands, weights, and what f - target is made of in blocks.
struct LossProblem {
  Samples f, y;
  Table levels;
  RowWeight weight;
  Runs runs;
  uint64_t key;
  int64_t offset;
  double sigma_data;

  LossProblem(
      const Tensor& f_, const Tensor& y_, const Tensor& sigma, const MaybeTensor& seed,
      int64_t number, int64_t offset_, double sigma_data_, const MaybeTensor& row_weight)
      : f(f_), y(y_), levels(sigma), weight(row_weight),
        runs({&f, &y}, levels.S, weight.by_token), key(seed_of(seed, number)), offset(offset_),
        sigma_data(sigma_data_) {}

  // What a block's kernel reads, and its coefficients p and q.
  std::tuple<const float*, const float*, const float*, float, float> block(
      const Block& b, Scratch& scratch) const {
    const Coefficients c(levels.at(b.n, b.segment), sigma_data);
    kernels().normals(scratch[0], b.size, key, (uint64_t)(offset + b.run * runs.L + b.start));
    return {read(f, b, scratch[1]), read(y, b, scratch[2]), scratch[0], (float)c.target_y,
            (float)c.target_eps};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> edm_loss_forward(
    const Tensor& f, const Tensor& y, const Tensor& sigma, const MaybeTensor& seed,
    int64_t seed_number, int64_t offset, double sigma_data, const MaybeTensor& row_weight,
    bool need_rest) {
  check_noised("edm_loss_fwd_cpp", {{"f", f}, {"y", y}}, {{"sigma", sigma}});
  check_weight("edm_loss_fwd_cpp", y, {"row_weight", row_weight});
  Tensor loss = empty({y.size(0)}, ScalarType::Float);
  // The range of float16 is too small for f - target.
  const bool narrow = f.scalar_type() == ScalarType::BFloat16;
  const ScalarType type = narrow ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor rest = need_rest ? new_like(f, type) : nothing(type);
  float* out = (float*)loss.data_ptr();
  if (y.numel() == 0) {
    std::fill_n(out, y.size(0), 0.0f);
    return {loss, rest};
  }
  const LossProblem problem(f, y, sigma, seed, seed_number, offset, sigma_data, row_weight);
  const Samples to(rest);
  const Runs& runs = problem.runs;
  std::vector<float> sums(runs.count() * runs.blocks());
  each_block(runs, 4, kNoiseCost, [&](const Block& b, Scratch& scratch) {
    const auto [in_f, in_y, eps, p, q] = problem.block(b, scratch);
    float* values = need_rest ? place(to, runs, b, scratch[3]) : nullptr;
    sums[b.number] = kernels().squared_error(in_f, in_y, eps, p, q, values, b.size);
    if (need_rest) finish(to, runs, b, values);
  });
  const float* sum = sums.data();
  for (int64_t n = 0; n < runs.N; ++n) {
    double total = 0;
    for (int64_t r = 0; r < runs.R; ++r) {
      double of_run = 0;
      for (int64_t i = 0; i < runs.blocks(); ++i) of_run += *sum++;
      total += problem.weight.at(n, r * runs.tokens) * of_run;
    }
    out[n] = (float)(total / (double)(runs.R * runs.L));
  }
  return {loss, rest};
}

Tensor edm_loss_backward(
    const Tensor& grad, const Tensor& rest, const MaybeTensor& row_weight, ScalarType type) {
  check_noised("edm_loss_bwd_cpp", {{"rest", rest}}, {});
  check_weight("edm_loss_bwd_cpp", rest, {"row_weight", row_weight});
  check_per_sample("edm_loss_bwd_cpp", rest, {"grad", grad});
  Tensor df = new_like(rest, type);
  if (rest.numel() == 0) return df;
  const RowWeight weight(row_weight);
  const Table upstream(grad);
  const Samples in(rest), to(df);
  const Runs runs({&in}, 1, weight.by_token);
  const double scale = 2.0 / (double)(runs.R * runs.L);
  each_block(runs, 2, 1, [&](const Block& b, Scratch& scratch) {
    const double k = scale * upstream.at(b.n, 0) * weight.at(b.n, b.token);
    float* values = place(to, runs, b, scratch[1]);
    kernels().blend((float)k, read(in, b, scratch[0]), 0, nullptr, values, b.size);
    finish(to, runs, b, values);
  });
  return df;
}

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
