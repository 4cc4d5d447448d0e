"""Two computations of one model, of which the second chooses as the first did.

A mixture of experts chooses by scores that rounding changes. Where two are nearly equal, exact
copies of a model choose differently, and what they return is that of other networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOPK, MAX, ABOVE = torch.ops.aten.topk.default, torch.ops.aten.max.dim, torch.ops.aten.gt.Scalar
"""How models choose: the places of the largest scores, and which are above a number."""


def choosing_alike(
    own: Callable[[], Tensor], ours: Callable[[], Tensor], samples: int
) -> tuple[Tensor, Tensor]:
    """What both return, where the second chooses for each row what the first chose.

    The scores stay those of each, so that what follows from a choice, such as an expert's weight,
    is compared. Of rows that only the second has, after those of the first, it chooses itself.

    Args:
        own: computes rows [N, T, D] of a model.
        ours: computes the same rows, all or the first of them.
        samples: N.
    """
    made: list[Tensor] = []
    with _Choices(samples, made, held=False):
        first = own()
    with _Choices(samples, made, held=True):
        return first, ours()


class _Choices(TorchDispatchMode):
    """Appends each choice to `made` as [N, rows, K]; or, `held`, chooses what stands there."""

    def __init__(self, samples: int, made: list[Tensor], *, held: bool) -> None:
        super().__init__()
        self.samples, self.made, self.held = samples, made, held
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (TOPK, MAX, ABOVE) or not self._of_rows(func, args):
            return out
        own = out if func is ABOVE else out[1]
        by_row = own.reshape(self.samples, -1, _width(func, own, args[0]))
        if not self.held:
            self.made.append(by_row)
            return out
        earlier = self.made[self.calls : self.calls + 1]
        self.calls += 1
        if not earlier or earlier[0].shape[2] != by_row.shape[2]:
            return out
        rows = min(earlier[0].shape[1], by_row.shape[1])
        chosen = torch.cat([earlier[0][:, :rows], by_row[:, rows:]], dim=1).reshape(own.shape)
        if func is ABOVE:
            return chosen
        of_scores = chosen.reshape(*args[0].shape[:-1], -1)
        return args[0].gather(-1, of_scores).reshape(out[0].shape), chosen

    def _of_rows(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a choice is made for each row, among scores that are its last dimension."""
        scores, place = args[0], {TOPK: 2, MAX: 1, ABOVE: 3}[func]
        last = (args[place] if len(args) > place else -1) in (-1, scores.ndim - 1)
        rows = scores.numel() // scores.shape[-1] if scores.ndim > 1 and scores.numel() else 1
        # The largest scores of an attention are of pairs of rows.
        return last and scores.ndim < 4 and scores.is_floating_point() and not rows % self.samples


def _width(func: Any, chosen: Tensor, scores: Tensor) -> int:
    return chosen.numel() * scores.shape[-1] // scores.numel()
