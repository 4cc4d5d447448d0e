"""The recurrent-depth model on the prose that ships with Python: what is compared and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.study.experiment import Experiment, Records, draw_comparison
from benchmarks.study.quality import BITS
from benchmarks.study.text import (
    add_scores,
    next_token_measure,
    not_scored,
    quality_columns,
    scored_text,
    stored_scores,
    text_and_training,
)
from dblocks.recipes.autoregressive import PUBLISHED
from dblocks.recipes.columns import RECURRENT, SAMPLES, bits
from dblocks.recipes.recurrent import STEPS, RecurrentRun
from dblocks.recipes.tables import COSTS, Column, Record, Rows, mean, spread
from dblocks.recipes.text_run import PROMPT

# Seconds of a step end to end over those of a step of the block, and of the block as published:
# medians of steps taken in turn on one thread of a shared CPU (1.84, .304 and .479 s; .70 and .185
# s when it was quiet), with 33 recurrences, the mean of those drawn.
SECONDS_RATIO, PUBLISHED_RATIO = 6, 3.8

# Layer evaluations of a step. A block runs the 2 + 4 + 2 layers of prelude, core and coda. As
# published the prelude runs on clean rows, and core and coda on clean and on noisy ones, but for
# the last layer, whose clean rows give keys and values only. End to end it is 2 + 4 * 33 + 2 on the
# average.
BLOCK_LAYERS, PUBLISHED_LAYERS, END_TO_END_LAYERS = 8, 13, 136

PUBLISHED_BLOCK = RecurrentRun(**PUBLISHED)
PUBLISHED_LONG = RecurrentRun(steps=round(PUBLISHED_RATIO * PUBLISHED_BLOCK.steps), **PUBLISHED)
BLOCKS = RecurrentRun(steps=round(PUBLISHED_BLOCK.steps * PUBLISHED_LAYERS / BLOCK_LAYERS))
END_TO_END = RecurrentRun(end_to_end=True)
BLOCKS_LONG = RecurrentRun(steps=SECONDS_RATIO * END_TO_END.steps)
END_TO_END_SHORT = RecurrentRun(
    end_to_end=True, steps=round(PUBLISHED_LONG.steps * PUBLISHED_LAYERS / END_TO_END_LAYERS)
)
ROWS: Mapping[str, tuple[str, RecurrentRun]] = {
    "blocks_long": (f"1 block, {SECONDS_RATIO} times the steps (equal seconds)", BLOCKS_LONG),
    "blocks": ("1 block, a tenth of the layer evaluations", BLOCKS),
    "published_long": (
        f"1 block as published, {PUBLISHED_RATIO} times the steps (equal seconds)", PUBLISHED_LONG
    ),
    "published": ("1 block as published, equal steps", PUBLISHED_BLOCK),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_short": ("end to end, layer evaluations of the first", END_TO_END_SHORT),
}  # fmt: skip
# 2e-3 was best in short runs, 300 block steps and 60 end to end; longer ones want no more.
LRS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SHORTER = {"blocks": 1, "published_long": 2, "published": 1, "end_to_end": 2}
# Half of "end_to_end" is about as long as the short row.
RATES_OF = {"blocks_long": "blocks", "end_to_end_short": "end_to_end"}


def run_of(record: Record) -> RecurrentRun:
    """The run that made a record."""
    return RecurrentRun.from_dict(record["run"])


def main_samples(record: Record) -> str:
    """The name of a record's samples with several steps."""
    return str(run_of(record).sample_steps)


def recurrence_bits(record: Record, steps: str) -> float | None:
    """Bits of these windows with so many recurrences; None in blocks, but for one step."""
    if not record["run"]["end_to_end"] and steps != "1":
        return None
    return record["bits_by_steps"].get(steps)


def layers_per_character(record: Record, steps: int | None = None) -> int:
    """Layer evaluations that writing a character takes, with the characters before it cached.

    With P, C and D layers in prelude, core and coda, as one block with K Euler steps
    `P + K (C + D)`. As published `P + (C + D - 1) + K (C + D)`: the clean row of the character
    before goes through all but the last layer, the noisy one K times through core and coda. End to
    end `P + r C + D` with r recurrences. The steps are those of the main samples by default.
    """
    run = run_of(record)
    steps = run.sample_steps if steps is None else steps
    if run.end_to_end:
        return run.prelude + steps * run.depth + run.coda
    layers = run.depth + run.coda
    clean = layers - 1 if run.rows == "doubled" else 0
    return run.prelude + clean + steps * layers


def by_steps(head: str, value: Callable[[Record, str], float | None]) -> tuple[Column, ...]:
    """A line for each number of Euler steps, or recurrences, under a line that names them."""

    def column(n: int) -> Column:
        return Column(f"  {n}", lambda records: spread(records, lambda r: value(r, str(n)), ".2f"))

    return (Column(f"{head}:", lambda _: ""), *map(column, STEPS))


COST_COLUMNS = (
    Column("Parameters", lambda r: f"{r[0]['parameters']:,}"),
    Column("Layer evaluations to write a character", lambda r: f"{layers_per_character(r[0])}"),
    Column("Seconds a training step", lambda r: f"{seconds_per_step(r):.3f}"),
)
COLUMNS = (
    *RECURRENT,
    *by_steps(
        "Bits of these windows, by recurrences",
        recurrence_bits,
    ),
    *quality_columns(main_samples),
    *by_steps(
        "Samples: bits per character, by Euler steps or recurrences",
        lambda r, n: r.get("scores", {}).get(n, {}).get("bits"),
    ),
    *COST_COLUMNS,
    *COSTS,
)


def seconds_per_step(records: Sequence[Record]) -> float:
    """Of training alone, the mean over the records of a row."""
    return mean(records, "seconds") / records[0]["run"]["steps"]


def finish(folder: Path, records: Mapping[str, Records]) -> None:
    """Adds the samples' scores."""
    add_scores(folder, records, main_samples)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    records = {row: rows[title] for row, (title, _) in ROWS.items() if title in rows}
    every = [many[0] for many in records.values()]
    parts = [_training(every[0], rows), _rates(), _layers(every[0])]
    if {"blocks", "end_to_end"} <= records.keys():
        parts.append(_equal(records))
    first = next((r for r in every if not r["run"]["end_to_end"]), every[0])
    parts.append(_measures(first, scored_text(rows)) + not_scored(rows))
    return " ".join(parts)


def _training(first: Record, rows: Rows) -> str:
    run, model = first["run"], first["model"]
    return (
        f"A recurrent-depth model, {model['prelude']} layers before, {model['core']} in, and "
        f"{model['coda']} after the core, of width {run['width']}, "
        f"{text_and_training(rows)}. End to end, as Huginn, a step applies the "
        f"core about {run['mean_recurrence']} times on the average and backpropagates through the "
        f"last {run['backprop_depth']}; as a block it applies the core once, at a drawn noise "
        "level. The block has more parameters, as its core and coda have AdaLN. As published, it "
        "has doubled rows, a learned head, and draws within its own range only."
    )


def _rates() -> str:
    steps = [f"{ROWS[row][1].steps // shorter:,}" for row, shorter in SHORTER.items()]
    return (
        f"Learning rates are the best of {{{', '.join(f'{lr:g}' for lr in LRS)}}} on the tenth "
        f"before the held-out one: in runs of {', '.join(steps)} steps, in the order of the "
        "columns; other rows take over the rate of the same network."
    )


def _layers(first: Record) -> str:
    return (
        "A layer evaluation is one batch of rows through one layer, whether gradients go through "
        "it or not; in doubled rows clean and noisy ones count each, but in the prelude there are "
        "clean ones only, and in the last layer they give keys and values only. End to end their "
        "number is drawn, and that of the first seed. Saved activations are those of "
        f"{first['run']['mean_recurrence']} recurrences."
    )


def _equal(records: Mapping[str, Sequence[Record]]) -> str:
    blocks, whole = records["blocks"], records["end_to_end"]
    steps = whole[0]["layer_evaluations"] / blocks[0]["layers_per_step"]
    return (
        f'"Equal seconds" assume that a step end to end takes {SECONDS_RATIO} times as long as one '
        f"of the block, and {PUBLISHED_RATIO} times as one of the block as published: medians of "
        "steps taken in turn; the seconds in the table were taken beside other jobs. As many layer "
        f"evaluations as end to end would take a block {steps:,.0f} steps: hence the row that "
        "trains end to end with about as many as the longer blocks."
    )


def _measures(first: Record, scored: str | None) -> str:
    run = first["run"]
    one = layers_per_character(first, 1)
    return (
        "The next token's bits are as a block those of one call from sigma_max, end to end those "
        f"of {run['mean_recurrence']} recurrences. {first['windows']} windows are spread evenly "
        f"over the held-out text{_of_draws(first)}. Samples continue "
        f"{SAMPLES} places of the held-out text by {run['context'] - PROMPT} characters at "
        f"temperature 1, as a block with {main_samples(first)} Euler steps, end to end with "
        f"{run['mean_recurrence']} recurrences, unless a line says otherwise; with one Euler step "
        f"a character takes {one} layer evaluations. The other model is the plain one of the "
        "autoregressive table"
        + (f"; the held-out text in the samples' place has {scored}." if scored else ".")
    )


def _of_draws(record: Record) -> str:
    # Records of the time before the bound have the mean of several draws.
    if "draws" not in record:
        return ""
    return (
        f"; their bits are of the mean probabilities of {record['draws']} draws of the noise or of "
        "the initial state"
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: bits per character against layer evaluations, and the noise."""
    draw_comparison(
        rows,
        path,
        lambda point: point["bits"],
        title="A recurrent-depth language model on Python's documentation",
        measure=next_token_measure(rows),
    )


EXPERIMENT = Experiment(
    name="recurrent-pydoc",
    rows=ROWS,
    lrs=LRS,
    selection_shorter=SHORTER,
    rates_of=RATES_OF,
    quality=BITS,
    headline=lambda record: f"{bits(record):.3f} bits per character",
    columns=COLUMNS,
    caption=caption,
    draw=draw,
    finish=finish,
    stored=stored_scores,
)
