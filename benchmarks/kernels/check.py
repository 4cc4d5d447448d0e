"""Compiles every Triton kernel for several GPU architectures, without a GPU, and inspects the code.

Each public launch is made on tensors without memory; the launch is intercepted and its kernel
compiled with exactly the settings and argument specialisation of a real launch. The check fails if
a kernel does not compile, needs more shared memory than available, or accesses contiguous bf16 rows
with less than 16 bytes at a time. Row kernels must not use the stack (spill) on NVIDIA targets at
D <= 4,096. Attention kernels must multiply 16-bit matrices with the chip's matrix instruction, and
must not use the stack on sm_90 at the head widths 64 and 128. On sm_90, matrix products must not be
serialized (in ptxas' words). Every kernel must have a case.

    python -m benchmarks.kernels.check            everything, about 30 minutes on 2 cores
    python -m benchmarks.kernels.check --slice    what the test suite runs, about a minute
    python -m benchmarks.kernels.check --once     every case once, for one GPU: half a minute

To check with another version of Triton, put its folder on PYTHONPATH; `make kernels-check` and the
tests do so with the oldest supported version.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.kernels import machine_code
from benchmarks.kernels.machine_code import NOT_READ

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
# The slice has all three forms of attention on one target, and one form on the others.
SLICE_ATTENTION = ("attention", "attention blocked", "attention noisy")
DOCUMENTS = "attention documents"  # which has a kernel of its own for its table
# With --once, a case is compiled at the first of these widths that has it.
ONCE_WIDTHS = (1536, 4096, 128)
ONCE_TARGET = "sm_90"
TWO_KERNELS = (16384, "bf16", "adaln", ONCE_TARGET)  # a width whose backward has several kernels
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ROW_DTYPES = ("bf16", "f32")
ROW_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # only attention has tiles for sm_86
MAX_WIDTH_WITHOUT_STACK = 4096
# These write sums over rows, or losses, a few numbers per program, and no rows.
WRITES_NO_ROWS = ("group_grads_kernel", "column_sums_kernel")
MOVES_NO_ROWS = "segments_kernel"  # writes three numbers for each tile of packed documents
# The instruction that multiplies 16-bit matrices, in the assembly of each target.
MATRIX = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": machine_code.WGMMA,
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
# Stack bytes that cost less than smaller tiles: registers saved once per head in a loop. The pinned
# Triton stays within the 64 of the goals; the oldest one needs up to 96.
DKV, DKV_STACK = "doubled_attention_bwd_dkv_kernel", 96
HAS_NO_MATRICES = "doubled_attention_bwd_self_kernel"
# Shared memory of a program: CUDA programming guide, compute capabilities; CDNA 3 white paper.
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
KERNELS = Path(__file__).parents[2] / "kernels"


class Launch(NamedTuple):
    """An intercepted launch, compiled: `stack` in bytes, `widths` the sizes of its global accesses.

    `instructions` is the static count, for NVIDIA targets only; `matrix` counts those that multiply
    matrices. `widths` is NOT_READ if the code was not disassembled; `serialized` is ptxas' reason
    for serializing matrix products.
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
    serialized: str
    error: str


class Caught(NamedTuple):
    """An intercepted launch."""

    fn: JITFunction
    args: tuple
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


def catch(launch: Callable[[], object]) -> list[Caught]:
    """Intercepts the kernel launches that `launch` makes; none of them runs."""
    caught: list[Caught] = []

    def run(self, *args, grid, warmup, **kwargs):
        caught.append(Caught(self, args, kwargs, grid))

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    finally:
        JITFunction.run = original
    return caught


def compile_launch(caught: Caught, target: GPUTarget) -> Any:
    """Compiles an intercepted launch for `target` with the specialisation of its arguments."""
    backend = make_backend(target)
    bind = create_function_from_signature(caught.fn.signature, caught.fn.params, backend)
    bound, specialization, kwargs = bind(*caught.args, **caught.kwargs)
    options, signature, constants, attrs = caught.fn._pack_args(
        backend, kwargs, bound, specialization, kwargs
    )
    source = ASTSource(caught.fn, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def cases(D: int, dtype: torch.dtype, target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch of every op at a width, as in a training step of a large model."""
    from benchmarks.kernels import cases

    if D in HEAD_WIDTHS:
        yield from cases.attention(D, dtype, target)
    else:
        yield from cases.cases(D, dtype)


def check_case(job: "Job", *, code: bool = True) -> list[Launch]:
    """Compiles every launch of one case for one target; disassembles it if `code`."""
    D, dtype, case, target = job
    launch = dict(cases(D, DTYPES[dtype], target))[case]
    rows = []
    for caught in catch(launch):
        about = (case, caught.fn.__name__, target, D, dtype)
        try:
            rows.append(_compiled(about, caught, code))
        except Exception as exception:
            rows.append(Launch(*about, 0, 0, 0, 0, 0, 0, "", "", _cause(exception)))
    return rows


def _compiled(about: tuple[str, str, str, int, str], caught: Caught, code: bool) -> Launch:
    """Compiles a launch and reads the result."""
    target = about[2]
    kernel = compile_launch(caught, TARGETS[target])
    if target == "gfx942":
        asm = kernel.asm["amdgcn"]
        registers, stack, instructions, widths = machine_code.read_amd(asm)
    else:
        asm = kernel.asm["ptx"]
        cubin = kernel.asm["cubin"]
        registers, stack, instructions, widths = machine_code.read_nvidia(cubin, code=code)
    waits = machine_code.serialized(asm) if target == "sm_90" else ""
    of_all = (kernel.metadata.num_warps, registers, stack, kernel.metadata.shared)
    return Launch(*about, *of_all, asm.count(MATRIX[target]), instructions, widths, waits, "")


def _cause(exception: BaseException) -> str:
    """The first exception in the chain, on one line: the compiler's error."""
    while exception.__cause__:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {' '.join(str(exception).split())[-300:]}"


def failures(row: Launch) -> list[str]:
    """The requirements that a launch violates; empty if there are none."""
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
    if row.serialized:
        found.append(f"{MATRIX[row.target]} serialized: {row.serialized}")
    is_read = row.widths != NOT_READ and row.kernel != MOVES_NO_ROWS
    if row.target != "gfx942" and row.dtype == "bf16" and is_read:
        if "L128x" not in row.widths:
            found.append("no 16-byte global load")
        if "S128x" not in row.widths and not writes_no_rows(row):
            found.append("no 16-byte global store")
    return found


def may_use_stack(row: Launch, attention: bool) -> bool:
    """Whether spilling is allowed: on AMD, at large widths, and for attention elsewhere."""
    if attention:
        few = row.kernel == DKV and row.stack <= DKV_STACK
        return few or row.target != "sm_90" or row.dtype == "f32" or row.D not in SLICE_HEAD_WIDTHS
    return row.target == "gfx942" or row.D > MAX_WIDTH_WITHOUT_STACK


def writes_no_rows(row: Launch) -> bool:
    """Whether a launch stores only sums: over rows, or the losses of edm_loss."""
    return row.kernel in WRITES_NO_ROWS or row.case == "edm_loss"


Job = tuple[int, str, str, str]  # width, dtype, case, target


def jobs(widths: tuple[int, ...], targets: tuple[str, ...]) -> list[Job]:
    """Every case in every dtype at these widths."""
    return [
        (D, dtype, case, target)
        for D in widths
        for dtype in (DTYPES if D in HEAD_WIDTHS else ROW_DTYPES)
        for case, _ in cases(D, DTYPES[dtype], targets[0])
        for target in targets
        if D in HEAD_WIDTHS or target in ROW_TARGETS
    ]


def slice_jobs() -> list[Job]:
    """The jobs of the test suite; float32, whose accesses are not checked, at one width."""
    rows = [
        job
        for job in jobs(SLICE_WIDTHS, ("sm_90", "gfx942"))
        if job[1] == "bf16" or job[0] == SLICE_WIDTHS[0]
    ]
    attention = [
        (D, dtype, case, target)
        for D, dtype, case, target in jobs(SLICE_HEAD_WIDTHS, ROW_TARGETS)
        if dtype == "bf16" and case in SLICE_ATTENTION
        if target == "sm_90" or (D, case) == (128, "attention blocked")
    ]
    attention.append((SLICE_HEAD_WIDTHS[0], "bf16", DOCUMENTS, "sm_90"))
    return [*rows, *attention, TWO_KERNELS]


def once_jobs() -> list[Job]:
    """Every case once, in bfloat16."""
    found: dict[str, Job] = {}
    for D in ONCE_WIDTHS:
        for case, _ in cases(D, torch.bfloat16, ONCE_TARGET):
            found.setdefault(case, (D, "bf16", case, ONCE_TARGET))
    return [*found.values(), TWO_KERNELS]


def launched_kernels() -> set[str]:
    """The names of the kernels in kernels/."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in KERNELS.rglob("*.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


def checked(todo: list[Job], workers: int, *, code: bool) -> Iterator[Launch]:
    """Yields the launches of all jobs as they are compiled."""
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(partial(check_case, code=code), todo):
            yield from rows


def report(launches: Iterable[Launch]) -> tuple[int, int, set[str]]:
    """Prints a line per launch; returns the numbers of launches and failures, and the kernels."""
    columns = [f for f in Launch._fields if f not in ("serialized", "error")]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    failed, count, kernels = 0, 0, set()
    for row in launches:
        count += 1
        kernels.add(row.kernel)
        wrong = failures(row)
        failed += bool(wrong)
        note = f" **{'; '.join(wrong)}**" if wrong else ""
        read = row if row.instructions else row._replace(instructions=NOT_READ, widths=NOT_READ)
        print(f"| {' | '.join(str(getattr(read, c)) for c in columns)} |{note}", flush=True)
    return count, failed, kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slice", action="store_true", help="only what the tests run")
    parser.add_argument("--once", action="store_true", help="only every case once, for one GPU")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=None)
    parser.add_argument("--widths", nargs="+", type=int, default=None)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if (args.once or args.slice) and (args.targets or args.widths or (args.once and args.slice)):
        parser.error("--once and --slice choose targets and widths: give one of them, or neither")
    print(f"triton {triton.__version__}, torch {torch.__version__}\n")
    widths, targets = args.widths or WIDTHS + HEAD_WIDTHS, args.targets or TARGETS
    if args.once or args.slice:
        todo = once_jobs() if args.once else slice_jobs()
    else:
        todo = jobs(tuple(widths), tuple(targets))
    todo = [job for job in todo if args.case in job[2]]
    count, failed, kernels = report(checked(todo, args.workers, code=not args.once))
    print(f"{count} kernels compiled, {failed} failed")
    if args.case or args.widths:
        return 1 if failed or not count else 0
    left_out = launched_kernels() - kernels
    if left_out:
        print(f"no case launches {', '.join(sorted(left_out))}: add one to cases.py")
    return 1 if failed or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
