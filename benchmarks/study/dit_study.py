"""The diffusion transformer: end to end, small and in blocks, and ablations of the blocks.

Ablations change one choice of three blocks at a time, at half of the budget of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, get_args

from benchmarks.study.ablation import AblationRun
from benchmarks.study.ensembles.runs import EnsembleDiTRun
from benchmarks.study.quality import L2
from benchmarks.study.rows import Row, Study
from dblocks.recipes.columns import DIT_QUALITY, l2_loss
from dblocks.recipes.dit import DiTRun
from dblocks.recipes.tables import COSTS, Column, spread
from dblocks.schedules.noise import Partition

BUDGET = 12_000  # layer evaluations
ABLATION_BUDGET = BUDGET // 2
SEEDS = (0, 1)
SPLITS = ((4, 4, 4), (2, 4, 6), (6, 4, 2))
BLOCKS = (2, 3, 4, 6, 12)  # and 1, end to end
OVERLAPS = (0.0, 0.05, 0.1, 0.2)
TOP_SHARES = (0.0, 0.1, 0.3)
WEIGHTINGS = ("edm", "clamped", "none", "batch_mean")
GRID = (2e-3, 4e-3, 8e-3)
METHOD = "DiffusionBlocks"
FASHION = AblationRun(data="fashion-mnist", patch_size=4, samples=2000, steps=1, points=3)
DIGITS = AblationRun(samples=500, steps=1, points=3)


def rows_of(run: AblationRun, hours: float) -> list[Row]:
    """Every ablation; all take over the learning rate of 3 blocks, but for 1 block, end to end.

    Args:
        run: what they have in common.
        hours: predicted for a run.
    """
    base = with_blocks(run, 3)
    first = Row(
        name="base", title="3 blocks", method=METHOD, part="base", run=base, lrs=GRID, shorter=1,
        seeds=SEEDS, hours=hours,
    )  # fmt: skip
    changed = [
        *_partitions(base),
        *((f"blocks_{n}", f"{n} blocks", "blocks", with_blocks(base, n)) for n in BLOCKS if n != 3),
        *_of("overlap", OVERLAPS, base),
        *_of("top_share", TOP_SHARES, base),
        *_of("weighting", WEIGHTINGS, base),
    ]
    rows = [
        dataclasses.replace(
            first, name=name, title=title, part=part, run=made, lrs=(), rate_of="base"
        )
        for name, title, part, made in changed
    ]
    samplers = dataclasses.replace(base, samplers=True)
    judged = dataclasses.replace(
        first, name="samplers", title="3 blocks, steps of Euler and Heun", part="samplers",
        run=samplers, lrs=(), rate_of="base", hours=5 * hours,
    )  # fmt: skip
    whole = dataclasses.replace(
        first, name="blocks_1", title="1 block, end to end", method="end to end", part="blocks",
        run=end_to_end(run, ABLATION_BUDGET),
    )  # fmt: skip
    return [first, whole, *rows, judged]


def with_blocks(run: AblationRun, blocks: int) -> AblationRun:
    """The run in so many blocks, with as many steps as the budget has."""
    return dataclasses.replace(run, blocks=blocks, steps=ABLATION_BUDGET * blocks // run.depth)


Run = TypeVar("Run", bound=DiTRun)


def end_to_end(run: Run, budget: int) -> Run:
    """The same denoiser as one block of all layers."""
    return dataclasses.replace(run, end_to_end=True, steps=budget // run.depth)


def final_rows(run: AblationRun, hours: float) -> list[Row]:
    """End to end, a small network, blocks, and end to end with as many samples, at the budget."""
    small = dataclasses.replace(run, depth=run.depth // 3)
    shared = {f.name: getattr(run, f.name) for f in dataclasses.fields(DiTRun)}
    members = EnsembleDiTRun(
        **{**shared, "end_to_end": True, "steps": BUDGET * 3 // run.depth}, members=3
    )
    blocks = dataclasses.replace(run, blocks=3, steps=BUDGET * 3 // run.depth)
    made = (
        ("end_to_end", "end to end", "end to end", end_to_end(run, BUDGET), 1),
        ("small", "a DiT of 4 layers, end to end", "small plain", end_to_end(small, BUDGET), 1),
        ("small_ensemble", "3 DiTs of 4 layers, averaged", "small plain", members, 1),
        ("blocks", "3 blocks", METHOD, blocks, 1),
        (
            "end_to_end_3x",
            "end to end, 3 times the steps (equal samples)",
            "end to end",
            end_to_end(run, 3 * BUDGET),
            3,
        ),
    )
    return [
        Row(
            name=name, title=title, method=method, run=of, hours=longer * hours, seeds=(0, 1, 2),
            lrs=() if longer > 1 else GRID, rate_of="end_to_end" if longer > 1 else None,
        )
        for name, title, method, of, longer in made
    ]  # fmt: skip


Changed = tuple[str, str, str, AblationRun]


def _partitions(base: AblationRun) -> Iterable[Changed]:
    """Every partition with every split of the layers, but for that of the base."""
    partitions: Sequence[Partition] = get_args(Partition)
    for partition in partitions:
        for split in SPLITS:
            if (partition, split) == ("equal_mass", SPLITS[0]):
                continue
            name = f"{partition}_{''.join(map(str, split))}"
            title = f"{partition}, {'/'.join(map(str, split))} layers"
            made = dataclasses.replace(base, partition=partition, layers=split)
            # A step on a block runs its own layers, 4 on the average whatever the split.
            yield name, title, "partition", made


def _of(field: str, values: Iterable[Any], base: AblationRun) -> Iterable[Changed]:
    """A field at every value but that of the base."""
    default = getattr(base, field)
    same = {default, "edm"} if default == "auto" else {default}  # which auto is for L2
    for value in values:
        if value not in same:
            made = dataclasses.replace(base, **{field: value})
            name = f"{field}_{value}".replace("0.", "")
            yield name, f"{field} {value}", field, made


COLUMNS = (
    *DIT_QUALITY,
    Column("held-out L2 loss", lambda r: spread(r, l2_loss, ".4f")),
    *COSTS,
)


study_of = partial(
    Study,
    quality=L2,
    headline=lambda record: f"loss {l2_loss(record):.4f}",
    columns=COLUMNS,
)
FASHION_FINAL = study_of(
    name="dit-fashion",
    title="a 12-layer DiT of width 64, patches of 4, on Fashion-MNIST",
    # With the options of the ablations: runs that choose rates are the same and need not run twice.
    rows=final_rows(FASHION, hours=0.2),
)
FASHION_STUDY = study_of(
    reference="base",
    name="dit-fashion-ablations",
    title="a 12-layer DiT of width 64 in blocks, patches of 4, on Fashion-MNIST",
    rows=rows_of(FASHION, hours=0.12),
)
DIGITS_STUDY = study_of(
    reference="base",
    name="dit-digits-ablations",
    title="a 12-layer DiT of width 64 in blocks, patches of 2, on handwritten digits",
    rows=[dataclasses.replace(row, planned=False) for row in rows_of(DIGITS, hours=0.04)],
)
