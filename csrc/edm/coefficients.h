// The preconditioning at a noise level.
#pragma once

#include <cmath>

namespace dblocks {

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

}  // namespace dblocks
