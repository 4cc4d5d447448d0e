// The choice of an instruction set, made once.
#include <cstdlib>
#include <cstring>

#include "common/kernels.h"
#include "common/targets.h"

namespace dblocks {
namespace {

const Kernels& choose() {
#if DBLOCKS_X86
  const char* wish = std::getenv("DBLOCKS_CPU");
  const bool base = wish && !std::strcmp(wish, "base"), avx2 = wish && !std::strcmp(wish, "avx2");
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !base && !avx2) return kAvx512;
  if (has_avx2 && !base) return kAvx2;
#endif
  return kBase;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dblocks
