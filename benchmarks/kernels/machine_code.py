"""Reads compiled kernels: registers, stack, instructions, and ptxas' remarks.

Uses the tools that Triton ships, so CUDA need not be installed.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WGMMA = "wgmma.mma_async"  # multiplies 16-bit matrices on sm_90
NOT_READ = "-"


def output(*command: object) -> str:
    """The output of a compiler tool."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout + done.stderr


def usage(cubin: str) -> tuple[int, int]:
    """Registers and stack bytes of a compiled kernel."""
    said = output(NVIDIA_BIN / "cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {said}")
    return int(found[1]), int(found[2])


def read_nvidia(cubin: bytes, *, code: bool) -> tuple[int, int, int, str]:
    """Registers, stack bytes; instructions and widths of the global accesses, if `code` is read."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = usage(file.name)
        if not code:
            return registers, stack, 0, NOT_READ
        sass = output(NVIDIA_BIN / "cuobjdump", "-sass", file.name)
    accesses = re.findall(r"\b(LDG|STG)\.E(?:\.[A-Z]+)*?(?:\.(U8|U16|64|128))?\b", sass)
    counts: dict[str, int] = {}
    for op, width in accesses:
        key = f"{op[0]}{width.lstrip('U') or '32'}"
        counts[key] = counts.get(key, 0) + 1
    instructions = sum(
        1 for i in re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", sass) if i.strip() != "NOP"
    )
    widths = " ".join(f"{k}x{v}" for k, v in sorted(counts.items()))
    return registers, stack, instructions, widths


def serialized(ptx: str) -> str:
    """Why ptxas serialized the matrix products on sm_90; empty if it did not."""
    if WGMMA not in ptx:
        return ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = output(
            NVIDIA_BIN / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull
        )  # fmt: skip
    return reasons(said)


def reasons(said: str) -> str:
    """The reasons in ptxas' messages about serialized matrix products."""
    pattern = r"instructions are serialized(?: due to (.*?))?(?: in (?:the )?function|\n|$)"
    found = {reason or "no reason given" for reason in re.findall(pattern, said)}
    return "; ".join(sorted(found))


def read_amd(asm: str) -> tuple[int, int, int, str]:
    """Registers and stack bytes from the metadata of the AMD assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", asm)
        return int(found.group(1)) if found else 0

    return field("vgpr_count"), field("private_segment_fixed_size"), 0, ""
