"""The report of `dblocks info`: versions, devices, and the implementation of each op here."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dblocks._version import __version__
from dblocks.ops import FAMILIES, _extension, doubled_attention, linear_cross_entropy
from dblocks.ops._dispatch import HAS_TRITON, INTERPRETED, resolve_impl

PACKAGES = ("torch", "triton", "numpy")
OPS = tuple(FAMILIES)


def versions() -> dict[str, str]:
    """The versions of dblocks, Python and the packages that dblocks uses."""
    found = {"dblocks": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The available devices, with a description of each."""
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    return found


def cpu_name() -> str:
    """The processor's model name, or its architecture if the system does not provide it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def extension() -> str:
    """Whether the C++ ops for CPUs are built, and for which instruction set."""
    if _extension.MISSING:
        return f"{_extension.MISSING}: on CPUs every op uses the reference"
    try:
        return f"built; this processor runs the {torch.ops.dblocks.cpu_set()} kernels"
    except RuntimeError as error:  # an invalid environment variable
        # LibTorch puts function, file and line before the message.
        return f"built, but cannot run: {str(error).split(', ', 2)[-1]}"


def implementation(op: str, device: str) -> tuple[str, str]:
    """The implementation that `impl="auto"` chooses for float32 tensors on `device`, and why."""
    if op == doubled_attention.OP:
        rows = torch.empty(1, 1, 2048, 64, device=device)
        return doubled_attention.explained(rows, rows, rows)
    if op == linear_cross_entropy.OP:
        return linear_cross_entropy.explained(torch.empty(1, 1, device=device))
    impl = resolve_impl("auto", torch.empty(1, 1, 1, device=device), op)
    reasons = {
        "triton": "the tensors are on a GPU",
        "cpp": "the tensors are on a CPU and the C++ ops are built",
        "reference": "plain PyTorch: the tensors are on a CPU and the C++ ops do not run here",
    }
    if impl == "reference" and device != "cpu":
        return impl, "plain PyTorch: no other implementation supports this device"
    return impl, reasons[impl]


def triton_state() -> str:
    """Whether the Triton kernels can run here, and how."""
    if not HAS_TRITON:
        return "not installed: impl='triton' cannot run"
    if INTERPRETED:
        return "interpreted on the CPU (TRITON_INTERPRET is set): for tests, very slow"
    if torch.cuda.is_available():
        return "compiles for the GPU"
    return "installed, but there is no GPU (TRITON_INTERPRET=1 would interpret the kernels)"


def report() -> str:
    """The output of `dblocks info`."""
    parts = ["Versions", *aligned(list(versions().items())), "", "Devices"]
    parts += aligned(list(devices().items()))
    parts += ["", "Kernels", *aligned([("C++", extension()), ("Triton", triton_state())])]
    for device in devices():
        parts += ["", f'Ops with impl="auto", float32 tensors on {device}']
        parts += aligned([(op, *implementation(op, device)) for op in OPS])
    return "\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of an indented table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record of a run."""
    return {
        **versions(),
        "device": torch.get_default_device().type,  # recipes use the default device
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the checkout that dblocks runs from; None outside of one."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
