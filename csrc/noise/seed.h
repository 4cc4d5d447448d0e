// The seed of a stream of noise, and the cost of drawing from it.
#pragma once

#include "common/tensors.h"

namespace dblocks {

constexpr int64_t kNoiseCost = 8;     // of one element's noise, relative to copying an element

inline uint64_t seed_of(const std::optional<Tensor>& seed, int64_t number) {
  check_seed({"seed", seed});
  return seed ? *(const uint64_t*)seed->data_ptr() : (uint64_t)number;
}

}  // namespace dblocks
