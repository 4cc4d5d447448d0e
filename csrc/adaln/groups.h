// Groups of rows that share a row of the modulation, and their division into tasks.
//
// A task is some whole groups (a group shares a row of the modulation), or a chunk of one. The tasks
// depend on the shape only. If a group has several chunks, each writes partial sums, which a
// second pass adds in order: results do not depend on threads.
#pragma once

#include "common/tensors.h"

namespace dblocks {

constexpr int64_t kTasks = 32;       // at least, if there are enough rows
constexpr int64_t kMinChunk = 8;     // rows; multiples of kRows
constexpr int64_t kMaxChunk = 64;

struct Groups {
  int64_t N, T, D, S = 1, L, count = 1;  // L rows in each of `count` groups
  bool modulated = false;
  int64_t chunk, per_task = 1, chunks = 1, tasks;

  Groups(const Tensor& x, std::initializer_list<const std::optional<Tensor>*> modulation)
      : N(x.size(0)), T(x.size(1)), D(x.size(2)) {
    for (const auto* m : modulation) {
      if (!m->has_value()) continue;
      modulated = true;
      S = (*m)->dim() == 3 ? (*m)->size(1) : 1;
    }
    count = modulated ? N * S : 1;
    L = modulated ? (S > 0 ? T / S : 0) : N * T;
    const int64_t wanted = (N * T / kTasks + kRows - 1) / kRows * kRows;
    chunk = std::min(std::max(wanted, kMinChunk), kMaxChunk);
    if (L > chunk) {
      chunks = (L + chunk - 1) / chunk;
    } else if (L > 0) {
      per_task = chunk / L;
    }
    tasks = (count * chunks + per_task - 1) / per_task;
  }

  int64_t elements_per_task() const { return std::min(chunk, L * per_task) * D; }
  int64_t sample(int64_t group) const { return modulated ? group / S : 0; }
  int64_t segment(int64_t group) const { return modulated ? group % S : 0; }
  // The index in all rows of row r of a group.
  int64_t row(int64_t group, int64_t r) const { return group * L + r; }

  // Calls visit(group, first row, end row) for the rows of a task.
  template <class F>
  void each_group(int64_t task, F visit) const {
    if (chunks > 1) {
      const int64_t first = task % chunks * chunk;
      visit(task / chunks, first, std::min(first + chunk, L));
      return;
    }
    const int64_t end = std::min((task + 1) * per_task, count);
    for (int64_t g = task * per_task; g < end; ++g) visit(g, (int64_t)0, L);
  }
};

// A row as sample and token, to step to the next without a division.
struct Place {
  int64_t T, n, t;

  Place(const Groups& g, int64_t row) : T(g.T), n(row / g.T), t(row % g.T) {}
  void next() {
    if (++t == T) {
      t = 0;
      ++n;
    }
  }
};

inline const float* modulation_row(const Rows& m, const Groups& g, int64_t group, float* scratch) {
  if (!m) return nullptr;
  return as_float(m.row(g.sample(group), g.segment(group)), m.dtype, scratch, g.D);
}

inline const float* channel_row(const Rows& p, float* scratch, int64_t D) {
  return p ? as_float(p.data, p.dtype, scratch, D) : nullptr;
}

}  // namespace dblocks
