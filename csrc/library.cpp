// Registers the ops for CPU tensors. Their schemas are defined in dblocks/ops, with those of the
// Triton ops; importing dblocks._C loads this library.
#include <torch/csrc/stable/library.h>

#include "common/kernels.h"
#include "ops.h"

namespace {

// Version of the schemas and their meaning; dblocks/ops/_extension.py must have the same number.
constexpr int64_t kVersion = 2;

int64_t cpp_version() { return kVersion; }

std::string cpu_set() { return dblocks::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dblocks, m) {
  m.def("cpp_version() -> int");
  m.def("cpu_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dblocks, CompositeExplicitAutograd, m) {
  m.impl("cpp_version", TORCH_BOX(&cpp_version));
  m.impl("cpu_set", TORCH_BOX(&cpu_set));
}

STABLE_TORCH_LIBRARY_IMPL(dblocks, CPU, m) {
  m.impl("adaln_fwd_cpp", TORCH_BOX(&dblocks::adaln_forward));
  m.impl("adaln_bwd_cpp", TORCH_BOX(&dblocks::adaln_backward));
  m.impl("noise_inject_fwd_cpp", TORCH_BOX(&dblocks::noise_inject_forward));
  m.impl("noise_inject_bwd_cpp", TORCH_BOX(&dblocks::noise_inject_backward));
  m.impl("edm_denoise_fwd_cpp", TORCH_BOX(&dblocks::edm_denoise_forward));
  m.impl("edm_denoise_bwd_cpp", TORCH_BOX(&dblocks::edm_denoise_backward));
  m.impl("edm_loss_fwd_cpp", TORCH_BOX(&dblocks::edm_loss_forward));
  m.impl("edm_loss_bwd_cpp", TORCH_BOX(&dblocks::edm_loss_backward));
  m.impl("euler_step_fwd_cpp", TORCH_BOX(&dblocks::euler_step_forward));
  m.impl("euler_step_bwd_cpp", TORCH_BOX(&dblocks::euler_step_backward));
}
