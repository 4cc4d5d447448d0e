"""Peak memory of one implementation on the CPU; run in a fresh process by benchmarks.ops.run.

    python -m benchmarks.ops.memory adaln eager float32 4 1024 1024

prints the increase of the process's resident memory in forward and backward, in bytes.
"""

import sys

import torch

from benchmarks.ops import run, timing
from benchmarks.ops.baselines import implementations_of
from benchmarks.ops.registry import OPS


def main() -> None:
    name, implementation, dtype, *shape = sys.argv[1:]
    op = next(op for op in OPS if op.name == name)
    device = torch.device("cpu")
    found = implementations_of(op, device)[implementation]
    assert not isinstance(found, str), found
    baseline = run.as_baseline(found)
    op = run.part_of(op, baseline)
    inputs = op.make([int(size) for size in shape], getattr(torch, dtype), device)
    print(timing.resident_peak_bytes(run.call_of(op, baseline.call, inputs, "both")))


if __name__ == "__main__":
    main()
