"""Writes the points of a run's curve for TensorBoard, which is imported when used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Board:
    """Writes points to a folder for TensorBoard.

    Args:
        folder: the folder of one run.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "--tensorboard needs the package tensorboard, which is not installed; "
                "`pip install 'dblocks[tensorboard]'`"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, point: dict[str, Any]) -> None:
        """Writes the numbers of a point, at its step."""
        for name, value in scalars(point):
            self._writer.add_scalar(name, value, point["step"])
        self._writer.flush()


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a point by name, such as block_loss/0; None is left out."""
    if isinstance(value, dict):
        for key, part in value.items():
            if name or key != "step":
                yield from scalars(part, f"{name}/{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        yield from scalars(dict(enumerate(value)), name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
