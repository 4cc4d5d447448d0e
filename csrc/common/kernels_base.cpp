// For any processor: vectors of four, which compilers map to SSE2, NEON or scalar code.
#define DBLOCKS_LANES 4
#define DBLOCKS_TABLE kBase
#define DBLOCKS_NAME "base"
#include "common/kernels_impl.h"
