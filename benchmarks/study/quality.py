"""By what the rows of a comparison are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dblocks.recipes.columns import accuracy, bits, l2_loss


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One number of a record, on held-out data."""

    name: str
    """Such as held-out accuracy."""
    unit: str
    """Of a difference, written behind the number: " points"."""
    form: str
    """How numbers are written, such as ".1f"."""
    value: Callable[[Mapping[str, Any]], float]
    """Reads it."""
    higher_is_better: bool

    @property
    def axis(self) -> str:
        """Of a figure or a table: the name, and the unit of the values."""
        return f"{self.name}{', %' if self.unit == ' points' else ''}"

    def error(self, record: Mapping[str, Any]) -> float:
        """The smaller the better."""
        return -self.value(record) if self.higher_is_better else self.value(record)


ACCURACY = Quality(
    name="held-out accuracy",
    unit=" points",
    form=".1f",
    value=lambda record: 100 * accuracy(record),
    higher_is_better=True,
)
BITS = Quality(
    name="bits per character", unit=" bits", form=".3f", value=bits, higher_is_better=False
)
L2 = Quality(name="held-out L2 loss", unit="", form=".4f", value=l2_loss, higher_is_better=False)
