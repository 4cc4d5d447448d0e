// noise_inject, edm_denoise, edm_loss and euler_step: elementwise, in blocks that fit the cache.
//
// A run is a stretch of elements that is contiguous in every operand and lies in one segment of
// sigma: the whole sample where memory allows it, else one token. So a coefficient is computed once
// a run, and an element's number in the noise is run * L + its place.
#include <cmath>

#include "ops.h"
#include "tensors.h"

namespace dblocks {
namespace {

constexpr int64_t kBlock = 1024;      // elements: a few blocks in float32 fit the first cache
constexpr int64_t kPerTask = 4 * kBlock;
constexpr int64_t kNoiseCost = 8;     // of an element's noise, in copies of an element

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

// How the operands fall into runs: R of them a sample, of L elements each, in S segments.
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
  int64_t number;             // of the block among all
};

// visit(block, scratch) for every block of every run.
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

const float* read(const Samples& a, const Block& b, float* scratch) {
  return as_float(a.at(b.n, b.token, b.start), a.dtype, scratch, b.size);
}

// Where a block of a contiguous result is computed: in place for float32, else in scratch.
float* place(const Samples& out, const Runs& runs, const Block& b, float* scratch) {
  if (out.dtype != kFloat32) return scratch;
  return (float*)out.data + b.run * runs.L + b.start;
}

void finish(const Samples& out, const Runs& runs, const Block& b, const float* values) {
  if (out.dtype == kFloat32) return;
  char* to = out.data + (b.run * runs.L + b.start) * size_of(out.dtype);
  kernels().from_float[out.dtype](values, to, b.size);
}

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

// What the loss and its backward have in common: operands, weights, and f - target in blocks.
struct LossProblem {
  Samples f, y;
  Table levels;
  std::optional<Table> weight;
  bool by_token;
  Runs runs;
  uint64_t key;
  int64_t offset;
  double sigma_data;

  LossProblem(
      const Tensor& f_, const Tensor& y_, const Tensor& sigma, const MaybeTensor& seed,
      int64_t number, int64_t offset_, double sigma_data_, const MaybeTensor& row_weight)
      : f(f_), y(y_), levels(sigma),
        weight(row_weight ? std::optional<Table>(Table(*row_weight)) : std::nullopt),
        by_token(row_weight && row_weight->dim() == 2), runs({&f, &y}, levels.S, by_token),
        key(seed_of(seed, number)), offset(offset_), sigma_data(sigma_data_) {}

  int64_t elements() const { return runs.R * runs.L; }  // of a sample
  double weight_of(int64_t n, int64_t token) const {
    return weight ? weight->at(n, by_token ? token : 0) : 1;
  }
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

Tensor edm_loss_forward(
    const Tensor& f, const Tensor& y, const Tensor& sigma, const MaybeTensor& seed,
    int64_t seed_number, int64_t offset, double sigma_data, const MaybeTensor& row_weight) {
  check_loss("edm_loss_fwd_cpp", f, y, sigma, {"row_weight", row_weight});
  Tensor loss = empty({y.size(0)}, ScalarType::Float);
  float* out = (float*)loss.data_ptr();
  if (y.numel() == 0) {
    std::fill_n(out, y.size(0), 0.0f);
    return loss;
  }
  const LossProblem problem(f, y, sigma, seed, seed_number, offset, sigma_data, row_weight);
  const Runs& runs = problem.runs;
  std::vector<float> sums(runs.count() * runs.blocks());
  each_block(runs, 3, kNoiseCost, [&](const Block& b, Scratch& scratch) {
    const auto [in_f, in_y, eps, p, q] = problem.block(b, scratch);
    sums[b.number] = kernels().squared_error(in_f, in_y, eps, p, q, b.size);
  });
  const float* sum = sums.data();
  for (int64_t n = 0; n < runs.N; ++n) {
    double total = 0;
    for (int64_t r = 0; r < runs.R; ++r) {
      double of_run = 0;
      for (int64_t i = 0; i < runs.blocks(); ++i) of_run += *sum++;
      total += problem.weight_of(n, r * runs.tokens) * of_run;
    }
    out[n] = (float)(total / (double)problem.elements());
  }
  return loss;
}

Tensor edm_loss_backward(
    const Tensor& grad, const Tensor& f, const Tensor& y, const Tensor& sigma,
    const MaybeTensor& seed, int64_t seed_number, int64_t offset, double sigma_data,
    const MaybeTensor& row_weight) {
  check_loss("edm_loss_bwd_cpp", f, y, sigma, {"row_weight", row_weight});
  check_per_sample("edm_loss_bwd_cpp", y, {"grad", grad});
  Tensor df = new_like(f);
  if (y.numel() == 0) return df;
  const LossProblem problem(f, y, sigma, seed, seed_number, offset, sigma_data, row_weight);
  const Table upstream(grad);
  const Samples to(df);
  const double scale = 2.0 / (double)problem.elements();
  each_block(problem.runs, 4, kNoiseCost, [&](const Block& b, Scratch& scratch) {
    const auto [in_f, in_y, eps, p, q] = problem.block(b, scratch);
    const double k = scale * upstream.at(b.n, 0) * problem.weight_of(b.n, b.token);
    float* values = place(to, problem.runs, b, scratch[3]);
    kernels().error(in_f, in_y, eps, p, q, (float)k, values, b.size);
    finish(to, problem.runs, b, values);
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
