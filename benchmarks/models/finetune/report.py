"""The table of the fine-tuning benchmark, and the page around it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.ops.report import markdown
from dblocks.recipes.metrics.classes import mean_std

MIB = 2**20
HEADER = (
    "trained", "plain, code", "plain, prose", "first block, code", "product, code",
    "bound, code", "denoising, code",
    "learning rate", "parameters with gradients", "gradients + Adam, MiB",
    "Adam of all blocks, MiB", "saved activations, MiB", "ms a step",
)  # fmt: skip
BITS = (
    ("new", "plain"), ("old", "plain"), ("new", "block"), ("new", "product"), ("new", "bound"),
    ("new", "denoising"),
)  # fmt: skip
LARGE = 100  # bits above which fractions are not shown
WIDTH = 100  # of the page's lines


def table(record: dict[str, Any]) -> str:
    """The figures as markdown: means and standard deviations over seeds, and costs."""
    lines: list[Sequence[object]] = [
        ("not yet", *_bits(record["before"]), *[""] * (len(HEADER) - 1 - len(BITS)))
    ]
    whole = record["costs"][0]["ms"]
    for cost in record["costs"]:
        runs = [run for run in record["runs"] if run["arm"]["name"] == cost["arm"]]
        lines.append((
            cost["arm"], *_bits(runs), f"{runs[0]['lr']:g}", f"{cost['parameters']:,}",
            f"{(cost['gradient_bytes'] + cost['optimizer_bytes']) / MIB:.1f}",
            f"{cost['process_optimizer_bytes'] / MIB:.1f}", f"{cost['saved_bytes'] / MIB:.1f}",
            f"{cost['ms']:.0f} ({cost['ms'] / whole:.2f}x)",
        ))  # fmt: skip
    return markdown(HEADER, lines)


def selection(record: dict[str, Any]) -> str:
    """Validation bits at each learning rate, as markdown."""
    lines = []
    for trial in record["selection"]:
        bits = [f"{trial['new'][k]:.3f}" if k in trial["new"] else "" for k in ("plain", "block")]
        lines.append((trial["arm"]["name"], f"{trial['lr']:g}", *bits))
    return markdown(("trained", "learning rate", "plain, code", "first block, code"), lines)


def page(record: dict[str, Any]) -> str:
    """The tables, and what was run."""
    where, settings, data = record["environment"], record["settings"], record["data"]
    how = settings["pretraining"]
    commits = ", ".join(sorted({run["commit"] for run in record["selection"] + record["runs"]}))
    texts = [
        f"{where['device']}, {where['threads']} thread, torch {where['torch']}, "
        f"transformers {where['transformers']}, Python {where['python']}, "
        f"commit {where['commit']} (runs: {commits}).",
        table(record),
        f"Held-out bits per character, mean ± standard deviation of seeds {settings['seeds']}; "
        "“plain” is the model's own forward, “first block” one call of it from sigma_max, "
        "“product” the product of one call of every block there, “bound” that of all blocks "
        "(of fewer windows), “denoising” the mean cross-entropy "
        f"of the {settings['blocks']} blocks over their levels. “As published” are doubled rows "
        "and a learned head, the others a single stream and the exact posterior. "
        "Gradients and Adam are those of a step, at the block that has most; a process that trains "
        "all blocks keeps the Adam state of all. Saved activations are those at one time. "
        "Steps are timed in turns.",
        f"A Llama of {how['layers']} layers and width {how['width']}, embeddings tied, "
        f"{data['vocabulary']} characters. Pretrained for {how['steps']} steps at {how['lr']:g} "
        f"(not tuned, seed {how['seed']}) on Python's documentation (sha256 "
        f"{data['old_sha256'][:12]}...), then {settings['steps']} steps on "
        f"{data['characters']['training']:,} characters of its standard library's source (sha256 "
        f"{data['new_sha256'][:12]}...; {data['unknown_characters']} characters that the "
        "documentation has not are one token). "
        f"Batches of {settings['batch_size']} windows of {how['context']}.",
        f"Learning rates, chosen in {settings['selection_steps']} steps on other modules than "
        "those held out, by the plain model's bits where its loss is trained, by the first "
        "block's elsewhere:",
        selection(record),
    ]
    filled = [t if t.startswith("|") else textwrap.fill(t, WIDTH) for t in texts]
    return "\n\n".join(["# Fine-tuning a pretrained model in blocks", *filled]) + "\n"


def _bits(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for part, name in BITS:
        values = [run[part][name] for run in runs if name in run[part]]
        if not values:
            found.append("")
            continue
        mean, std = mean_std(values)
        if mean > LARGE:
            found.append(f"{mean:,.0f}")
            continue
        found.append(f"{mean:.3f}" if math.isnan(std) or std < 5e-4 else f"{mean:.3f} ± {std:.3f}")
    return found
