"""The diffusion transformer on handwritten digits: what is compared, and the grid of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from benchmarks.study.experiment import Experiment
from benchmarks.study.pages import seeds_of
from benchmarks.study.quality import L2
from dblocks.recipes.columns import DIT, l2_loss
from dblocks.recipes.data.digits import NUM_CLASSES, digits
from dblocks.recipes.dit import SHOWN, DiTRun
from dblocks.recipes.image_grid import decode, grid_figure, save_png, to_bytes
from dblocks.recipes.tables import COSTS, Rows

LAYERS_RUN = 12_000  # in training, by every row but the last
LONGER = 3
REAL = "held-out digits"


def _blocks(number: int) -> DiTRun:
    run = DiTRun()
    return dataclasses.replace(run, blocks=number, steps=LAYERS_RUN * number // run.depth)


END_TO_END = DiTRun(end_to_end=True, steps=LAYERS_RUN // DiTRun().depth)
END_TO_END_LONG = dataclasses.replace(END_TO_END, steps=LONGER * END_TO_END.steps)
ROWS: Mapping[str, tuple[str, DiTRun]] = {
    "end_to_end": ("end to end", END_TO_END),
    **{f"blocks_{n}": (f"{n} blocks, equal layer evaluations", _blocks(n)) for n in (2, 3, 4, 6)},
    "end_to_end_long": ("end to end, 3 times the steps (samples of 3 blocks)", END_TO_END_LONG),
}
LRS = (2e-3, 4e-3, 8e-3, 1.6e-2)


COLUMNS = (*DIT, *COSTS)


def caption(rows: Rows) -> str:
    """How the runs were made and measured, in sentences for the report."""
    first = next(iter(rows.values()))[0]
    run, found = first["run"], first["judged"]
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    return (
        f"A DiT of {run['depth']} layers and width {run['width']}, patches of {run['patch_size']}, "
        "on scikit-learn's 8x8 digits: 1,258 for training, 539 held out (30 % of each class), "
        f"batches of {run['batch_size']}, labels dropped with probability .1, AdamW with a cosine; "
        "sigma_data is the standard deviation of the training images, "
        f"{first['sigma_data']:.3f}. End to end is the same denoiser as one block of all layers. "
        f"Mean ± sample standard deviation of seeds {seeds_of(rows)}. The learning rate is the "
        f"best of {{{rates}}} by the L2 loss on a validation split, a fifth of the training part "
        "that selection runs do not train on; they have another seed and as many steps. It was "
        "chosen end to end, for both lines, and with "
        f"3 blocks, for all numbers of blocks. Samples are {run['samples']} images, "
        f"{run['sampling_steps']} Euler steps on the equal-mass grid, guidance scale "
        f"{run['guidance_scale']:g}, which calls the layers twice a step; the L2 loss is in F "
        "space, at 12 levels of equal probability. The Fréchet distance is between samples and "
        "held-out digits in the 32 features of a small convolutional classifier trained on the "
        "training part, by which the class of a sample is judged too: "
        f"{100 * found['accuracy_on_held_out']:.1f} % of the held-out digits are right, and the "
        "training digits, all of them, are at a distance of "
        f"{found['distance_of_training_images']:.2f}. It compares lines of this table; it is not "
        "the FID of other work."
    )


def draw(rows: Rows, path: Path) -> None:
    """The picture: samples of the first seed, a class a row, a panel a line of the table."""
    _, held_out = digits()
    order = [i for c in range(NUM_CLASSES) for i in (held_out.labels == c).nonzero()[:SHOWN, 0]]
    panels = {REAL: to_bytes(held_out.images[order])}
    for name, records in rows.items():
        panels[name.replace(", ", ",\n").replace(" (", "\n(")] = decode(records[0]["pictures"])
    title = "Digits of a 12-layer DiT, trained end to end and in blocks (guided, not chosen)"
    save_png(grid_figure(panels, SHOWN, title), path)


EXPERIMENT = Experiment(
    name="dit-digits",
    rows=ROWS,
    lrs=LRS,
    selection_shorter={"end_to_end": 1, "blocks_3": 1},
    rates_of={
        "end_to_end_long": "end_to_end",
        **dict.fromkeys(("blocks_2", "blocks_4", "blocks_6"), "blocks_3"),
    },
    quality=L2,
    headline=lambda record: f"loss {l2_loss(record):.4f}",
    columns=COLUMNS,
    caption=caption,
    draw=draw,
)
