"""Prints the targets of the kernels and their times in a cycle model, or host times.

    python -m benchmarks.kernels.model                   every row, about three minutes on 2 cores
    python -m benchmarks.kernels.model --only "adaln fwd" --widths 1152 python -m
    benchmarks.kernels.model launches          the launch of each row python -m
    benchmarks.kernels.model host              microseconds a call on the host

Nothing here is measured on a GPU. The library's launches are compiled for sm_90 with their own
settings, and a cycle model of one multiprocessor with its share of DRAM bandwidth (smsim.cpp) runs
the machine code. The model is an upper bound for ranking variants, with a resolution of .05 of a
copy for rows and 10 % for attention; it is not a forecast. It runs both sides of branches, has no
instruction cache, bank conflicts or limits of L2, and counts a spilled register as one instruction.
Statistics count as one read per lane. TFLOP/s are those of a loop's steady state with keys in L2.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from benchmarks.kernels import check
from benchmarks.kernels.model import table

COMMANDS = ("kernels", "launches", "host")


def figure(index: int) -> table.Figure:
    """The figure of one row, or why it cannot be modelled."""
    try:
        return table.table()[index].model()
    except Exception as error:
        return table.Figure(f"FAIL {type(error).__name__}: {str(error)[-200:]}", False, "")


def launches() -> int:
    """Prints the launch of every row without compiling it."""
    for row in table.table():
        print(row.kernel, row.width, row.launch().fn.__name__)
    return 0


def kernels(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a row could not be modelled."""
    rows = table.table()
    chosen = [
        i
        for i, row in enumerate(rows)
        if any(name in row.kernel for name in args.only)
        and (not args.widths or row.width in args.widths)
    ]
    print(f"Modelled for an H200, not measured; triton {check.triton.__version__}\n")
    print("| kernel | width | model | wanted | | compiled |\n|---|---|---|---|---|---|")
    missed = failed = 0
    with ProcessPoolExecutor(args.workers) as pool:
        for i, found in zip(chosen, pool.map(figure, chosen), strict=True):
            row = rows[i]
            missed += not found.reached
            failed += found.text.startswith("FAIL")
            word = "" if found.reached else "missed"
            cells = (row.kernel, row.width, found.text, row.wanted, word, found.code)
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(chosen)} rows, {missed} below the goal")
    return 1 if failed or not chosen else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", nargs="?", default="kernels", choices=COMMANDS)
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name contains this")
    parser.add_argument("--widths", nargs="+", default=None, help="of the second column")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "host":
        from benchmarks.kernels.model import host

        return host.main()
    return launches() if args.what == "launches" else kernels(args)


if __name__ == "__main__":
    sys.exit(main())
