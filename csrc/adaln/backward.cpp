// Backward of adaln, residual_adaln and gated_residual: gradients of rows, and sums over the rows
// that share a modulation.
#include "adaln/groups.h"
#include "ops.h"

namespace dblocks {
namespace {

constexpr int64_t kColumns = 512;    // of the second pass
constexpr int64_t kPage = 4096;      // bytes; addresses at this distance compete for a cache line

// Inputs and outputs of a backward pass over rows, in one dtype: that of the operands if they
// agree, else float32 in scratch rows.
class BackwardRows {
 public:
  BackwardRows(
      const Groups& g, const Rows& dy, const Rows& x, const Rows& dx_new, const Rows& branch,
      const Rows& dx, const Rows& dbranch)
      : g_(g), dy_(dy), x_(x), dx_new_(dx_new), branch_(branch), dx_(dx), dbranch_(dbranch) {
    dtype_ = (dy ? dy : dx_new).dtype;
    for (const Rows* rows : {&dy, &x, &dx_new, &branch, &dx, &dbranch})
      if (*rows && rows->dtype != dtype_) dtype_ = kFloat32;
    if (dtype_ == kFloat64) dtype_ = kFloat32;
    step_ = g.D * size_of(dtype_) % kPage == 0 ? kFewRows : kRows;
  }

  static constexpr int kScratchRows = 6 * kRows;

  void run(NormBackward& a, int64_t group, int64_t first, int64_t last, Scratch& scratch,
           const float* mean, const float* rstd) const {
    const Kernels& k = kernels();
    Place at(g_, g_.row(group, first));
    const int64_t end = g_.row(group, last);
    for (int64_t row = g_.row(group, first); row < end; row += step_) {
      a.rows = (int)std::min<int64_t>(step_, end - row);
      for (int r = 0; r < a.rows; ++r, at.next()) {
        a.dy[r] = in(dy_, at, scratch[r]);
        a.x[r] = dy_ ? in(x_, at, scratch[kRows + r]) : nullptr;
        a.dx_new[r] = in(dx_new_, at, scratch[2 * kRows + r]);
        a.branch[r] = in(branch_, at, scratch[3 * kRows + r]);
        a.dx[r] = out(dx_, row + r, scratch[4 * kRows + r]);
        a.dbranch[r] = out(dbranch_, row + r, scratch[5 * kRows + r]);
        if (dy_) {
          a.mean[r] = mean ? mean[row + r] : 0;
          a.rstd[r] = rstd[row + r];
        }
      }
      k.norm_backward[dtype_](a);
      for (int r = 0; r < a.rows; ++r) {
        finish(dx_, row + r, scratch[4 * kRows + r]);
        finish(dbranch_, row + r, scratch[5 * kRows + r]);
      }
    }
  }

 private:
  const void* in(const Rows& rows, const Place& at, float* scratch) const {
    if (!rows) return nullptr;
    const void* row = rows.row(at.n, at.t);
    return rows.dtype == dtype_ ? row : as_float(row, rows.dtype, scratch, g_.D);
  }
  void* out(const Rows& rows, int64_t row, float* scratch) const {
    return rows && rows.dtype == dtype_ ? (void*)rows.result_row(row, g_.D) : scratch;
  }
  void finish(const Rows& rows, int64_t row, const float* scratch) const {
    if (rows && rows.dtype != dtype_)
      kernels().from_float[rows.dtype](scratch, rows.result_row(row, g_.D), g_.D);
  }

  const Groups& g_;
  const Rows &dy_, &x_, &dx_new_, &branch_, &dx_, &dbranch_;
  Dtype dtype_;
  int step_;  // rows at once; the order of the sums, and so every bit, does not depend on it
};

// From the sums A, B and G of a group's rows, for `n` columns from `column` on:
//   dscale = weight*A + bias*B, dshift = B, dgate = G; and, if there is an `affine` [2, D],
//   its first row += (1 + scale)*A and its second += (1 + scale)*B
struct GroupGrads {
  const Rows &dgate, &dshift, &dscale;
  const float *weight, *bias;
  int64_t D;

  void write(int64_t group, const float* A, const float* B, const float* G, const float* scale,
             float* affine, float* scratch, int64_t column, int64_t n) const {
    const Kernels& k = kernels();
    put(dgate, group, G, column, n);
    put(dshift, group, B, column, n);
    if (dscale) {
      std::memset(scratch, 0, n * sizeof(float));
      k.accumulate(weight ? weight + column : nullptr, false, A, scratch, n);
      if (bias) k.accumulate(bias + column, false, B, scratch, n);
      put(dscale, group, scratch, column, n);
    }
    if (affine == nullptr) return;
    k.accumulate(scale ? scale + column : nullptr, true, A, affine + column, n);
    k.accumulate(scale ? scale + column : nullptr, true, B, affine + D + column, n);
  }

 private:
  void put(const Rows& to, int64_t group, const float* from, int64_t column, int64_t n) const {
    if (!to) return;
    char* row = to.result_row(group, D) + column * size_of(to.dtype);
    kernels().from_float[to.dtype](from, row, n);
  }
};

std::optional<Tensor> grad_of(const std::optional<Tensor>& a, bool needed) {
  if (!needed || !a) return std::nullopt;
  return new_like(*a);
}

// out[d] = sum over `parts` of from[part * stride + d], in order, in the dtype of out.
void sum_parts(const float* from, int64_t parts, int64_t stride, const Rows& out, int64_t D) {
  const Kernels& k = kernels();
  const int64_t blocks = (D + kColumns - 1) / kColumns;
  parallel(blocks, parts * kColumns, [&](int64_t begin, int64_t end) {
    float total[kColumns];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t column = b * kColumns, n = std::min(kColumns, D - column);
      std::memset(total, 0, sizeof total);
      for (int64_t p = 0; p < parts; ++p)
        k.accumulate(nullptr, false, from + p * stride + column, total, n);
      k.from_float[out.dtype](total, out.data + column * size_of(out.dtype), n);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward(
    const std::optional<Tensor>& dy_, const std::optional<Tensor>& dx_new_, const Tensor& x_,
    const std::optional<Tensor>& branch_, const std::optional<Tensor>& gate_,
    const std::optional<Tensor>& shift_, const std::optional<Tensor>& scale_,
    const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& mean_, const std::optional<Tensor>& rstd_, bool rms,
    const std::vector<bool>& needs) {
  constexpr const char* kOp = "adaln_bwd_cpp";
  check_rows(kOp, x_, {{"dy", dy_}, {"dx_new", dx_new_}, {"branch", branch_}},
             {{"gate", gate_}, {"shift", shift_}, {"scale", scale_}},
             {{"weight", weight_}, {"bias", bias_}});
  STD_TORCH_CHECK(dy_ || dx_new_, kOp, ": one of dy and dx_new must be a tensor");
  STD_TORCH_CHECK(needs.size() == 7, kOp, ": needs must have 7 elements, got ", needs.size());
  if (dy_) check_statistics(kOp, x_, {"rstd", rstd_});
  if (dy_ && !rms) check_statistics(kOp, x_, {"mean", mean_});
  const std::optional<Tensor> inputs[7] = {x_, branch_, gate_, shift_, scale_, weight_, bias_};
  std::optional<Tensor> grads[7];
  for (int i = 0; i < 7; ++i) grads[i] = grad_of(inputs[i], needs[i]);
  const auto result = [&] {
    const auto at = [&](int i) { return grads[i] ? *grads[i] : nothing(x_.scalar_type()); };
    return std::make_tuple(at(0), at(1), at(2), at(3), at(4), at(5), at(6));
  };
  const Groups g(x_, {&gate_, &shift_, &scale_});
  const int64_t D = g.D;
  if (g.N * g.T * D == 0) {
    for (auto& grad : grads)
      if (grad) torch::stable::zero_(*grad);
    return result();
  }

  const bool sums_branch = grads[1] || grads[2];
  const Rows dy(dy_), dx_new(dx_new_), x(x_), gate(gate_), scale(scale_), weight(weight_),
      bias(bias_), dx(grads[0]), dbranch(grads[1]), dgate(grads[2]), dshift(grads[3]),
      dscale(grads[4]), dweight(grads[5]), dbias(grads[6]);
  const Rows branch = sums_branch ? Rows(branch_) : Rows();
  const float* mean = dy && !rms ? (const float*)mean_->data_ptr() : nullptr;
  const float* rstd = dy ? (const float*)rstd_->data_ptr() : nullptr;
  const BackwardRows rows(g, dy, x, dx_new, branch, dx, dbranch);
  const bool affine = dweight || dbias, partial = g.chunks > 1;
  // Not a vector: tasks clear their own parts in parallel.
  const std::unique_ptr<float[]> sums(partial ? new float[g.tasks * 3 * D] : nullptr);
  std::vector<float> affine_sums(affine ? (partial ? g.count : g.tasks) * 2 * D : 0);
  Scratch shared(2, D);
  const GroupGrads finish{
      dgate, dshift, dscale, channel_row(weight, shared[0], D), channel_row(bias, shared[1], D), D};

  parallel(g.tasks, g.elements_per_task(), [&](int64_t begin, int64_t end) {
    Scratch scratch(BackwardRows::kScratchRows, D), own(7, D);
    NormBackward a{};
    a.D = D;
    a.rms = rms;
    a.factor = own[0];
    for (int64_t task = begin; task < end; ++task) {
      float* to_affine = affine && !partial ? affine_sums.data() + task * 2 * D : nullptr;
      g.each_group(task, [&](int64_t group, int64_t first, int64_t last) {
        const float* b_scale = modulation_row(scale, g, group, own[1]);
        if (dy) kernels().factor(b_scale, finish.weight, own[0], D);
        if (branch) {
          a.gate = modulation_row(gate, g, group, own[2]);
          if (a.gate == nullptr) {
            std::fill_n(own[2], D, 1.0f);
            a.gate = own[2];
          }
        }
        a.A = partial ? sums.get() + task * 3 * D : own[3];
        a.B = partial ? a.A + D : own[4];
        a.G = partial ? a.B + D : own[5];
        for (float* total : {a.A, a.B, a.G}) std::memset(total, 0, D * sizeof(float));
        rows.run(a, group, first, last, scratch, mean, rstd);
        if (!partial)
          finish.write(group, a.A, a.B, a.G, b_scale, to_affine, own[6], 0, D);
      });
    }
  });

  if (partial) {
    const int64_t blocks = (D + kColumns - 1) / kColumns;
    parallel(g.count * blocks, g.chunks * 3 * kColumns, [&](int64_t begin, int64_t end) {
      float totals[3][kColumns], spare[kColumns];
      Scratch own(1, D);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit / blocks, column = unit % blocks * kColumns;
        const int64_t n = std::min(kColumns, D - column);
        std::memset(totals, 0, sizeof totals);
        for (int64_t c = 0; c < g.chunks; ++c)
          for (int i = 0; i < 3; ++i) {
            const float* part = sums.get() + ((group * g.chunks + c) * 3 + i) * D + column;
            kernels().accumulate(nullptr, false, part, totals[i], n);
          }
        float* to_affine = affine ? affine_sums.data() + group * 2 * D : nullptr;
        const float* b_scale = affine ? modulation_row(scale, g, group, own[0]) : nullptr;
        finish.write(
            group, totals[0], totals[1], totals[2], b_scale, to_affine, spare, column, n);
      }
    });
  }
  if (affine) {
    const int64_t parts = (int64_t)affine_sums.size() / (2 * D);
    if (dweight) sum_parts(affine_sums.data(), parts, 2 * D, dweight, D);
    if (dbias) sum_parts(affine_sums.data() + D, parts, 2 * D, dbias, D);
  }
  return result();
}

}  // namespace dblocks
