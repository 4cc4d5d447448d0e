"""What training asks of whoever keeps one block at a time on a device."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Residency(Protocol):
    """Brings blocks to a device; `dblocks.scale.resident` makes one."""

    def acquire(self, block: int) -> None:
        """Brings the parameters and buffers of a block, which is about to run."""
        ...

    def visit(
        self, block: int, optimizers: Any, generator: torch.Generator | None, *, drawn: bool
    ) -> int:
        """The block of this step, brought with all that a step needs.

        Where `block` was drawn of `generator`, it decides only where a visit begins.
        """
        ...
