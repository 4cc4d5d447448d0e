// For processors with AVX-512. Headers of others come first: their inline functions, which the linker
// may share between files, must not use it.
#include "common/targets.h"

#if DBLOCKS_X86
#define DBLOCKS_LANES 16
#define DBLOCKS_TABLE kAvx512
#define DBLOCKS_NAME "AVX-512"
DBLOCKS_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#include "common/kernels_impl.h"
DBLOCKS_TARGET_END
#endif
