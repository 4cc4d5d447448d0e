"""The study of the vision transformer: every method on digits and on Fashion-MNIST."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.study import vit
from benchmarks.study.layers import SPLITS, ViTLayersRun
from benchmarks.study.methods.run import Method, MethodRun, steps_of
from benchmarks.study.quality import ACCURACY
from benchmarks.study.rows import Row, Study
from benchmarks.study.self_conditioning import vit as self_conditioned
from dblocks.recipes.columns import accuracy
from dblocks.recipes.tables import COSTS, Column, percent

GRID = (1e-3, 2e-3, 4e-3)
Rates = Callable[[str], Sequence[float]]  # of a row
# By what the steps of equal samples are divided where their rate is chosen, as `vit` does.
LONGER_SHORTER = {"vit-digits": 5}
# Shares of the final rows' layer evaluations: with these themselves a curve over a factor of 8.
BUDGETS = (0.5, 2, 4)
SECONDS = {"vit-digits": 0.02, "vit-fashion": 0.024}  # of a layer evaluation on one core, measured

# Name, title, kind of training, method, units of layers.
METHODS: Sequence[tuple[str, str, str, Method, int]] = (
    ("greedy_12", "greedy, a head after each layer", "greedy layer-wise", "greedy", 12),
    ("greedy_3", "greedy, a head after 4 layers", "greedy layer-wise", "greedy", 3),
    (
        "forward_forward",
        "contrastive Forward-Forward, each layer",
        "Forward-Forward",
        "forward_forward",
        12,
    ),
    ("noprop_12", "NoProp-DT, 12 blocks of a layer", "NoProp", "noprop", 12),
    ("noprop_3", "NoProp-DT, 3 blocks of 4 layers", "NoProp", "noprop", 3),
    ("small_ensemble", "3 plain ViTs of 4 layers, averaged", "small plain", "ensemble", 3),
)
# The name and title of rows that `vit` has, what they are, and whose rate they take over.
SHARED = (
    ("end_to_end", "end to end", None),
    ("small", "small plain", None),
    ("blocks", "DiffusionBlocks", None),
    ("ensemble", "DiffusionBlocks", "blocks"),
    ("published", "DiffusionBlocks", None),
)


def rows_of(study: str, table: vit.Table, lrs: Rates, *, flip: bool, shorter: int) -> list[Row]:
    """Every method at equal layer evaluations.

    Args:
        study: its name.
        table: the rows of `vit` on these data.
        lrs: the learning rates that were tried for each of them.
        flip: mirror the views of Forward-Forward.
        shorter: by what the steps of `vit`'s rows are divided where rates are chosen.
    """
    whole = table["end_to_end"][1]
    budget = whole.steps * whole.depth
    hours = budget * SECONDS[study] / 3600
    rows = [
        Row(
            name=name,
            title=table[name][0],
            method=method,
            run=table[name][1],
            lrs=() if rate_of else lrs(name),
            rate_of=rate_of,
            shorter=shorter,
            hours=hours,
        )
        for name, method, rate_of in SHARED
    ]
    longer, own = table["end_to_end_3x"], LONGER_SHORTER.get(study)
    rows.append(
        Row(
            name="end_to_end_3x", title=longer[0], method="end to end", part="samples",
            run=longer[1], hours=3 * hours,
            lrs=lrs("end_to_end_3x") if own else (),
            rate_of=None if own else "end_to_end",
            shorter=own or 1,
        )
    )  # fmt: skip
    for name, title, kind, method, units in METHODS:
        run = MethodRun(
            method=method, blocks=units, steps=1, data=whole.data, points=whole.points, flip=flip
        )
        run = steps_of(run, budget)
        rows.append(Row(name=name, title=title, method=kind, run=run, lrs=GRID, hours=hours))
    return rows


def curve_of(rows: Sequence[Row]) -> list[Row]:
    """Points of the curve over the budget, of the rows that it has lines for."""
    lines = ("end_to_end", "blocks", "small")
    return [_at(row, share) for row in rows if row.name in lines for share in BUDGETS]


def _at(row: Row, share: float) -> Row:
    """A point of the curve: with the learning rate of the full budget, in one run."""
    run = dataclasses.replace(row.run, steps=round(row.run.steps * share))
    return dataclasses.replace(
        row,
        name=f"{row.name}_x{share:g}",
        title=f"{row.title}, {share:g} times the budget",
        part="budget",
        run=run,
        lrs=(),
        rate_of=row.name,
        seeds=(0,),
        hours=row.hours * share,
    )


def layers_of(rows: Sequence[Row]) -> list[Row]:
    """Blocks of unequal layers, at the rate of equal ones; a step runs 4 on the average."""
    (row,) = (row for row in rows if row.name == "blocks")
    return [
        dataclasses.replace(
            row,
            name=f"blocks_{''.join(map(str, layers))}",
            title=f"3 blocks of {', '.join(map(str, layers))} layers",
            run=ViTLayersRun(**vars(row.run), layers=layers),
            lrs=(),
            rate_of=row.name,
            planned=False,
        )
        for layers in SPLITS
    ]


def last_head(record: Any) -> float | None:
    """The best accuracy of a head that is not the last; None where there are no others."""
    heads = record.get("heads")
    return max(heads[:-1]) if heads and len(heads) > 1 else None


COLUMNS = (
    Column("held-out accuracy", lambda r: percent(r, accuracy)),
    Column("best head before the last", lambda r: percent(r, last_head)),
    *COSTS,
)


study_of = partial(
    Study,
    quality=ACCURACY,
    headline=lambda record: f"{100 * accuracy(record):.1f} %",
    columns=COLUMNS,
)


_FASHION = rows_of("vit-fashion", vit.CLOTHES, lambda _: GRID, flip=True, shorter=2)
FASHION = study_of(
    name="vit-fashion",
    title="a 12-layer ViT of width 64 on Fashion-MNIST",
    rows=[
        *_FASHION,
        *curve_of(_FASHION),
        *layers_of(_FASHION),
        *self_conditioned.rows_of(_FASHION, 12_000),
    ],
)
DIGITS = study_of(
    name="vit-digits",
    title="a 12-layer ViT of width 64 on handwritten digits",
    rows=rows_of("vit-digits", vit.DIGITS, vit.EXPERIMENT.rates, flip=False, shorter=1),
)
