"""Windows of a text: random windows for training, and windows that score each token once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dblocks.config import check_count
from dblocks.recipes.data.splits import generator_of


def random_windows(tokens: Tensor, length: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Batch number `step`: windows of `length` tokens at random positions, [batch_size, length]."""
    _check_length(tokens, length)
    starts = torch.randint(
        len(tokens) - length + 1, (batch_size, 1), generator=generator_of(seed, step)
    )
    return tokens[starts + torch.arange(length)].long()


def scored_windows(
    tokens: Tensor, length: int, batch_size: int, *, windows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows in which every token but the first of the text is scored exactly once.

    Windows overlap by half of their length. Each scores its second half, with at least half a
    window of context; the first one scores all but its first token.

    Args:
        tokens: the text, int64 [tokens].
        length: tokens per window.
        batch_size: windows per batch.
        windows: number of windows to use, at most all: the middle ones of as many equal parts of
            the text.

    Yields:
        tokens [n, length] and bool [n, length], true where a token is scored.

    Raises:
        ValueError: the text is shorter than a window, or `windows` is not positive.
    """
    _check_length(tokens, length)
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be positive, got {windows}")
    half = length // 2
    last = len(tokens) - length
    starts = torch.arange(0, last + half, half).clamp(max=last)
    # A window scores from the end of what the previous one has scored.
    first = torch.cat([torch.ones(1, dtype=torch.int64), starts[:-1] + length - starts[1:]])
    if windows is not None and windows < len(starts):
        middle = (2 * torch.arange(windows) + 1) * len(starts) // (2 * windows)
        starts, first = starts[middle], first[middle]
    position = torch.arange(length)
    for at, begin in zip(starts.split(batch_size), first.split(batch_size), strict=True):
        yield tokens[at[:, None] + position].long(), position >= begin[:, None]


def consecutive_windows(
    tokens: Tensor, length: int, windows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Consecutive windows in which every token of the text is scored exactly once.

    The last one begins early enough to have full length; its overlap with the previous one is not
    scored.

    Args:
        tokens: the text, integers [tokens].
        length: tokens per window.
        windows: number of windows to use, evenly spaced.

    Returns:
        tokens [n, length] and bool [n, length], true where a token is scored.
    """
    _check_length(tokens, length)
    starts = torch.arange(0, len(tokens), length)
    if windows is not None and check_count("windows", windows) < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, windows).long()]
    places = starts.clamp(max=len(tokens) - length)[:, None] + torch.arange(length)
    return tokens[places].long(), places >= starts[:, None]


def _check_length(tokens: Tensor, length: int) -> None:
    if not 2 <= length <= len(tokens):
        raise ValueError(
            f"a window must have between 2 tokens and those of the text, {len(tokens)}, got "
            f"{length}; choose a shorter context or a longer text"
        )
