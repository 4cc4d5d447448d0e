// edm_loss: the noise is regenerated block by block, and the sums of blocks are added in order.
#include "common/runs.h"
#include "edm/coefficients.h"
#include "noise/seed.h"
#include "ops.h"

namespace dblocks {
namespace {

// The weights [N] or [N, T] of the loss, or 1.
struct RowWeight {
  Table table;
  bool by_token;

  explicit RowWeight(const MaybeTensor& a)
      : table(a ? Table(*a) : Table(1)), by_token(a && a->dim() == 2) {}
  double at(int64_t n, int64_t token) const { return table.at(n, by_token ? token : 0); }
};

// The loss: operands, weights, and the blocks of f - target.
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

  // The inputs of a block's kernel, and its coefficients p and q.
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

}  // namespace dblocks
