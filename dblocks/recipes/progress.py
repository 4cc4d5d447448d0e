"""Progress bars; tqdm is imported when one is created."""

from __future__ import annotations

from typing import Any


def progress_bar(
    purpose: str, label: str, total: int | None = None, *, shown: bool = True, done: int = 0
) -> Any:
    """A progress bar, which is not shown if the output is not a terminal.

    Args:
        purpose: "training" or "sampling".
        label: text before the bar.
        total: number of steps, if known.
        shown: whether to show the bar.
        done: number of steps taken before.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            f"{purpose} shows its progress with the package tqdm, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
    # disable=None disables the bar if the output is not a terminal.
    quiet = None if shown else True
    return tqdm(total=total, initial=done, desc=label, unit="step", disable=quiet)
