"""What the records say: differences from a reference, and sentences about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.study.experiment import Records
from benchmarks.study.quality import Quality
from benchmarks.study.report.finished import Finished
from dblocks.recipes.metrics.differences import Difference, paired_difference
from dblocks.recipes.tables import Record

END_TO_END = "end_to_end"
SAME = 0.02  # what layer evaluations that are called equal may differ by


@dataclass(frozen=True)
class Finding:
    """How a row differs from the reference, such as end-to-end training."""

    row: str
    title: str
    difference: Difference
    """Of the quality, row minus reference, paired by seed."""
    activations: float
    """Saved activations over those of the reference."""
    state: float
    """Parameters, gradients and optimizer state that a step trains, over the reference's."""
    evaluations: float
    """Layer evaluations over those of the reference."""

    def verdict(self, quality: Quality) -> str:
        """Better, worse, or not told apart: whether the 95 % interval holds 0."""
        return verdict(self.difference, quality)


def verdict(difference: Difference, quality: Quality) -> str:
    """Better, worse, or not told apart: whether the 95 % interval holds 0."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "one seed: no interval"
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (low > 0) == quality.higher_is_better else "worse"


def findings(found: Finished) -> list[Finding]:
    """A finding for each row but the reference; none where that was not run."""
    reference = found.records.get(found.reference)
    if reference is None:
        return []
    return [
        _finding(found, row, records, reference)
        for row, records in found.records.items()
        if row != found.reference and _seeds(records) & _seeds(reference)
    ]


def _seeds(records: Records) -> set[int]:
    return {record["run"]["seed"] for record in records}


def _finding(found: Finished, row: str, records: Records, reference: Records) -> Finding:
    difference = difference_between(found, row, found.reference)
    assert difference is not None, "a finding is of common seeds"

    def ratio(key: str) -> float:
        return records[0][key] / reference[0][key]

    return Finding(
        row,
        found.titles[row],
        difference,
        ratio("activations_mib"),
        ratio("state_mib"),
        ratio("layer_evaluations"),
    )


def sentences(found: Finished, all_findings: Sequence[Finding]) -> list[str]:
    """What a comparison shows, a sentence a row, and what it does not."""
    quality = found.quality
    lines = [_sentence(f, quality, found.titles[found.reference]) for f in all_findings]
    lines += _products(found)
    lines += [
        line
        for line in (_depth(found), _between(found, "blocks", "small"), _noise(found))
        if line is not None
    ]
    few = {len(records) for records in found.records.values()}
    if few:
        seeds = f"{' or '.join(str(n) for n in sorted(few))} {'seed' if few == {1} else 'seeds'}"
        lines.append(
            "It does not show what happens with other data, larger networks or longer training; "
            f"rows have {seeds}."
        )
    return lines


def by_product(record: Record) -> float | None:
    """Bits by the product of all blocks; None where it was not measured."""
    return record.get("product_bits")


def difference_between(
    found: Finished, row: str, other: str, *, product: bool = False
) -> Difference | None:
    """The quality of a row minus that of another, paired by seed; None where they share none.

    Args:
        found: the comparison.
        row: of it.
        other: the row that is subtracted.
        product: take the product of blocks where it was measured.
    """

    def value(record: Record) -> float:
        of_product = by_product(record) if product else None
        return found.quality.value(record) if of_product is None else of_product

    ours, theirs = (
        {record["run"]["seed"]: value(record) for record in found.records.get(name, [])}
        for name in (row, other)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])


def _products(found: Finished) -> list[str]:
    """How products of blocks stand beside the reference, where they are beside the quality."""
    lines = []
    for row, records in found.records.items():
        d = difference_between(found, row, found.reference, product=True)
        if row != found.reference and d is not None and by_product(records[0]) is not None:
            lines.append(
                f"{_capital(found.titles[row])} by their product, beside "
                f"{found.titles[found.reference]}: {found.quality.name} {_how(d, found.quality)}."
            )
    return lines


def _named(found: Finished, row: str) -> str:
    """The title of a row, and whether it is judged by a product."""
    by = " by their product" if by_product(found.records[row][0]) is not None else ""
    return f"{found.titles[row]}{by}"


def _depth(found: Finished) -> str | None:
    """Whether all layers are better than a third of them with as many evaluations."""
    d = difference_between(found, "small", END_TO_END)
    said = None if d is None else verdict(d, found.quality)
    return {
        "better": "Depth does not pay at this budget: a plain network of fewer layers is better "
        "than end-to-end training of all.",
        "worse": "Depth pays at this budget: a plain network of fewer layers is worse than "
        "end-to-end training of all.",
        "not told apart": "Whether depth pays at this budget is not shown: a plain network of "
        "fewer layers and end-to-end training of all are not told apart.",
    }.get(said or "")


def _between(found: Finished, row: str, other: str) -> str | None:
    d = difference_between(found, row, other, product=True)
    if d is None:
        return None
    quality = found.quality
    return (
        f"{_capital(_named(found, row))}, beside {found.titles[other]}: {quality.name} "
        f"{_how(d, quality)}."
    )


def _noise(found: Finished) -> str | None:
    """Whether blocks gain by noisy targets: beside the same blocks without."""
    d = difference_between(found, "blocks", "ensemble", product=True)
    if d is None:
        return None
    words = {
        "better": "the noise helps",
        "worse": "the noise costs quality",
        "not told apart": "whether the noise brings anything is not shown",
    }.get(verdict(d, found.quality), "one seed does not tell what the noise brings")
    return (
        f"{_capital(_named(found, 'blocks'))} with noisy targets, beside the same blocks without "
        f"them (all draws at sigma_max): {found.quality.name} {_how(d, found.quality)}: {words}."
    )


def _sentence(finding: Finding, quality: Quality, reference: str) -> str:
    ratio = finding.evaluations
    # Two digits would call 1.026 the same.
    digits = 3 if abs(ratio - 1) < 0.1 else 2
    evaluations = f"{ratio:.{digits}g} times the layer evaluations"
    if abs(ratio - 1) < SAME:
        evaluations = "as many layer evaluations"
    return (
        f"{_capital(finding.title)}, beside {reference}: {quality.name} "
        f"{_how(finding.difference, quality)}; {finding.activations:.2f} of the saved activations, "
        f"{finding.state:.2f} of the state of a step, {evaluations}."
    )


def _how(d: Difference, quality: Quality) -> str:
    """Better, worse or not told apart, by how much, and the interval."""
    said = verdict(d, quality)
    if d.low is None or d.high is None:
        size = f"{abs(d.mean):{quality.form}}"
        way = f"{'higher' if d.mean > 0 else 'lower'} by {size}{quality.unit}"
        return f"{way if float(size) else 'the same'} in its only seed (no interval)"
    interval = f"95 % interval {d.low:+{quality.form}} to {d.high:+{quality.form}}"
    if said == "not told apart":
        size = f"{d.mean:+{quality.form}}{quality.unit}"
        return f"not told apart: {size} ({interval}; {d.count} seeds)"
    return f"{said} by {abs(d.mean):{quality.form}}{quality.unit} ({interval}; {d.count} seeds)"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
