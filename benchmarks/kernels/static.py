"""Writes `benchmarks/static.md`: properties of the compiled Triton kernels.

Every launch of the compile check's cases is compiled for one target. The table has registers,
stack, shared memory, and the static number of instructions, in which a loop counts once.

    python -m benchmarks.kernels.static      writes the table, about five minutes on 2 cores
"""

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# check first: it turns Triton's interpreter off before triton is imported.
from benchmarks.kernels import check
from benchmarks.ops import registry
from benchmarks.ops.op import SHAPES
from dblocks.kernels._common import launches
from dblocks.kernels.attention import layout

TARGET = "sm_90"
WIDTHS = (1024, 1536, 4096, 8192, 16384)
HEAD_WIDTHS = (64, 128)
FILE = Path(__file__).parent / "static.md"
HEADER = (
    "case", "kernel", "D", "dtype", "warps", "registers", "stack", "shared", "matrix",
    "instructions",
)  # fmt: skip


def table(rows: Iterable[Iterable[object]], header: tuple[str, ...]) -> str:
    """A markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def settings(widths: Iterable[int]) -> str:
    """The tile at each width, as chosen for adaln and its backward."""
    rows = []
    for D in widths:
        form = "one pass" if D <= launches.MAX_ONE_PASS_WIDTH else "two kernels"
        for name, most in (
            ("forward", launches.FORWARD_PARTS),
            ("backward", launches.BACKWARD_PARTS),
        ):
            rows_a_tile, columns, parts, warps = launches.row_tile(D, 4096, most)
            elements = rows_a_tile * columns // (32 * warps)
            rows.append((D, name, rows_a_tile, parts, columns // parts, warps, elements, form))
    header = (
        "D", "pass", "rows a tile", "parts a row", "columns a part", "warps", "elements a thread",
        "backward",
    )  # fmt: skip
    return table(rows, header)


def tiles(widths: Iterable[int]) -> str:
    """The tiles of attention at each head width."""
    rows = []
    for D in widths:
        for dtype in ("bf16", "f32"):  # f16 has the same tiles as bf16
            chosen = layout.settings(D, check.DTYPES[dtype], TARGET)
            rows += [(D, dtype, k, *tile) for k, tile in chosen._asdict().items()]
    return table(rows, ("D", "dtype", "kernel", "query rows", "keys", "warps", "stages"))


def traffic() -> str:
    """Bytes per element of each op of the benchmarks, forward and backward."""
    rows = [
        (op.name, *(count for e in (2, 4) for count in op.work((1, 1, 1), e)[:2]))
        for op in registry.OPS
        if op.shapes is SHAPES
    ]
    header = ("op", "forward, bf16", "backward, bf16", "forward, f32", "backward, f32")
    return table(rows, header)


def document(launches: list[check.Launch], widths: Iterable[int]) -> str:
    """The whole page."""
    triton = check.triton.__version__
    torch = check.torch.__version__.partition("+")[0]
    rows = [
        (
            r.case, r.kernel, r.D, r.dtype, r.warps, r.registers, r.stack, r.shared, r.matrix,
            r.instructions,
        )
        for r in launches
    ]  # fmt: skip
    return f"""# The Triton kernels, as compiled for {TARGET}

Made by `make static` with triton {triton} and torch {torch};
no GPU is needed, and nothing here is a measurement of time. Launches are those of the compile
check: [8, 4096, D], modulations float32, those per token in the dtype of x; of attention, T = 4096
and 16 heads of width D.

## Launch settings

A row is cut into parts of equal width, of which a thread holds 8 elements each, one 16-byte access
of a 16-bit dtype. The forward has up to five parts, the backward three, since its sums take
registers too; only the last part may be masked. A part is 256 columns, those of one warp, or as
much wider as that number of parts asks for; 16 warps are the most that devices of 64 threads a warp
can start. Above D = 8,192 the sums of the backward no longer fit beside the row.

{settings(widths)}

Of attention a tile is as large as the registers of 4 or 8 warps take without spilling.

{tiles(HEAD_WIDTHS)}

## Bytes

What an op that fuses everything must read and write for an element of [N, T, D], counted from the
code; modulations and losses are too small to count.

{traffic()}

## Kernels

Stack, shared memory in bytes; instructions, and among them those that multiply matrices (wgmma), as
they lie in the code, a loop counts once.

{table(rows, HEADER)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    jobs = check.jobs((*args.widths, *HEAD_WIDTHS), (TARGET,))
    jobs = [job for job in jobs if args.case in job[2]]
    with ProcessPoolExecutor(args.workers) as pool:
        launches = [row for rows in pool.map(check.check_case, jobs) for row in rows]
    broken = [row for row in launches if row.error]
    for row in broken:
        print(f"{row.case}, {row.kernel}, D = {row.D}: {row.error}", file=sys.stderr)
    if broken or not launches:
        return 1
    args.out.write_text(document(launches, args.widths), encoding="utf-8")
    print(f"{len(launches)} launches in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
