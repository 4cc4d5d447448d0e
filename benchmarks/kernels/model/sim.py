"""Costs of instructions on Hopper, and simulation of kernels with smsim.cpp."""

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels.model import sass
from benchmarks.kernels.model.sass import Instruction, Kernel

BUILD = Path(__file__).parents[3] / "build" / "model"
# Numbers used by smsim.cpp.
PLAIN, BARRIER, LOAD, STORE, COPY, COMMIT, COPY_WAIT, WGMMA, WGMMA_WAIT = range(9)
FMA, ALU, IMAD, XU, MIO, BRANCH, TENSOR = range(7)
LATENCY, L2_LATENCY = 700, 280  # clocks, under load
LAUNCH = 300  # clocks between two CTAs
FLOP_A_CLOCK = 4096  # of an SM, dense 16-bit: 989.4 TFLOP/s / 132 SMs / 1.83 GHz
# Class and prefix of an instruction; kind, latency, interval per partition and pipe. The first
# match counts.
COSTS = (
    ("LDGSTS", "", (COPY, 0, 1, MIO)),
    ("LDG", "", (LOAD, 0, 1, MIO)),
    ("STG", "", (STORE, 10, 1, MIO)),
    ("BAR", "BAR", (BARRIER, 20, 2, MIO)),
    ("LDS", "", (PLAIN, 30, 2, MIO)),  # 4 clocks if a thread moves 16 bytes
    ("STS", "", (PLAIN, 10, 2, MIO)),
    ("SHFL", "", (PLAIN, 24, 2, MIO)),
    ("REDUX", "", (PLAIN, 24, 2, MIO)),
    ("MUFU", "", (PLAIN, 22, 8, XU)),
    ("CVT", "F2FP", (PLAIN, 5, 2, ALU)),
    ("CVT", "I2FP", (PLAIN, 16, 2, ALU)),
    ("CVT", "", (PLAIN, 16, 8, XU)),
    ("FP", ("FFMA", "FADD", "FMUL"), (PLAIN, 4, 1, FMA)),
    ("INT", "IMAD", (PLAIN, 5, 2, IMAD)),
    *((name, "", (PLAIN, 5, 2, ALU)) for name in ("FP", "HFP", "INT", "PRMT", "MOV")),
    ("UNI", ("S2R", "S2UR", "R2UR"), (PLAIN, 20, 4, XU)),
    ("UNI", "", (PLAIN, 8, 2, BRANCH)),
    ("CTL", "LDGDEPBAR", (COMMIT, 0, 1, BRANCH)),
    ("CTL", "DEPBAR.LE", (COPY_WAIT, 0, 1, BRANCH)),
    ("CTL", "WARPGROUP.DEPBAR", (WGMMA_WAIT, 0, 1, BRANCH)),
)
OTHER = (PLAIN, 6, 2, BRANCH)
TWO_TARGETS = re.compile(
    "ISETP|FSETP|PLOP3|SHFL|IADD3|LOP3|LEA|UISETP|VIADD|IMAD|R2P|DSETP|HSETP2|FCHK"
)


class Segment(NamedTuple):
    """Code that runs `repeat` times; with `in_l2`, its loads and stores do not reach DRAM."""

    code: Sequence[Instruction]
    repeat: int
    in_l2: bool


class Result(NamedTuple):
    """DRAM traffic as a fraction of a copy's, and the number of clocks."""

    of_copy: float
    clocks: float


@cache
def binary() -> Path:
    """The path of smsim, which is built if needed."""
    source = Path(__file__).with_name("smsim.cpp")
    built = BUILD / f"smsim-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not built.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = BUILD / f"smsim.{os.getpid()}"
        command = [os.environ.get("CXX", "c++"), "-O2", "-std=c++17", str(source), "-o", str(part)]
        subprocess.run(command, check=True)
        part.rename(built)
    return built


def cost(op: str, operands: str) -> tuple[int, int, int, int]:
    """Kind, latency, interval and pipe of an instruction."""
    name = sass.kind(op)
    if name == "HGMMA" and (shape := re.search(r"64x(\d+)x", op)):
        n, a = int(shape[1]), operands.split(",")[1:2]
        a_is_shared = bool(a) and "gdesc" in a[0]  # read in addition to B, 128 bytes per clock
        clocks = max(n // 2, (n * 32 + a_is_shared * 64 * 32) // 128)
        return WGMMA, clocks + 40, clocks, TENSOR
    found = next((c for of, begin, c in COSTS if of == name and op.startswith(begin)), OTHER)
    of, latency, interval, pipe = found
    wide = name in ("LDS", "STS") and "128" in op
    return of, latency, 4 if wide else interval, pipe


def registers(text: str) -> list[int]:
    """Register numbers: R from 0, UR from 400, P from 600, UP from 620; two per 64-bit address."""
    found = [int(x) for x in re.findall(r"(?<![U\w])R(\d+)\b", text)]
    found += [400 + int(x) for x in re.findall(r"\bUR(\d+)\b", text)]
    found += [600 + int(x) for x in re.findall(r"(?<!U)\bP(\d)\b", text)]
    found += [620 + int(x) for x in re.findall(r"\bUP(\d)\b", text)]
    return found + [int(x) + 1 for x in re.findall(r"\bR(\d+)\.64", text)]


def vector(operand: str, size: int) -> list[int]:
    """The registers that a load of `size` bytes writes, or a store reads."""
    base = re.match(r"R(\d+)", operand)
    return list(range(int(base[1]), int(base[1]) + max(1, size // 4))) if base else []


def uses(instruction: Instruction, of: int) -> tuple[list[int], list[int]]:
    """The registers that an instruction of kind `of` writes and reads."""
    predicate, op, operands = instruction
    parts = [part.strip() for part in operands.split(",")] if operands else []
    writes, reads, size = [], registers(predicate), sass.width(op)
    if of == COPY_WAIT:
        return [], []
    if of in (BARRIER, STORE, COPY) or op.startswith(("STS", "BRA", "EXIT", "RED", "MEMBAR")):
        reads += registers(operands)
        if parts and (of == STORE or op.startswith("STS")):
            reads += vector(parts[-1], size)
    elif parts:
        n = 2 if op.startswith("SHFL") else 1  # operands that are written
        if TWO_TARGETS.match(op) and n == 1:
            while n < min(3, len(parts)) and re.fullmatch(r"!?U?P[T\d]", parts[n]):
                n += 1
        writes += registers(",".join(parts[:n]))
        reads += registers(",".join(parts[n:]))
        if of == LOAD or op.startswith("LDS"):
            writes += vector(parts[0], size)
        if "WIDE" in op:
            writes += vector(parts[0], 8)
    return sorted(set(writes)), sorted(set(reads))


def line(instruction: Instruction, in_l2: bool) -> str:
    """An instruction in the input format of smsim.cpp."""
    fixed = cost(instruction.op, instruction.operands)
    writes, reads = uses(instruction, fixed[0])
    moved = 32 * sass.width(instruction.op) if fixed[0] in (LOAD, STORE, COPY) else 0
    if fixed[0] == COPY_WAIT:  # the number of groups, instead of bytes
        left = re.search(r"SB0, 0x([0-9a-f]+)", instruction.operands)
        moved = int(left[1], 16) if left else 99
    fields = (*fixed, moved, int(in_l2), len(writes), len(reads), *writes, *reads)
    return " ".join(map(str, fields))


def run(
    kernel: Kernel, segments: Sequence[Segment], ctas: int, *, latency: int = LATENCY,
    l2_latency: int = L2_LATENCY, launch: int = LAUNCH, scale: float = 1.0,
) -> Result:  # fmt: skip
    """Simulates one SM with its share of DRAM and `ctas` CTAs, `kernel.ctas` at a time.

    `scale` is the fraction of lanes that are not masked.
    """
    share = sass.COPY / sass.SMS / sass.CLOCK
    head = (kernel.warps, ctas, kernel.ctas, share / scale, latency, l2_latency, launch)
    text = [" ".join(map(str, (*head, len(segments))))]
    for code, repeat, in_l2 in segments:
        lines = [line(i, in_l2) for i in code if i.op != "NOP"]
        text += [f"{len(lines)} {repeat}", *lines]
    done = subprocess.run(
        [str(binary())], input="\n".join(text), capture_output=True, text=True, check=True
    )
    clocks, moved, _ = map(float, done.stdout.split())
    return Result(moved * scale / clocks / share, clocks)
