// Chooses the instruction set, once.
#include <torch/csrc/stable/library.h>

#include <cctype>
#include <cstdlib>
#include <string>

#include "common/kernels.h"
#include "common/targets.h"

namespace dblocks {
namespace {

// The widest set that may be used: 0 base, 1 avx2, 2 avx512.
int widest() {
  const char* wish = std::getenv("DBLOCKS_CPU");
  std::string name = wish ? wish : "";
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (name == "base") return 0;
  if (name == "avx2") return 1;
  STD_TORCH_CHECK(
      name.empty() || name == "avx512", "DBLOCKS_CPU must be base, avx2 or avx512, got '", wish,
      "'; leave it unset for the widest instruction set of this processor");
  return 2;
}

const Kernels& choose() {
  [[maybe_unused]] const int most = widest();
#if DBLOCKS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most >= 2) return kAvx512;
  if (has_avx2 && most >= 1) return kAvx2;
#endif
  return kBase;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dblocks
