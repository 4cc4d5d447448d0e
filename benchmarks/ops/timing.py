"""Measurements: interleaved timing, medians, ceilings of the machine, memory, first calls."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUND_MS = 20.0  # shortest time of an implementation in a round; shorter calls are repeated
MAX_REPEATS = 200
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
# Large tensors come from the heap and stay there; otherwise fresh pages, which the system clears
# one by one, would be part of the time. glibc uses mmap above 32 MiB, whatever its threshold,
# unless mmap is disabled.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}

Run = Callable[[], object]


def restart_with_malloc_settings() -> None:
    """Restarts this process with MALLOC in its environment, unless it is set."""
    if any(os.environ.get(k) != v for k, v in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def clock(run: Run, device: torch.device, repeats: int) -> float:
    """Milliseconds per call, the mean of `repeats` calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) * 1e3 / repeats


def interleaved(
    runs: dict[str, Run], device: torch.device, rounds: int, *, round_ms: float = ROUND_MS
) -> dict[str, list[float]]:
    """The times of every run in `rounds` interleaved rounds, after a warm-up."""
    repeats = {}
    for name, run in runs.items():
        clock(run, device, 2)
        one = max(clock(run, device, 1), 1e-3)
        repeats[name] = max(1, min(MAX_REPEATS, int(round_ms / one)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run, device, repeats[name]))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles, in milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"ms": statistics.median(times), "ms_p20": fifths[0], "ms_p80": fifths[3]}


def first_call_ms(run: Run, device: torch.device) -> float:
    """Milliseconds of the next call, which includes compilation."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def host_us(run: Run, device: torch.device, calls: int = 200) -> float:
    """Microseconds until a call returns, without waiting for the device; the best of 5 rounds."""
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - began) * 1e6 / calls)
    return best


def matmul_tflops(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """The machine's ceiling for arithmetic: the median speed of a square matrix product."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleaved({"matmul": lambda: a @ b}, device, rounds)["matmul"]
    return 2 * size**3 / statistics.median(times) / 1e9


def cuda_peak_bytes(run: Run) -> int:
    """The increase of allocated GPU memory in a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak_bytes(run: Run) -> int | None:
    """The increase of resident memory in a second call; None if the system is not Linux.

    For a fresh process in which freed tensors are returned to the system at once.
    """
    run()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark to the current resident memory
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def fresh_process(arguments: Sequence[str]) -> Any:
    """The JSON that `python -m benchmarks.<arguments>` prints last, with default malloc settings.

    Freed memory is then returned to the system at once, so that high-water marks are meaningful.
    """
    environment = {k: v for k, v in os.environ.items() if k not in MALLOC}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def environment(device: torch.device) -> dict[str, Any]:
    """Device, instruction set, threads, versions and commit, on which figures depend."""
    from dblocks import info
    from dblocks.ops import _extension

    name = torch.cuda.get_device_name() if device.type == "cuda" else info.cpu_name()
    cpp = _extension.MISSING or torch.ops.dblocks.cpu_set()
    return {
        **info.versions(),
        "device": name,
        "machine": platform.machine(),
        "cpp": cpp,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": info.commit(),
    }
