"""What the records say: differences from end-to-end training, and sentences about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.study.experiment import Records
from benchmarks.study.quality import Quality
from benchmarks.study.report.finished import Finished
from dblocks.recipes.metrics.differences import Difference, paired_difference

REFERENCE = "end_to_end"


@dataclass(frozen=True)
class Finding:
    """How a row differs from end-to-end training at equal layer evaluations."""

    row: str
    title: str
    difference: Difference
    """Of the quality, row minus end to end, paired by seed."""
    activations: float
    """Saved activations over those of end to end."""
    state: float
    """Parameters, gradients and optimizer state that a step trains, over those of end to end."""
    evaluations: float
    """Layer evaluations over those of end to end."""

    def verdict(self, quality: Quality) -> str:
        """Better, worse, or not told apart: whether the 95 % interval holds 0."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return "one seed: no interval"
        if low <= 0 <= high:
            return "not told apart"
        return "better" if (low > 0) == quality.higher_is_better else "worse"


def findings(found: Finished) -> list[Finding]:
    """A finding for each row but end to end; none where that was not run."""
    reference = found.records.get(REFERENCE)
    if reference is None:
        return []
    return [
        _finding(found, row, records, reference)
        for row, records in found.records.items()
        if row != REFERENCE and _seeds(records) & _seeds(reference)
    ]


def _seeds(records: Records) -> set[int]:
    return {record["run"]["seed"] for record in records}


def _finding(found: Finished, row: str, records: Records, reference: Records) -> Finding:
    quality = found.quality
    mine = {record["run"]["seed"]: quality.value(record) for record in records}
    theirs = {record["run"]["seed"]: quality.value(record) for record in reference}
    seeds = sorted(mine.keys() & theirs.keys())

    def ratio(key: str) -> float:
        return records[0][key] / reference[0][key]

    return Finding(
        row,
        found.titles[row],
        paired_difference([mine[s] for s in seeds], [theirs[s] for s in seeds]),
        ratio("activations_mib"),
        ratio("state_mib"),
        ratio("layer_evaluations"),
    )


def sentences(found: Finished, all_findings: Sequence[Finding]) -> list[str]:
    """What a comparison shows, a sentence a row, and what it does not."""
    quality = found.quality
    lines = [_sentence(f, quality) for f in all_findings]
    by_row = {f.row: f for f in all_findings}
    small = by_row.get("small")
    if small is not None and small.verdict(quality) == "better":
        lines.append(
            "Depth does not pay at this budget: a plain network of fewer layers is better than "
            "end-to-end training of all, so a gain of blocks over end to end is no gain over it."
        )
    blocks, ensemble = by_row.get("blocks"), by_row.get("ensemble")
    if blocks and ensemble:
        mine, theirs = blocks.difference.mean, ensemble.difference.mean
        if (mine < theirs) == quality.higher_is_better and mine != theirs:
            lines.append(
                "Blocks that see noisy targets are not better than the same blocks without them "
                "(all draws at sigma_max): here the noise brings nothing."
            )
    few = {len(records) for records in found.records.values()}
    if few:
        lines.append(
            f"It does not show what happens with other data, larger networks or longer training; "
            f"rows have {' or '.join(str(n) for n in sorted(few))} seeds."
        )
    return lines


def _sentence(finding: Finding, quality: Quality) -> str:
    d, verdict = finding.difference, finding.verdict(quality)
    size = f"{abs(d.mean):{quality.form}}{quality.unit}"
    if d.low is None or d.high is None:
        how = f"{_sign(d.mean, quality)} by {size} in its only seed"
    else:
        interval = f"95 % interval {d.low:+{quality.form}} to {d.high:+{quality.form}}"
        how = f"{verdict} by {size} ({interval}; {d.count} seeds)"
        if verdict == "not told apart":
            size = f"{d.mean:+{quality.form}}{quality.unit}"
            how = f"not told apart: {size} ({interval}; {d.count} seeds)"
    return (
        f"{finding.title}, beside end to end: {quality.name} {how}; saved activations "
        f"{finding.activations:.2f} times, state of a step {finding.state:.2f} times, layer "
        f"evaluations {finding.evaluations:.2g} times."
    )


def _sign(value: float, quality: Quality) -> str:
    return "better" if (value > 0) == quality.higher_is_better else "worse"
