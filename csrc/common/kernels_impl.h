// The table of one instruction set; the including file sets DBLOCKS_LANES, DBLOCKS_TABLE and the
// target of the code generator.
#pragma once

#include "adaln/row_kernels.h"
#include "common/block_kernels.h"
#include "edm/error_kernels.h"
#include "noise/normal_kernels.h"

#define DBLOCKS_EACH_DTYPE(function) {function<float>, function<bf16>, function<f16>}

namespace dblocks {

const Kernels DBLOCKS_TABLE = {
    DBLOCKS_NAME,
    {to_float<float>, to_float<bf16>, to_float<f16>, from_double},
    {from_float<float>, from_float<bf16>, from_float<f16>, to_double},
    DBLOCKS_EACH_DTYPE(gated_sum),
    {{norm<float, float>, norm<float, bf16>, norm<float, f16>},
     {norm<bf16, float>, norm<bf16, bf16>, norm<bf16, f16>},
     {norm<f16, float>, norm<f16, bf16>, norm<f16, f16>}},
    DBLOCKS_EACH_DTYPE(norm_backward),
    factor,
    accumulate,
    normals,
    blend,
    squared_error,
};

}  // namespace dblocks
