"""The masked diffusion model on the prose that ships with Python: what is compared and judged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.study import quality
from benchmarks.study.experiment import Experiment, draw_comparison
from benchmarks.study.plots import Measure, mask_panel
from benchmarks.study.text import (
    add_scores,
    not_scored,
    quality_columns,
    scored_text,
    stored_scores,
    text_and_training,
)
from dblocks.recipes.columns import MASKED_LM, SAMPLES, bits
from dblocks.recipes.masked_lm import POINT_WINDOWS, SAMPLED, MaskedLMRun
from dblocks.recipes.tables import COSTS, Rows
from dblocks.recipes.text_run import PROMPT

BITS = Measure(
    label=f"bits per character (bound), {POINT_WINDOWS} held-out windows",
    title="The bound against the layers run in training",
    form="{:.2f} bits",
    best=1.5,
    step=0.5,
)

BLOCKS = MaskedLMRun(blocks=3)
END_TO_END = MaskedLMRun(end_to_end=True, steps=BLOCKS.steps // 3)
END_TO_END_LONG = MaskedLMRun(end_to_end=True)
ROWS: Mapping[str, tuple[str, MaskedLMRun]] = {
    "blocks": ("3 blocks, equal layer evaluations", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_long": ("end to end, 3 times the steps (equal samples)", END_TO_END_LONG),
}
LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)


QUALITY_COLUMNS = quality_columns(lambda _: SAMPLED)
COLUMNS = (*MASKED_LM, *QUALITY_COLUMNS, *COSTS)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    first = next(iter(rows.values()))[0]
    run = first["run"]
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    chosen = ", ".join(f"{records[0]['run']['lr']:g}" for records in rows.values())
    scored = scored_text(rows)
    return (
        f"A masked diffusion model (bidirectional, {run['depth']} layers of width {run['width']}) "
        f"{text_and_training(rows)}. End to end is the same network as one "
        f"block over all mask ratios. Learning rates are the best of {{{rates}}} on the tenth "
        "before the held-out one, in runs as long, the last column's that of the one before: "
        f"{chosen}. Bits are the variational bound at {len(first['bits_by_share'])} evenly spaced "
        "mask ratios, each by the block that owns it; its standard error, of the first seed, is "
        "over the windows and how they were masked. Tokens are scored in random order, so that "
        "these are not the bits of a model that reads from left to right. Samples continue "
        f"{SAMPLES} places of the held-out text by {run['context'] - PROMPT} characters, in "
        f"{run['context']} steps at temperature 1; steps that unmask nothing are skipped. The "
        "other model is the plain one of the autoregressive table"
        + (f"; the held-out text in the samples' place has {scored}." if scored else ".")
        + not_scored(rows)
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: the bound against layer evaluations, and the blocks' shares."""
    draw_comparison(
        rows,
        path,
        lambda point: point["bits"],
        title="A 12-layer masked diffusion model on Python's documentation",
        measure=BITS,
        panel=mask_panel,
    )


EXPERIMENT = Experiment(
    name="masked-lm-pydoc",
    rows=ROWS,
    lrs=LRS,
    # Shorter runs know the frequencies of characters only, at any rate.
    selection_shorter={"blocks": 1, "end_to_end": 1},
    rates_of={"end_to_end_long": "end_to_end"},
    quality=quality.BITS,
    headline=lambda record: f"{bits(record):.3f} bits per character",
    columns=COLUMNS,
    caption=caption,
    draw=draw,
    finish=partial(add_scores, shown=lambda _: SAMPLED),
    stored=stored_scores,
)
