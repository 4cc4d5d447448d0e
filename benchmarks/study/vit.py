"""The vision transformer on handwritten digits and on clothes: what is compared, and the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import quality
from benchmarks.study.experiment import Experiment, draw_comparison, rates_in_words
from benchmarks.study.pages import seeds_of
from benchmarks.study.plots import ACCURACY
from dblocks.checkpoint import make_folder
from dblocks.recipes.columns import VIT, accuracy
from dblocks.recipes.records import train, use_one_thread, write_record
from dblocks.recipes.tables import COSTS, Rows, text_table
from dblocks.recipes.vit import PUBLISHED, ViTRun

DEMO = Path("runs/demo")
DEMO_SHORTER = 3
SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)

Table = Mapping[str, tuple[str, ViTRun]]


def rows_of(run: ViTRun, steps: int) -> Table:
    """The rows of a comparison: 3 blocks take `steps` steps, and all run as many layers.

    But for the last, which sees as many samples.
    """
    blocks = dataclasses.replace(run, blocks=3, steps=steps)
    whole = dataclasses.replace(run, end_to_end=True, steps=steps // 3)
    return {
        "blocks": ("3 blocks", blocks),
        "ensemble": (
            "3 blocks, all draws at sigma_max",
            dataclasses.replace(blocks, top_share=1.0),
        ),
        "published": (
            "3 blocks, as published",
            dataclasses.replace(blocks, **PUBLISHED),
        ),
        "small": (
            "a plain ViT of 4 layers",
            dataclasses.replace(whole, depth=run.depth // 3, steps=steps),
        ),
        "end_to_end": ("end to end", whole),
        "end_to_end_3x": (
            "end to end, 3 times the steps (equal samples)",
            dataclasses.replace(whole, steps=steps),
        ),
    }


DIGITS = rows_of(ViTRun(), 4500)
# Of before the others: by 3 steps from noise, weights chosen on the validation part.
CLAMPED = dataclasses.replace(DIGITS["published"][1], weighting="clamped")
DIGITS = {**DIGITS, "published": ("3 blocks, as published but for weights", CLAMPED)}
CLOTHES = rows_of(ViTRun(data="fashion-mnist", points=3), 3000)


COLUMNS = (*VIT, *COSTS)


def caption_of(data: str, rates: str, selection: str) -> Callable[[Rows], str]:
    """How the runs were made and measured, in sentences for the report."""

    def caption(rows: Rows) -> str:
        return (
            f"A ViT of 12 layers and width 64 on {data}, batches of 128, AdamW with a cosine. "
            f"Accuracy is the mean ± sample standard deviation of seeds {seeds_of(rows)}. Each "
            f"column's learning rate is the best of {rates} on a validation split, a fifth of "
            f"the training part that selection runs do not train on, in runs of another seed and "
            f"{selection}. Blocks classify by the product of their predictions, one call "
            "each, which with all draws at sigma_max are an ensemble; as published by 3 Euler "
            "steps from noise. Memory is counted in tensors: what autograd saves for one backward "
            "pass; and parameters, gradients and optimizer state of what one step trains (all that "
            "a worker of one block holds), and of the whole process, which holds every block."
        )

    return caption


def draw_of(title: str) -> Callable[[Rows, Path], None]:
    """Draws finished runs: accuracy against layer evaluations, and the blocks' noise."""

    def draw(rows: Rows, path: Path) -> None:
        draw_comparison(
            rows, path, lambda point: 100 * point["accuracy"], title=title, measure=ACCURACY
        )

    return draw


def experiment_of(
    name: str,
    rows: Table,
    lrs: Sequence[float],
    beyond: Mapping[str, Sequence[float]],
    shorter: Mapping[str, int],
    rates_of: Mapping[str, str],
    titles: tuple[str, str, str],
    seeds: Sequence[int] = SEEDS,
) -> Experiment:
    """A comparison of ViTs.

    Args:
        name: of the experiment.
        rows: what is compared.
        lrs: learning rates that are tried for each row.
        beyond: further ones of rows whose best was the smallest or the largest of those.
        shorter: by what a row's steps are divided where its rate is chosen.
        rates_of: the row whose rate another takes over.
        titles: the images in a figure's title and in a caption, and how rates were chosen.
        seeds: of the final runs.
    """
    short, long, selection = titles
    rates = rates_in_words(lrs, {rows[row][0]: more for row, more in beyond.items()})
    return Experiment(
        name=name,
        rows=rows,
        lrs=lrs,
        beyond=beyond,
        seeds=seeds,
        selection_shorter=shorter,
        rates_of=rates_of,
        quality=quality.ACCURACY,
        headline=lambda record: f"{100 * accuracy(record):.1f} %",
        columns=COLUMNS,
        caption=caption_of(long, rates, selection),
        draw=draw_of(f"A 12-layer ViT on {short}, trained end to end and in blocks"),
    )


# Rates are chosen with runs as long as the final ones, since the best rate falls with the length;
# the longest row's, with a fifth of its steps.
EXPERIMENT = experiment_of(
    "vit-digits",
    DIGITS,
    (2.5e-4, 5e-4, 1e-3, 2e-3),
    {"published": (1.25e-4,), "small": (4e-3,), "blocks": (1.25e-4,), "end_to_end_3x": (1.25e-4,)},
    {"blocks": 1, "published": 1, "small": 1, "end_to_end": 1, "end_to_end_3x": 5},
    {"ensemble": "blocks"},
    (
        "handwritten digits",
        "scikit-learn's digits: 1,258 for training, 539 held out (30 % of each class)",
        "as many steps, with equal samples a fifth",
    ),
    MORE_SEEDS,
)
FASHION = experiment_of(
    "vit-fashion",
    CLOTHES,
    (5e-4, 1e-3, 2e-3, 4e-3),
    {"published": (2.5e-4,)},
    {"blocks": 2, "published": 2, "small": 2, "end_to_end": 2},
    {"ensemble": "blocks", "end_to_end_3x": "end_to_end"},
    (
        "Fashion-MNIST",
        "Fashion-MNIST: 60,000 images for training, 10,000 held out",
        "half of the steps; all draws at sigma_max take over the rate of the blocks, equal "
        "samples that of end to end",
    ),
    MORE_SEEDS,
)


def demo(out: Path = DEMO, shorter: int = DEMO_SHORTER) -> None:
    """Train end to end and in 3 blocks with one seed and fewer steps; print what came of it."""
    make_folder(out)
    use_one_thread()
    chosen = [DIGITS[row][1] for row in ("end_to_end", "blocks")]
    runs = [dataclasses.replace(run, steps=run.steps // shorter) for run in chosen]
    rows = {run.name: [train(run, progress=True).record] for run in runs}
    write_record(out / "run.json", [record for records in rows.values() for record in records])
    figure = out / EXPERIMENT.figure.name
    EXPERIMENT.draw(rows, figure)
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
