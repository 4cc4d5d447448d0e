"""The memory columns: rows of the study with checkpointing, offload and residency, measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import Records
from benchmarks.study.methods.thrift import Technique, measure
from benchmarks.study.rows import Study
from dblocks.recipes.records import use_one_thread, write_record
from dblocks.recipes.tables import Column, text_table

COSTS_PART = "costs"  # what a command calls these
# Of the rows of a study, and what is measured of each.
SPARED: Sequence[tuple[str, Sequence[Technique]]] = (
    ("end_to_end", ("none", "checkpointing", "offload")),
    ("blocks", ("none", "checkpointing", "residency")),
    ("published", ("none", "checkpointing", "residency")),
)

COLUMNS = (
    Column(
        "saved for the backward, on the device (MiB)", lambda r: f"{r[0]['activations_mib']:.1f}"
    ),
    Column("  and what comes back at a time", lambda r: f"{r[0]['again_mib']:.1f}"),
    Column("params + grads + optimizer of a step (MiB)", lambda r: f"{r[0]['state_mib']:.1f}"),
    Column("  of all blocks", lambda r: f"{r[0]['process_mib']:.1f}"),
    Column("all on the device (MiB)", lambda r: f"{r[0]['device_mib']:.1f}"),
    Column("on the host (MiB)", lambda r: f"{r[0]['host_mib']:.1f}"),
    Column("seconds per step", lambda r: f"{r[0]['seconds_per_step']:.3f}"),
    Column("  over those without", lambda r: f"{r[0]['slowdown']:.2f}"),
)


def record_name(row: str, technique: Technique) -> str:
    """Of the record of a row with a technique."""
    return f"costs-{row}-{technique}"


def run_costs(study: Study, folder: Path | None = None) -> dict[str, Records]:
    """Measures what is not there; returns all records by title."""
    use_one_thread()
    folder = folder or study.records
    there, found = Archive(folder).load(), {}
    for name, techniques in SPARED:
        if name not in study.names():
            continue
        row = study.row(name)
        for technique in techniques:
            key = record_name(name, technique)
            record = there.get(key)
            if record is None or type(row.run).from_dict(record["run"]) != row.run:
                record = measure(row.run, technique, name)
                write_record(folder / f"{key}.json", record)
            title = row.title if technique == "none" else f"{row.title}, {technique}"
            found[title] = [record]
    Archive(folder).pack()
    print(text_table(found, COLUMNS))
    return found
