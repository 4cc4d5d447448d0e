"""Compiles every Triton kernel for several GPUs, without one, and reads what the compiler made.

Each public launch is made on tensors without memory; the launch is caught and its kernel compiled
with exactly the settings and argument specialisation that a real launch has. The gate fails where a
kernel does not compile, uses the stack (spills) on an NVIDIA target at D <= 4,096, or moves
contiguous bf16 rows by anything narrower than 16 bytes.

    python -m benchmarks.compile_gate            everything, about 15 minutes on 2 cores
    python -m benchmarks.compile_gate --slice    what the test suite runs, about a minute
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
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDTHS = (1024, 1536, 4096, 8192, 16384)
SLICE_WIDTHS = (1536, 4096)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
MAX_WIDTH_WITHOUT_STACK = 4096
# These write sums over rows and losses, a few numbers a program: no rows that could be wide.
WRITES_NO_ROWS = ("group_grads_kernel", "column_sums_kernel")
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One caught launch, compiled: `stack` in bytes, `widths` the sizes of its global accesses.

    `instructions` are counted for NVIDIA targets only, as they lie in the code.
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


def cases(D: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch of every op at a width, as a training step of a large model makes it."""
    from benchmarks import compile_cases

    yield from compile_cases.cases(D, dtype)


def read_nvidia(cubin: bytes) -> tuple[int, int, int, int, str]:
    """Registers, stack bytes, shared bytes, instructions, and widths of the global accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = str(NVIDIA_BIN / "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {usage.stdout}{usage.stderr}")
    accesses = re.findall(r"\b(LDG|STG)\.E(?:\.[A-Z]+)*?(?:\.(U8|U16|64|128))?\b", sass.stdout)
    counts: dict[str, int] = {}
    for op, width in accesses:
        key = f"{op[0]}{width.lstrip('U') or '32'}"
        counts[key] = counts.get(key, 0) + 1
    registers, stack, shared = map(int, found.groups())
    instructions = sum(
        1 for i in re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", sass.stdout) if i.strip() != "NOP"
    )
    widths = " ".join(f"{k}x{v}" for k, v in sorted(counts.items()))
    return registers, stack, shared, instructions, widths


def read_amd(asm: str) -> tuple[int, int, int, int, str]:
    """Registers, stack bytes and shared bytes from the metadata of the AMD assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", asm)
        return int(found.group(1)) if found else 0

    return (
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        field("group_segment_fixed_size"),
        0,
        "",
    )


def check_case(job: tuple[int, str, str, str]) -> list[Launch]:
    """Compiles every launch of one case for one target."""
    D, dtype, case, target = job
    launch = dict(cases(D, DTYPES[dtype]))[case]
    rows = []
    for caught in catch(launch):
        name, error, read, warps = caught.fn.__name__, "", (0, 0, 0, 0, ""), 0
        try:
            kernel = compile_launch(caught, TARGETS[target])
            warps = kernel.metadata.num_warps
            if target == "gfx942":
                read = read_amd(kernel.asm["amdgcn"])
            else:
                read = read_nvidia(kernel.asm["cubin"])
        except Exception as exception:
            error = f"{type(exception).__name__}: {str(exception)[-300:]}"
        rows.append(Launch(case, name, target, D, dtype, warps, *read, error))
    return rows


def failures(row: Launch) -> list[str]:
    """What is wrong with a launch; nothing where it is as it must be."""
    if row.error:
        return [row.error]
    if row.target == "gfx942":
        return []
    found = []
    if row.stack and row.D <= MAX_WIDTH_WITHOUT_STACK:
        found.append(f"{row.stack} bytes of stack")
    if row.dtype == "bf16":
        if "L128x" not in row.widths:
            found.append("no 16-byte global load")
        if "S128x" not in row.widths and not writes_no_rows(row):
            found.append("no 16-byte global store")
    return found


def writes_no_rows(row: Launch) -> bool:
    """Whether all that the launch stores are sums: over rows, or the losses of edm_loss."""
    return row.kernel in WRITES_NO_ROWS or row.case == "edm_loss"


def jobs(widths: tuple[int, ...], targets: tuple[str, ...]) -> list[tuple[int, str, str, str]]:
    return [
        (D, dtype, case, target)
        for D in widths
        for dtype in DTYPES
        for case, _ in cases(D, DTYPES[dtype])
        for target in targets
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slice", action="store_true", help="the part that the tests run")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=None)
    parser.add_argument("--widths", nargs="+", type=int, default=None)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    widths = args.widths or (SLICE_WIDTHS if args.slice else WIDTHS)
    targets = args.targets or (("sm_90", "gfx942") if args.slice else tuple(TARGETS))
    todo = [job for job in jobs(tuple(widths), tuple(targets)) if args.case in job[2]]
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
