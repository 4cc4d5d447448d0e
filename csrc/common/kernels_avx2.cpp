// For processors with AVX2. Headers of others come first: their inline functions, which the linker
// may share between files, must not use it.
#include "common/targets.h"

#if DBLOCKS_X86
#define DBLOCKS_LANES 8
#define DBLOCKS_TABLE kAvx2
#define DBLOCKS_NAME "AVX2"
DBLOCKS_TARGET_BEGIN("avx2,fma,f16c")
#include "common/kernels_impl.h"
DBLOCKS_TARGET_END
#endif
