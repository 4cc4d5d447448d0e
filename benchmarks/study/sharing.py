"""What happens to the parameters outside the layers: `python -m benchmarks.study.sharing`.

On digits, with a ninth of the recipe's steps and a quarter of its batch, all at one learning rate:
fifteen runs in one process. Those whose records are there are not run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import Records, record_path
from benchmarks.study.pages import write_between_markers
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import ViT, ViTConfig
from dblocks.recipes.records import train_to_record
from dblocks.recipes.tables import percent
from dblocks.recipes.vit import ViTRun

RECORDS = Path("benchmarks/results/sharing_digits")
REPORT = Path("docs/scale.md")
RUN = ViTRun(steps=500, batch_size=32, points=1)
ROWS: Mapping[str, tuple[str, ViTRun]] = {
    "train": ("`train`", dataclasses.replace(RUN, shared="train")),
    "private": ("`private`", dataclasses.replace(RUN, shared="private")),
    "frozen": ("`frozen`", dataclasses.replace(RUN, shared="frozen")),
    "reduce30": ("`reduce` every 30", dataclasses.replace(RUN, shared="reduce", reduce_every=30)),
    "reduce100": (
        "`reduce` every 100",
        dataclasses.replace(RUN, shared="reduce", reduce_every=100),
    ),
}
SEEDS = (0, 1, 2)


def copy_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of one block's copy of what trains outside the layers."""
    config = dataclasses.replace(BlocksConfig.from_dict(record["blocks"]), shared="private")
    network = ViT(ViTConfig.from_dict(record["model"]))
    model = DiffusionBlocks(network, config)
    fixed = {id(p) for p in model.shared_parameters()}
    layers = {id(p) for p in network.layers.parameters()}
    outside = (p for p in network.parameters() if id(p) not in fixed | layers)
    return sum(p.nbytes for p in outside)


def sent(record: Mapping[str, Any]) -> str:
    """Bytes that each job sends in a step on average, in words."""
    run = record["run"]
    if run["shared"] == "train":
        return "one process only"
    if run["shared"] != "reduce":
        return "0"
    blocks = run["blocks"]
    return f"{2 * (blocks - 1) / blocks * copy_bytes(record) / run['reduce_every']:,.0f} B"


def table(records: Mapping[str, Records]) -> str:
    """The rows in Markdown."""
    lines = [
        "| `shared` | sent per step and job | accuracy, all blocks | accuracy, one block (mean) |",
        "|---|--:|--:|--:|",
    ]
    for row, (title, _) in ROWS.items():
        of_all = percent(records[row], lambda record: record["accuracy"])
        alone = percent(
            records[row], lambda record: sum(record["blocks_alone"]) / len(record["blocks_alone"])
        )
        lines.append(f"| {title} | {sent(records[row][0])} | {of_all} | {alone} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, and writes the table."""
    for row, (_, run) in ROWS.items():
        for seed in SEEDS:
            seeded = dataclasses.replace(run, seed=seed)
            path = record_path(RECORDS, row, seeded)
            if path.stem not in Archive(RECORDS).load():
                record = train_to_record(seeded, path)
                print(f"{path.stem}: {record['accuracy']:.4f}, {record['seconds']} s", flush=True)
    there = Archive(RECORDS).load()
    records = {
        row: [there[record_path(RECORDS, row, dataclasses.replace(r, seed=s)).stem] for s in SEEDS]
        for row, (_, r) in ROWS.items()
    }
    Archive(RECORDS).pack()
    write_between_markers(REPORT, "results:sharing", table(records))
    print(table(records))


if __name__ == "__main__":
    main()
