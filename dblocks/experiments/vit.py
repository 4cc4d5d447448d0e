"""The vision transformer on handwritten digits: what is compared, and the demonstration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dblocks.checkpoint import make_folder
from dblocks.experiments._base import Experiment, draw_comparison
from dblocks.plots import ACCURACY
from dblocks.recipes.vit import ViTRun
from dblocks.records import train, use_one_thread, write_record
from dblocks.report import COSTS, README_COSTS, Column, Record, Rows, percent, text_table

DEMO = Path("runs/demo")
DEMO_SHORTER = 3

BLOCKS = ViTRun(blocks=3, steps=4500)
# 1,500 steps of 12 layers run as many layers as 4,500 steps of 4.
END_TO_END = ViTRun(end_to_end=True, steps=1500)
END_TO_END_3X = ViTRun(end_to_end=True, steps=4500)
ROWS: Mapping[str, tuple[str, ViTRun]] = {
    "blocks": ("3 blocks, equal layer evaluations", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_3x": ("end to end, 3 times the steps (equal samples)", END_TO_END_3X),
}
LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)


def accuracy(record: Record) -> float:
    """The held-out accuracy of a run."""
    return record["accuracy"]


def first_block(record: Record) -> float | None:
    """The accuracy with 1 denoising step, which runs the first block alone; None end to end."""
    by_steps = record["accuracy_by_denoising_steps"]
    return None if by_steps is None else by_steps["1"]


COLUMNS = (
    Column("held-out accuracy", lambda r: percent(r, accuracy)),
    Column("  AdaLN", lambda r: "yes" if r[0]["adaln"] else "no"),
    Column("  first block alone (1 denoising step)", lambda r: percent(r, first_block)),
    *COSTS,
)
README_COLUMNS = (
    Column("Held-out accuracy", lambda r: percent(r, accuracy)),
    *README_COSTS,
)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    seeds = ", ".join(map(str, EXPERIMENT.seeds))
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    alone = "".join(
        f"; the first block alone, with 1 step, reaches {percent(records, first_block)}"
        for records in rows.values()
        if first_block(records[0]) is not None
    )
    return (
        "A ViT of 12 layers and width 64 on scikit-learn's digits: 1,258 for training, 539 held "
        "out (30 % of each class), batches of 128, AdamW with a cosine. Accuracy is the mean ± "
        f"sample standard deviation of seeds {seeds}. Each line's learning rate is the best of "
        f"{{{rates}}} on a validation split, a fifth of the training part that selection runs do "
        "not train on; they have another seed and as many steps, in the third line a fifth. "
        f"Blocks classify with 3 denoising steps{alone}. Memory is counted in tensors: what "
        "autograd saves for one backward pass; and parameters, gradients and optimizer state of "
        "what one step trains (all that a worker of one block holds), and of the whole process, "
        "which holds every block."
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: accuracy against layer evaluations, and the blocks' noise."""
    draw_comparison(
        rows,
        path,
        lambda point: 100 * point["accuracy"],
        title="A 12-layer ViT on handwritten digits, trained end to end and in blocks",
        measure=ACCURACY,
    )


EXPERIMENT = Experiment(
    name="vit-digits",
    rows=ROWS,
    lrs=LRS,
    # Rates are chosen with runs as long as the final ones, since the best rate falls with the
    # length; the longest row's, with a fifth of its steps.
    selection_shorter={"blocks": 1, "end_to_end": 1, "end_to_end_3x": 5},
    error=lambda record: -accuracy(record),
    headline=lambda record: f"{100 * accuracy(record):.1f} %",
    columns=COLUMNS,
    readme_columns=README_COLUMNS,
    caption=caption,
    draw=draw,
)


def demo(out: Path = DEMO, shorter: int = DEMO_SHORTER) -> None:
    """Train end to end and in 3 blocks with one seed and fewer steps; print what came of it."""
    make_folder(out)
    use_one_thread()
    runs = [dataclasses.replace(run, steps=run.steps // shorter) for run in (END_TO_END, BLOCKS)]
    rows = {run.name: [train(run, progress=True).record] for run in runs}
    write_record(out / "run.json", [record for records in rows.values() for record in records])
    figure = out / EXPERIMENT.figure.name
    draw(rows, figure)
    print(f"\n{text_table(rows, COLUMNS)}\n\n{_moral(*(r[0] for r in rows.values()))}\n")
    print(f"Files: {figure} (both curves, and each block's noise), {out / 'run.json'}")


def _moral(whole: dict[str, Any], blocks: dict[str, Any]) -> str:
    """What the demo's table shows, in words."""
    activations = blocks["activations_mib"] / whole["activations_mib"]
    state = blocks["state_mib"] / whole["state_mib"]
    gain = 100 * (blocks["accuracy"] - whole["accuracy"])
    times = blocks["samples"] // whole["samples"]
    return (
        f"Both ran {whole['layer_evaluations']:,} layers on batches of 128. In blocks a step ran "
        f"and differentiated {blocks['layers_per_step']} of the 12 layers: it saved "
        f"{activations:.0%} of the activations\nand trained {state:.0%} of the state. It took "
        f"{times} times the steps, and the accuracy came out {abs(gain):.1f} points "
        f"{'higher' if gain >= 0 else 'lower'}."
    )
