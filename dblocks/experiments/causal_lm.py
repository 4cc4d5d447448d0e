"""The language model on the prose that ships with Python: what is compared, and what judges it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dblocks.experiments._base import Experiment, draw_comparison
from dblocks.experiments._text import (
    QUALITY,
    add_scores,
    next_token_measure,
    quality_columns,
    reference_scores,
    score,
    text_and_training,
)
from dblocks.recipes._text import PROMPT, SAMPLES
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.report import COSTS, README_COSTS, Column, Record, Rows, spread

# A layer is evaluated once a step end to end; in blocks twice, on clean and on noisy rows, but the
# last layer of a block once, as its clean rows give keys and values only: 7 a step in 4 layers.
BLOCKS = CausalLMRun(blocks=3, steps=1440)
END_TO_END = CausalLMRun(end_to_end=True, steps=840)
END_TO_END_LONG = CausalLMRun(end_to_end=True, steps=1440)
ROWS: Mapping[str, tuple[str, CausalLMRun]] = {
    "blocks": ("3 blocks, equal layer evaluations", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_long": ("end to end, 1.7 times the steps (equal samples)", END_TO_END_LONG),
}
LRS = (5e-4, 1e-3, 2e-3)


def bits(record: Record) -> float:
    """Bits per character of the held-out text; in blocks of the first block alone."""
    return record["bits"]


def bits_of_all_blocks(record: Record) -> float | None:
    """The bound with a denoising step for each block; None end to end."""
    return record["bits_by_denoising_steps"].get(str(record["run"]["blocks"]))


def main_samples(record: Record) -> str:
    """The name of a record's samples with a step for each block, or of the plain model's."""
    return "plain" if record["run"]["end_to_end"] else str(record["run"]["blocks"])


BITS_COLUMNS = (
    Column("Bits a character, next token", lambda r: spread(r, bits, ".3f")),
    Column("Bits a character, all blocks (bound)", lambda r: spread(r, bits_of_all_blocks, ".3f")),
)
COLUMNS = (*BITS_COLUMNS, *quality_columns(main_samples), *COSTS)
README_COLUMNS = (*BITS_COLUMNS[:1], *quality_columns(main_samples), *README_COSTS)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    first = next(iter(rows.values()))
    run = first[0]["run"]
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    one_step = ", ".join(spread(first, score(n, lambda _: "1"), form) for n, _, form in QUALITY)
    return (
        f"A Llama-like model of {run['depth']} layers and width {run['width']} "
        f"{text_and_training(first[0], EXPERIMENT.seeds)}. Each line's learning rate is the best "
        f"of {{{rates}}} on the tenth before the held-out one, in runs of a third of the steps. A "
        "layer evaluation is one batch of rows through one layer: in blocks clean and noisy rows "
        "count each, but in a block's last layer, where clean rows give keys and values only. "
        '"Next token" is in blocks the first block alone, one call from sigma_max; "all blocks" '
        f"takes the probabilities of the last of {run['blocks']} Euler steps, and bounds the bits "
        f"from above. Samples continue {SAMPLES} places of the held-out text by "
        f"{run['context'] - PROMPT} characters at temperature 1, in blocks with a step for each "
        f"block; with the first block alone they reach, in the order of the columns, {one_step}; "
        f"the held-out text in its place {reference_scores(first[0])}. The other model is trained "
        "as the last line, from another seed."
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: bits a character against layer evaluations, and the noise."""
    draw_comparison(
        rows,
        path,
        lambda point: point["bits"],
        title="A 12-layer language model on Python's documentation, end to end and in blocks",
        measure=next_token_measure(rows),
    )


EXPERIMENT = Experiment(
    name="causal-lm-pydoc",
    rows=ROWS,
    lrs=LRS,
    selection_shorter={"blocks": 3, "end_to_end": 3, "end_to_end_long": 3},
    error=bits,
    headline=lambda record: f"{bits(record):.3f} bits a character",
    columns=COLUMNS,
    readme_columns=README_COLUMNS,
    caption=caption,
    draw=draw,
    finish=add_scores,
)
