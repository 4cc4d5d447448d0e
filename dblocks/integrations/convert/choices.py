"""Two computations of one model, of which the second chooses as the first did.

A mixture of experts chooses by scores that rounding changes. Where two are nearly equal, exact
copies of a model choose differently, and what they return is that of other networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PLACES = {"topk": 2, "max": 1}
"""Functions that return values and their places, and which argument is the dimension."""
ABOVE = ("gt", "__gt__")
"""Those that say which scores are above a number."""


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


class _Choices(TorchFunctionMode):
    """Appends each choice to `made` as [N, rows, K]; or, `held`, chooses what stands there.

    A mode of dispatch would see more, but keeps compiled parts, as of flex_attention, from running.
    """

    def __init__(self, samples: int, made: list[Tensor], *, held: bool) -> None:
        super().__init__()
        self.samples, self.made, self.held = samples, made, held
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not (name in ABOVE or name in PLACES) or not self._of_rows(
            name, args, kwargs or {}, out
        ):
            return out
        scores, own = args[0], out if name in ABOVE else out[1]
        width = own.numel() * scores.shape[-1] // scores.numel()
        by_row = own.reshape(self.samples, -1, width)
        if not self.held:
            self.made.append(by_row)
            return out
        earlier = self.made[self.calls : self.calls + 1]
        self.calls += 1
        if not earlier or earlier[0].shape[2] != width:
            return out
        rows = min(earlier[0].shape[1], by_row.shape[1])
        chosen = torch.cat([earlier[0][:, :rows], by_row[:, rows:]], dim=1).reshape(own.shape)
        if name in ABOVE:
            return chosen
        values = scores.gather(-1, chosen.reshape(*scores.shape[:-1], width))
        return type(out)((values.reshape(own.shape), chosen))

    def _of_rows(self, name: str, args: tuple[Any, ...], kwargs: Any, out: Any) -> bool:
        """Whether a choice is made for each row, among scores that are its last dimension."""
        scores = args[0] if args else None
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            return False
        # The largest scores of an attention are of pairs of rows.
        if (
            not 1 < scores.ndim < 4
            or not scores.numel()
            or scores.shape[:-1].numel() % self.samples
        ):
            return False
        if name in ABOVE:
            return isinstance(out, Tensor) and out.shape == scores.shape
        place = PLACES[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        return isinstance(out, tuple) and dim in (-1, scores.ndim - 1)
