// Cycle model of one Hopper SM that runs many CTAs of one trace of SASS against its share of DRAM.
//
// Four partitions issue one instruction a clock each, in order within a warp, as the registers, the
// pipes and the shared memory unit (MIO) allow. DRAM is one server (`rate` bytes a clock) with a
// latency behind it; stores use the same server and nobody waits for them. wgmma queue on the
// tensor cores of a partition. sim.py writes the input: a line of numbers, then segments of
// instructions.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>
using std::max;
using std::vector;

enum Kind { PLAIN, BARRIER, LOAD, STORE, COPY, COMMIT, COPY_WAIT, WGMMA, WGMMA_WAIT };
enum Pipe { MIO = 4, TENSOR = 6, PIPES = 8 };
const long NEVER = 1L << 60;
const int REGISTERS = 800;     // R, UR, P and UP, as sim.py numbers them
const int QUEUED_WGMMA = 96;   // clocks of wgmma that may wait before issue stops
const int FULL_QUEUE = 20000;  // clocks that DRAM may lie behind
const int BARRIER_CLOCKS = 20;

struct Instruction { int kind, latency, interval, pipe, bytes, in_l2; vector<int> writes, reads; };
struct Warp {
  vector<long> registers, groups;  // when each register, and each group of async copies, is there
  long ready = 0, open_group = 0, tensor = 0;
  int at = 0, cta = -1;
  bool done = true, waits = false;
};
struct Cta { int live = 0, arrived = 0; vector<int> warps; };
static int number() { int v; if (scanf("%d", &v) != 1) exit(1); return v; }
static double uniform() { return rand() / (double)RAND_MAX; }

int main() {
  int size = number(), ctas = number(), resident = number();  // size: warps of a CTA
  double rate;
  if (scanf("%lf", &rate) != 1) return 1;
  int dram_latency = number(), l2_latency = number(), launch = number(), segments = number();
  vector<Instruction> code;
  vector<int> trace;
  while (segments--) {
    int count = number(), repeat = number(), begin = code.size();
    while (count--) {
      Instruction x;
      for (int *v : {&x.kind, &x.latency, &x.interval, &x.pipe, &x.bytes, &x.in_l2}) *v = number();
      int writes = number(), reads = number();
      while (writes--) x.writes.push_back(number());
      while (reads--) x.reads.push_back(number());
      code.push_back(x);
    }
    while (repeat--)
      for (int i = begin; i < (int)code.size(); i++) trace.push_back(i);
  }

  vector<Warp> warps(resident * size);
  vector<Cta> slots(resident);
  vector<vector<int>> partitions(4);
  for (int id = 0; id < resident * size; id++) {
    int c = id / size, w = id % size;
    slots[c].warps.push_back(id);
    partitions[(w + (size < 4 ? c * size : 0)) % 4].push_back(id);
  }
  long t = 0, last = 0, done = 0, mio = 0, issued = 0, pipes[4][PIPES] = {};
  double server = 0, bytes = 0;
  auto start = [&](int c, long when) {
    slots[c].live = size, slots[c].arrived = 0;
    for (int id : slots[c].warps) {
      Warp &w = warps[id] = Warp();
      w.ready = when, w.cta = c, w.done = false;
      w.registers.assign(REGISTERS, 0);
    }
  };
  auto serve = [&](const Instruction &x) {
    server = max(server, (double)t) + x.bytes / rate;
    bytes += x.bytes;
  };
  auto from_dram = [&](const Instruction &x) {
    serve(x);
    return (long)server + (long)(dram_latency * (0.7 + 0.6 * uniform()));
  };
  auto release = [&](Cta &c) {
    c.arrived = 0;
    for (int id : c.warps)
      if (!warps[id].done) warps[id].waits = false, warps[id].ready = t + BARRIER_CLOCKS;
  };
  auto earliest = [&](const Warp &w, const Instruction &x, const long *pipe) {
    long at = w.ready;
    if (x.kind == WGMMA) return max(at, pipe[TENSOR] - QUEUED_WGMMA);
    for (int v : x.reads) at = max(at, w.registers[v]);
    for (int v : x.writes) at = max(at, w.registers[v]);
    if (x.kind == WGMMA_WAIT) at = max(at, w.tensor);
    if (x.kind == COPY_WAIT)  // all groups but the newest `bytes`
      for (int g = 0; g < (int)w.groups.size() - x.bytes; g++) at = max(at, w.groups[g]);
    at = max(at, x.pipe == MIO ? max(pipe[MIO], mio) : pipe[x.pipe]);
    bool memory = x.kind == LOAD || x.kind == STORE;
    return memory && server - t > FULL_QUEUE ? max(at, t + 50) : at;
  };
  auto issue = [&](Warp &w, const Instruction &x, long *pipe) {
    w.ready = t + 1;
    long there = t + x.latency;
    if (x.kind == WGMMA) {
      long begin = max(t, pipe[TENSOR]);
      pipe[TENSOR] = begin + x.interval;
      w.tensor = max(w.tensor, begin + x.latency);
      return;
    }
    pipe[x.pipe] = t + x.interval;
    if (x.pipe == MIO) mio = t + (x.bytes ? max(2, x.bytes / 128) : x.interval);
    if (x.kind == LOAD) {
      there = x.in_l2 ? t + (long)(l2_latency * (0.8 + 0.4 * uniform())) : from_dram(x);
    } else if (x.kind == COPY) {
      w.open_group = max(w.open_group, x.in_l2 ? t + l2_latency : from_dram(x));
    } else if (x.kind == COMMIT) {
      w.groups.push_back(w.open_group), w.open_group = 0;
      if (w.groups.size() > 16) w.groups.erase(w.groups.begin());
    } else if (x.kind == STORE && !x.in_l2) {
      serve(x);
    }
    for (int v : x.writes) w.registers[v] = there;
  };

  int started = 0;
  for (; started < resident && started < ctas; started++)
    start(started, launch + started * 8 + (long)(uniform() * 1500));
  int first[4] = {};  // the warp that issued last comes first
  while (done < ctas) {
    long next = NEVER;
    bool any = false;
    for (int p = 0; p < 4; p++) {
      int n = partitions[p].size();
      for (int k = 0; k < n; k++) {
        Warp &w = warps[partitions[p][(first[p] + k) % n]];
        if (w.done || w.waits) continue;
        const Instruction &x = code[trace[w.at]];
        long at = earliest(w, x, pipes[p]);
        if (at > t) { next = std::min(next, at); continue; }
        issue(w, x, pipes[p]);
        any = true, issued++, w.at++;
        first[p] = (first[p] + k) % n;
        Cta &c = slots[w.cta];
        if (x.kind == BARRIER) {
          w.waits = true;
          if (++c.arrived == c.live) release(c);
        }
        if (w.at == (int)trace.size()) {
          w.done = true, w.waits = false;
          if (--c.live == 0) {
            done++, last = t;
            if (started < ctas) start(w.cta, t + launch), started++;
          } else if (c.arrived == c.live && c.arrived > 0) {
            release(c);
          }
        }
        break;
      }
    }
    t = any || next <= t || next == NEVER ? t + 1 : next;
  }
  double end = max((double)last, server);
  printf("%.0f %.0f %.4f\n", end, bytes, issued / (4.0 * end));
}
