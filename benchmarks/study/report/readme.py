"""The results of the README: five networks in blocks and end to end, from their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.study.pages import table
from benchmarks.study.report.finished import Finished
from dblocks.recipes.columns import accuracy, bits
from dblocks.recipes.tables import Record, percent, spread


class Line(NamedTuple):
    """A network of the table."""

    comparison: str
    network: str
    measure: str
    blocks: int
    row: str
    """Its row in blocks."""
    in_blocks: Callable[[Record], float]
    whole: Callable[[Record], float]
    form: str


def _frechet(record: Record) -> float:
    return record["judged"]["distance"]


def _product(record: Record) -> float:
    return record["product_bits"]


LINES = (
    Line("vit-fashion", "ViT, Fashion-MNIST", "accuracy", 3, "blocks", accuracy, accuracy, "%"),
    Line(
        "dit-digits", "DiT, 8x8 digits", "Fréchet distance, guided", 3, "blocks_3", _frechet,
        _frechet, ".2f",
    ),
    Line(
        "causal-lm-pydoc", "causal LM, Python's documentation",
        "bits per character, product of blocks", 3, "blocks", _product, bits, ".3f",
    ),
    Line(
        "masked-lm-pydoc", "masked LM, the same text", "bits per character (bound)", 3, "blocks",
        bits, bits, ".3f",
    ),
    Line(
        "recurrent-pydoc", "recurrent LM, the same text", "bits per character", 1, "blocks", bits,
        bits, ".3f",
    ),
)  # fmt: skip
HEAD = (
    "network, data", "measure", "blocks", "in blocks", "end to end",
    "activations, MiB: in blocks/end to end",
)  # fmt: skip


def readme_block(comparisons: Mapping[str, Finished]) -> str:
    """The table and what its numbers are.

    Raises:
        ValueError: a comparison has no records of a row that the table shows.
    """
    lines, seeds = [], set()
    for line in LINES:
        found = comparisons[line.comparison]
        if missing := {line.row, "end_to_end"} - {*found.records}:
            raise ValueError(f"{found.name} must have records of {sorted(missing)}, got none")
        ours, theirs = found.records[line.row], found.records["end_to_end"]
        seeds |= {len(ours), len(theirs)}
        lines.append(
            (
                line.network,
                line.measure,
                str(line.blocks),
                _cell(ours, line.in_blocks, line.form),
                _cell(theirs, line.whole, line.form),
                f"{ours[0]['activations_mib']:.1f}/{theirs[0]['activations_mib']:.1f}",
            )
        )
    few = " or ".join(str(n) for n in sorted(seeds))
    return (
        "12-layer networks in blocks and end to end at equal layer evaluations (recurrent, of "
        f"2+4+2 layers: a tenth);\nmean ± std of {few} seeds:\n\n{table(HEAD, lines, words=2)}\n\n"
        f"{_plain(comparisons)}"
    )


def _cell(records: Sequence[Record], value: Callable[[Record], float], form: str) -> str:
    if form == "%":
        return percent(records, value)
    return spread(records, value, form)


def _as_lms(causal: float, masked: Finished | None) -> str:
    """The bits of plain small language models; of masked ones where there are runs."""
    if masked is None or not masked.records.get("small"):
        return f" and {causal:.3f} bits as a\ncausal LM"
    small = masked.records["small"]
    mean = sum(map(masked.quality.error, small)) / len(small)
    seeds = " (one seed)" if len(small) == 1 else ""
    return f", {causal:.3f} bits as a\ncausal and {mean:.3f} as a masked LM{seeds}"


def _plain(comparisons: Mapping[str, Finished]) -> str:
    """What a plain small network reaches, and whether that is more than end to end."""
    vit, lm = comparisons["vit-fashion"], comparisons["causal-lm-pydoc"]
    small = [found.records.get("small") for found in (vit, lm)]
    if small[0] is None or small[1] is None:
        return ""
    better = [
        found.quality.error(_mean(found, "small")) < found.quality.error(_mean(found, "end_to_end"))
        for found in (vit, lm)
    ]
    pays = "Depth does not pay here: " if all(better) else ""
    mean_accuracy = 100 * sum(map(accuracy, small[0])) / len(small[0])
    mean_bits = sum(map(bits, small[1])) / len(small[1])
    said = (
        f"{pays}4 plain layers, at as many layer evaluations, reach {mean_accuracy:.1f} % as a "
        f"ViT{_as_lms(mean_bits, comparisons.get('masked-lm-pydoc'))}"
    )
    alone = [found.records.get("ensemble") for found in (vit, lm)]
    if alone[0] is None or alone[1] is None:
        return f"{said}."
    of_classes = 100 * sum(map(accuracy, alone[0])) / len(alone[0])
    of_tokens = sum(map(_product, alone[1])) / len(alone[1])
    return (
        f"{said}; blocks without noisy targets, an ensemble\n"
        f"([why](docs/text.md#when-blocks-pay-off)), {of_classes:.1f} % and {of_tokens:.3f} bits."
    )


def _mean(found: Finished, row: str) -> Record:
    """A record of the mean quality."""
    records = found.records[row]
    key = "accuracy" if "accuracy" in records[0] else "bits"
    return {key: sum(record[key] for record in records) / len(records)}
