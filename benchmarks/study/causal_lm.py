"""The language model on the prose that ships with Python: what is compared, and what judges it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.study.experiment import Experiment, draw_comparison
from benchmarks.study.quality import BITS
from benchmarks.study.text import (
    QUALITY,
    add_scores,
    next_token_measure,
    not_scored,
    quality_columns,
    reference_scores,
    score,
    scored_by,
    stored_scores,
    text_and_training,
)
from dblocks.recipes.autoregressive import PUBLISHED
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.columns import CAUSAL_LM, SAMPLES, bits
from dblocks.recipes.tables import COSTS, Column, Record, Rows, spread
from dblocks.recipes.text_run import PROMPT

EVALUATIONS = 10_080  # of layers, in every row but the last

Table = Mapping[str, tuple[str, CausalLMRun]]


def rows_of(run: CausalLMRun) -> Table:
    """The rows of a comparison, by as many layer evaluations.

    A block of 4 of 12 layers takes 4 a step; in doubled rows 7, as clean and noisy rows count each,
    but in its last layer, where clean ones give keys and values only.
    """
    blocks = dataclasses.replace(run, blocks=3, depth=12, steps=EVALUATIONS // 4)
    whole = dataclasses.replace(blocks, end_to_end=True, steps=EVALUATIONS // 12)
    published = dataclasses.replace(blocks, steps=EVALUATIONS // 7, **PUBLISHED)
    return {
        "blocks": ("3 blocks", blocks),
        "ensemble": (
            "3 blocks, all draws at sigma_max",
            dataclasses.replace(blocks, top_share=1.0),
        ),
        "published": ("3 blocks, doubled rows, learned head", published),
        "small": (
            "a plain model of 4 layers",
            dataclasses.replace(whole, depth=4, steps=blocks.steps),
        ),
        "end_to_end": ("end to end", whole),
        "end_to_end_long": (
            "end to end, 3 times the steps (equal samples)",
            dataclasses.replace(whole, steps=blocks.steps),
        ),
    }


LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)
SHORTER = {"blocks": 3, "published": 3, "small": 3, "end_to_end": 1}
SEEDS = (0, 1, 2)
RATES_OF = {"ensemble": "blocks", "end_to_end_long": "end_to_end"}


def main_samples(record: Record) -> str:
    """The samples, of the product or the plain model, whose bits are nearest to the text's own.

    Of blocks without a product those with a step for each block.
    """
    kind = "plain" if record["run"]["end_to_end"] else "product"
    scores = record.get("scores", {})
    found = [name for name in scores if name.startswith(f"{kind}@")]
    if not found:
        return f"{record['run']['blocks']}@1"
    return min(found, key=lambda name: abs(scores[name]["bits"] - scores["reference"]["bits"]))


def euler_samples(record: Record) -> str | None:
    """The samples with an Euler step for each block; None end to end."""
    return None if record["run"]["end_to_end"] else f"{record['run']['blocks']}@1"


def temperature(record: Record) -> float | None:
    """That of `main_samples`; None where samples are not scored."""
    return float(main_samples(record).split("@")[1]) if "scores" in record else None


TEMPERATURE = Column("Samples: temperature", lambda r: spread(r, temperature, ".2f"))
COLUMNS = (*CAUSAL_LM, TEMPERATURE, *quality_columns(main_samples), *COSTS)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    every = list(rows.values())
    first = next((r for r in every if not r[0]["run"]["end_to_end"]), every[0])
    run, bound = first[0]["run"], first[0].get("bound", {}).get("std_error", math.nan)
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    return (
        f"A Llama-like model of {run['depth']} layers and width {run['width']} "
        f"{text_and_training(rows)}. Each column's learning rate is the best "
        f"of {{{rates}}} on the tenth before the held-out one, in runs of a third of the steps, "
        "end to end of all of them; all draws at sigma_max and equal samples take "
        "over the rates of the blocks and of end to end. A layer evaluation is one batch of rows "
        "through one layer. In blocks, the next token is the first block's, by one call from "
        "sigma_max; the product is the normalised geometric mean of all blocks' predictions there, "
        "as exact; the bound is that of the stochastic reverse process in the limit of small "
        "steps, not of Euler's method, and its standard error by the draws is "
        f"{bound:.3f} bits. Samples continue {SAMPLES} places of the "
        f"held-out text by {run['context'] - PROMPT} characters, in blocks by their product, at "
        "the temperature from .7 to 1 that brings their bits under another model nearest to the "
        f"held-out text's own{_scored(first)}. The other model is a plain one of 12 layers, "
        f"from another seed.{not_scored(rows)}"
    )


def _scored(first: Sequence[Record]) -> str:
    """What the held-out text scores, and samples by Euler steps, where they are scored."""
    euler = "; blocks without a product take an Euler step for each block at temperature 1"
    if not all("scores" in record for record in first):
        return euler
    found = ", ".join(
        spread(first, score(n, euler_samples), form)
        for n, _, form, _ in QUALITY
        if n in scored_by(first[0])
    )
    return (
        f" ({reference_scores(first[0])}, in the order of the lines below the temperature)"
        f"{euler}, with which the first column's samples have {found}"
    )


def experiment_of(name: str, run: CausalLMRun, what: str) -> Experiment:
    """A comparison of language models on a text called `what`."""

    def draw(rows: Rows, path: Path) -> None:
        draw_comparison(
            rows,
            path,
            lambda point: point["bits"],
            title=f"A 12-layer language model on {what}, end to end and in blocks",
            measure=next_token_measure(rows),
        )

    return Experiment(
        name=name,
        rows=rows_of(run),
        lrs=LRS,
        seeds=SEEDS,
        selection_shorter=SHORTER,
        rates_of=RATES_OF,
        quality=BITS,
        headline=lambda record: f"{bits(record):.3f} bits per character",
        columns=COLUMNS,
        caption=caption,
        draw=draw,
        finish=partial(add_scores, shown=main_samples),
        stored=stored_scores,
    )


EXPERIMENT = experiment_of("causal-lm-pydoc", CausalLMRun(), "Python's documentation")
GCIDE = experiment_of("causal-lm-gcide", CausalLMRun(data="gcide", windows=512), "a dictionary")
