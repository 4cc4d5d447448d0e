"""The interface between training and the code that keeps one block at a time on a device."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Visits(Protocol):
    """Brings blocks to a device; `dblocks.scale.resident` makes one."""

    def acquire(self, block: int) -> None:
        """Moves the parameters and buffers of a block to the device, before it runs."""
        ...

    def visit(
        self, block: int, optimizers: Any, generator: torch.Generator | None, *, drawn: bool
    ) -> int:
        """The block of this step, moved to the device with everything that the step needs.

        If `block` was drawn from `generator`, it only decides where a visit begins.
        """
        ...
