// Forward of adaln, residual_adaln and gated_residual: rows in parallel.
#include "adaln/groups.h"
#include "ops.h"

namespace dblocks {
namespace {

// x + gate*branch into a row of x's dtype.
void gated_row(
    const void* x, Dtype x_dtype, const void* branch, Dtype branch_dtype, const float* gate,
    void* out, float* scratch_x, float* scratch_branch, int64_t D) {
  const Kernels& k = kernels();
  if (x_dtype == branch_dtype) {
    k.gated_sum[x_dtype](x, branch, gate, out, D);
    return;
  }
  const float* b = as_float(branch, branch_dtype, scratch_branch, D);
  const float* a = as_float(x, x_dtype, scratch_x, D);
  float* sum = x_dtype == kFloat32 ? (float*)out : scratch_x;
  k.gated_sum[kFloat32](a, b, gate, sum, D);
  if (x_dtype != kFloat32) k.from_float[x_dtype](sum, out, D);
}

void norm_row(NormRow& r, Dtype in, Dtype out, float* scratch_out) {
  const Kernels& k = kernels();
  if (out != kFloat64) {
    k.norm[in][out](r);
    return;
  }
  void* y = r.y;
  r.y = scratch_out;
  k.norm[in][kFloat32](r);
  k.from_float[out](scratch_out, y, r.D);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_forward(
    const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool normalise,
    bool rms, double eps, ScalarType out_type) {
  check_rows("adaln_fwd_cpp", x, {{"branch", branch}},
             {{"gate", gate}, {"shift", shift}, {"scale", scale}},
             {{"weight", weight}, {"bias", bias}});
  const Groups g(x, {&gate, &shift, &scale});
  const int64_t D = g.D;
  Tensor x_new = branch ? new_like(x) : nothing(x.scalar_type());
  Tensor y = normalise ? new_like(x, out_type) : nothing(x.scalar_type());
  Tensor mean = normalise && !rms ? empty({g.N, g.T}, ScalarType::Float)
                                   : nothing(x.scalar_type());
  Tensor rstd = normalise ? empty({g.N, g.T}, ScalarType::Float) : nothing(x.scalar_type());
  const auto result = std::make_tuple(x_new, y, mean, rstd);
  if (g.N * g.T * D == 0) return result;

  const Rows in(x), add(branch), m_gate(gate), m_shift(shift), m_scale(scale), p_weight(weight),
      p_bias(bias), out_x(x_new), out_y(y);
  float *means = normalise && !rms ? (float*)mean.data_ptr() : nullptr,
        *rstds = normalise ? (float*)rstd.data_ptr() : nullptr;
  parallel(g.tasks, g.elements_per_task(), [&](int64_t begin, int64_t end) {
    Scratch scratch(7, D);
    NormRow r{};
    r.weight = channel_row(p_weight, scratch[0], D);
    r.bias = channel_row(p_bias, scratch[1], D);
    r.D = D;
    r.rms = rms;
    r.eps = (float)eps;
    r.scratch = scratch[5];
    for (int64_t task = begin; task < end; ++task) {
      g.each_group(task, [&](int64_t group, int64_t first, int64_t last) {
        const float* b_gate = modulation_row(m_gate, g, group, scratch[2]);
        r.shift = modulation_row(m_shift, g, group, scratch[3]);
        r.scale = modulation_row(m_scale, g, group, scratch[4]);
        Place at(g, g.row(group, first));
        for (int64_t row = g.row(group, first); row < g.row(group, last); ++row, at.next()) {
          r.x = in.row(at.n, at.t);
          if (add) {
            void* sum = out_x.result_row(row, D);
            gated_row(
                r.x, in.dtype, add.row(at.n, at.t), add.dtype, b_gate, sum, scratch[5], scratch[6],
                D);
            r.x = sum;
          }
          if (!normalise) continue;
          r.y = out_y.result_row(row, D);
          r.mean = means ? means + row : nullptr;
          r.rstd = rstds + row;
          norm_row(r, in.dtype, out_y.dtype, scratch[6]);
        }
      });
    }
  });
  return result;
}

}  // namespace dblocks
