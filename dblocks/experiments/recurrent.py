"""The recurrent-depth model on the prose that ships with Python: what is compared and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dblocks.experiments._base import Experiment, draw_comparison
from dblocks.experiments._text import (
    add_scores,
    quality_columns,
    reference_scores,
    text_and_training,
)
from dblocks.metrics import mean_std
from dblocks.plots import Measure
from dblocks.recipes._text import PROMPT, SAMPLES
from dblocks.recipes.recurrent import DRAWS, SAMPLE_STEPS, STEPS, STEPS_WINDOWS, RecurrentRun
from dblocks.report import COSTS, README_COSTS, Column, Record, Rows, mean, spread

BITS = Measure(
    label="bits a character, first 2,100 held-out characters",
    title="Next-token bits against the layers run in training",
    form="{:.2f} bits",
    best=1.0,
    step=0.5,
)

# Seconds of a step end to end over those of a block step: medians of steps taken in turn on one
# thread of a shared CPU (0.70 s and 0.185 s), with 33 recurrences, the mean of those drawn.
SECONDS_RATIO = 3.8
BLOCKS = RecurrentRun()
BLOCKS_LONG = RecurrentRun(steps=round(SECONDS_RATIO * BLOCKS.steps))
END_TO_END = RecurrentRun(end_to_end=True)
ROWS: Mapping[str, tuple[str, RecurrentRun]] = {
    "blocks_long": (f"1 block, {SECONDS_RATIO:g} times the steps (equal seconds)", BLOCKS_LONG),
    "blocks": ("1 block, equal steps", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
}
LRS = (1e-3, 2e-3, 4e-3)


def bits(record: Record) -> float:
    """Bits per character of the held-out text: one Euler step, or the mean recurrences."""
    return record["bits"]


def bits_of_sampling(record: Record) -> float:
    """The same of its first windows, with the steps of the samples; in blocks a bound."""
    return record["bits_by_steps"][main_samples(record)]


def main_samples(record: Record) -> str:
    """The name of a record's samples with several steps."""
    run = record["run"]
    return str(run["mean_recurrence"] if run["end_to_end"] else SAMPLE_STEPS)


BITS_COLUMNS = (
    Column("Bits a character, next token", lambda r: spread(r, bits, ".3f")),
    Column(
        f"Bits a character, {SAMPLE_STEPS} Euler steps (bound)",
        lambda r: "-" if r[0]["run"]["end_to_end"] else spread(r, bits_of_sampling, ".3f"),
    ),
)
STEP_COLUMN = Column(
    "Seconds a training step", lambda r: f"{mean(r, 'seconds') / r[0]['run']['steps']:.3f}"
)
COLUMNS = (*BITS_COLUMNS, *quality_columns(main_samples), STEP_COLUMN, *COSTS)
README_COLUMNS = (
    Column("Learning rate", lambda r: f"{r[0]['run']['lr']:g}"),
    *BITS_COLUMNS,
    *quality_columns(main_samples),
    STEP_COLUMN,
    *README_COSTS,
)


def against_steps(rows: Rows, value: Callable[[Record, str], float]) -> str:
    """For each line the mean of a value against the number of steps, in words."""
    texts = []
    for name, records in rows.items():
        means = [mean_std([value(r, str(n)) for r in records])[0] for n in STEPS]
        texts.append(f"{', '.join(f'{x:.2f}' for x in means)} ({name})")
    return "; ".join(texts)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    first = next(iter(rows.values()))[0]
    run, model = first["run"], first["model"]
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    steps = ", ".join(map(str, STEPS))
    bits_against = against_steps(rows, lambda r, n: r["bits_by_steps"][n])
    samples_against = against_steps(rows, lambda r, n: r["scores"][n]["bits"])
    return (
        f"A recurrent-depth model, {model['prelude']} layers before, {model['core']} in, and "
        f"{model['coda']} after the core, of width {run['width']}, "
        f"{text_and_training(first, EXPERIMENT.seeds)}. End to end, as Huginn, a step applies the "
        f"core about {run['mean_recurrence']} times on the average and backpropagates through the "
        f"last {run['backprop_depth']}; as a block it applies the core once, at a drawn noise "
        f"level. Equal seconds are {SECONDS_RATIO:g} times the steps, the measured ratio of the "
        f"seconds of a step. Each line's learning rate is the best of {{{rates}}} on the tenth "
        "before the held-out one, in runs of a third of the steps. A layer evaluation is one "
        "batch of rows through one layer, whether gradients go through it or not; as a block "
        "clean and noisy rows count each, but in the prelude there are clean ones only, and in "
        "the last layer they give keys and values only. The layer evaluations are not equal in "
        "any two lines, and end to end those of the first seed. The next token's bits are as a "
        f"block those of one call from sigma_max, end to end those of {run['mean_recurrence']} "
        "recurrences. After more Euler steps a token's probability depends on the noise, and the "
        f"mean of {DRAWS} draws bounds the bits from above, loosely, as each draw decides for one "
        f"token. Samples continue {SAMPLES} places of the held-out text by "
        f"{run['context'] - PROMPT} characters at temperature 1, as a block with {SAMPLE_STEPS} "
        f"Euler steps; the held-out text in its place reaches {reference_scores(first)}. With "
        f"{steps} Euler steps or recurrences, bits a character of {STEPS_WINDOWS} held-out "
        f"windows: {bits_against}; samples under the other model: {samples_against}. The other "
        "model is the plain one of the autoregressive table."
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: bits a character against layer evaluations, and the noise."""
    draw_comparison(
        rows,
        path,
        lambda point: point["bits"],
        title="A recurrent-depth language model on Python's documentation",
        measure=BITS,
    )


EXPERIMENT = Experiment(
    name="recurrent-pydoc",
    rows=ROWS,
    lrs=LRS,
    selection_shorter=dict.fromkeys(ROWS, 3),
    error=bits,
    headline=lambda record: f"{bits(record):.3f} bits a character",
    columns=COLUMNS,
    readme_columns=README_COLUMNS,
    caption=caption,
    draw=draw,
    finish=add_scores,
)
