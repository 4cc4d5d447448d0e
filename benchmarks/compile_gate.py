"""Compiles every Triton kernel for several GPUs, without one, and reads what the compiler made.

Each public launch is made on tensors without memory; the launch is caught and its kernel compiled
with exactly the settings and argument specialisation that a real launch has. The gate fails where a
kernel does not compile, wants more shared memory than there is, or moves contiguous bf16 rows by
anything narrower than 16 bytes. Kernels over rows may not use the stack (spill) on an NVIDIA target
at D <= 4,096. Those of attention must multiply 16-bit matrices by the chip's own instruction, and
may not use the stack on sm_90 at the head widths 64 and 128.

    python -m benchmarks.compile_gate            everything, about 30 minutes on 2 cores
    python -m benchmarks.compile_gate --slice    what the test suite runs, about two minutes
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDTHS = (1024, 1536, 4096, 8192, 16384)
SLICE_WIDTHS = (1536, 4096)
HEAD_WIDTHS = (16, 64, 96, 128, 256)
SLICE_HEAD_WIDTHS = (64, 128)
# Of attention the slice has all three forms on one target, and one on the others.
SLICE_ATTENTION = ("attention", "attention blocked", "attention noisy")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ROW_DTYPES = ("bf16", "f32")
ROW_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # only attention has tiles for sm_86
MAX_WIDTH_WITHOUT_STACK = 4096
# These write sums over rows and losses, a few numbers a program: no rows that could be wide.
WRITES_NO_ROWS = ("group_grads_kernel", "column_sums_kernel")
# The instruction that multiplies 16-bit matrices, as the assembly of each target calls it.
MATRIX = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
HAS_NO_MATRICES = "doubled_attention_bwd_self_kernel"
# What a program may have: CUDA programming guide, compute capabilities; CDNA 3 white paper.
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One caught launch, compiled: `stack` in bytes, `widths` the sizes of its global accesses.

    `instructions` are counted for NVIDIA targets only, as they lie in the code; `matrix` are those
    among them that multiply matrices by the chip's own instruction.
    """

    case: str
    kernel: str
    target: str
    D: int
    dtype: str
    warps: int
    registers: int
    stack: int
    shared: int
    matrix: int
    instructions: int
    widths: str
    error: str


class _Caught(NamedTuple):
    fn: JITFunction
    args: tuple
    kwargs: dict[str, Any]


def catch(launch: Callable[[], object]) -> list[_Caught]:
    """The kernel launches that `launch` makes, none of which runs."""
    caught: list[_Caught] = []

    def run(self, *args, grid, warmup, **kwargs):
        caught.append(_Caught(self, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    finally:
        JITFunction.run = original
    return caught


def compile_launch(caught: _Caught, target: GPUTarget) -> Any:
    """Compiles a caught launch for `target` with the specialisation of its arguments."""
    backend = make_backend(target)
    bind = create_function_from_signature(caught.fn.signature, caught.fn.params, backend)
    bound, specialization, kwargs = bind(*caught.args, **caught.kwargs)
    options, signature, constants, attrs = caught.fn._pack_args(
        backend, kwargs, bound, specialization, kwargs
    )
    source = ASTSource(caught.fn, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def cases(D: int, dtype: torch.dtype, target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch of every op at a width, as a training step of a large model makes it."""
    from benchmarks import compile_cases

    if D in HEAD_WIDTHS:
        yield from compile_cases.attention(D, dtype, target)
    else:
        yield from compile_cases.cases(D, dtype)


def read_nvidia(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers, stack bytes, instructions, and widths of the global accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = str(NVIDIA_BIN / "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {usage.stdout}{usage.stderr}")
    accesses = re.findall(r"\b(LDG|STG)\.E(?:\.[A-Z]+)*?(?:\.(U8|U16|64|128))?\b", sass.stdout)
    counts: dict[str, int] = {}
    for op, width in accesses:
        key = f"{op[0]}{width.lstrip('U') or '32'}"
        counts[key] = counts.get(key, 0) + 1
    registers, stack = map(int, found.groups())
    instructions = sum(
        1 for i in re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", sass.stdout) if i.strip() != "NOP"
    )
    widths = " ".join(f"{k}x{v}" for k, v in sorted(counts.items()))
    return registers, stack, instructions, widths


def read_amd(asm: str) -> tuple[int, int, int, str]:
    """Registers and stack bytes from the metadata of the AMD assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", asm)
        return int(found.group(1)) if found else 0

    return field("vgpr_count"), field("private_segment_fixed_size"), 0, ""


def check_case(job: "Job") -> list[Launch]:
    """Compiles every launch of one case for one target."""
    D, dtype, case, target = job
    launch = dict(cases(D, DTYPES[dtype], target))[case]
    rows = []
    for caught in catch(launch):
        name = caught.fn.__name__
        about = (case, name, target, D, dtype)
        try:
            kernel = compile_launch(caught, TARGETS[target])
            if target == "gfx942":
                asm = kernel.asm["amdgcn"]
                registers, stack, instructions, widths = read_amd(asm)
            else:
                asm = kernel.asm["ptx"]
                registers, stack, instructions, widths = read_nvidia(kernel.asm["cubin"])
        except Exception as exception:
            error = f"{type(exception).__name__}: {str(exception)[-300:]}"
            rows.append(Launch(*about, 0, 0, 0, 0, 0, 0, "", error))
            continue
        matrix = asm.count(MATRIX[target])
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        rows.append(
            Launch(*about, warps, registers, stack, shared, matrix, instructions, widths, "")
        )
    return rows


def failures(row: Launch) -> list[str]:
    """What is wrong with a launch; nothing where it is as it must be."""
    if row.error:
        return [row.error]
    found = []
    if row.shared > SHARED_BYTES[row.target]:
        found.append(f"{row.shared} bytes of shared memory")
    attention = row.kernel.startswith("doubled_attention")
    if attention and row.dtype != "f32" and row.kernel != HAS_NO_MATRICES and not row.matrix:
        found.append(f"no {MATRIX[row.target]}")
    if row.stack and not may_use_stack(row, attention):
        found.append(f"{row.stack} bytes of stack")
    if row.target != "gfx942" and row.dtype == "bf16":
        if "L128x" not in row.widths:
            found.append("no 16-byte global load")
        if "S128x" not in row.widths and not writes_no_rows(row):
            found.append("no 16-byte global store")
    return found


def may_use_stack(row: Launch, attention: bool) -> bool:
    """Whether spilling is no failure: on AMD, at great widths, and of attention in other places."""
    if attention:
        return row.target != "sm_90" or row.dtype == "f32" or row.D not in SLICE_HEAD_WIDTHS
    return row.target == "gfx942" or row.D > MAX_WIDTH_WITHOUT_STACK


def writes_no_rows(row: Launch) -> bool:
    """Whether all that the launch stores are sums: over rows, or the losses of edm_loss."""
    return row.kernel in WRITES_NO_ROWS or row.case == "edm_loss"


Job = tuple[int, str, str, str]  # width, dtype, case, target


def jobs(widths: tuple[int, ...], targets: tuple[str, ...]) -> list[Job]:
    """Every case of every dtype that the kernels of these widths have."""
    return [
        (D, dtype, case, target)
        for D in widths
        for dtype in (DTYPES if D in HEAD_WIDTHS else ROW_DTYPES)
        for case, _ in cases(D, DTYPES[dtype], targets[0])
        for target in targets
        if D in HEAD_WIDTHS or target in ROW_TARGETS
    ]


def slice_jobs() -> list[Job]:
    """What the test suite runs."""
    rows = jobs(SLICE_WIDTHS, ("sm_90", "gfx942"))
    attention = [
        (D, dtype, case, target)
        for D, dtype, case, target in jobs(SLICE_HEAD_WIDTHS, ROW_TARGETS)
        if dtype == "bf16" and case in SLICE_ATTENTION
        if target == "sm_90" or (D, case) == (128, "attention blocked")
    ]
    return rows + attention


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slice", action="store_true", help="only what the tests run")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=None)
    parser.add_argument("--widths", nargs="+", type=int, default=None)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    widths, targets = args.widths or WIDTHS + HEAD_WIDTHS, args.targets or TARGETS
    todo = slice_jobs() if args.slice else jobs(tuple(widths), tuple(targets))
    todo = [job for job in todo if args.case in job[2]]
    columns = [f for f in Launch._fields if f != "error"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    failed = count = 0
    with ProcessPoolExecutor(args.workers) as pool:
        for rows in pool.map(check_case, todo):
            for row in rows:
                count += 1
                wrong = failures(row)
                failed += bool(wrong)
                note = f" **{'; '.join(wrong)}**" if wrong else ""
                print(f"| {' | '.join(str(v) for v in row[:-1])} |{note}", flush=True)
    print(f"{count} kernels compiled, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
