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
ROUNDINGS = 64
"""Roundings of one layer that may add up; those of layers add as random numbers do."""
LARGEST = 0.1
"""Of bfloat16: what is left out of a model changes more, or is found by name."""


def largest_rounding(*dtypes: torch.dtype, layers: int = 1) -> float:
    """By what share of its size the result of so many layers may differ between two orders."""
    computed = [dtype for dtype in (*dtypes, torch.float32) if dtype.is_floating_point]
    eps = max(torch.finfo(dtype).eps for dtype in computed)
    return min(ROUNDINGS * eps * layers**0.5, LARGEST)


def choosing_alike(
    own: Callable[[], Tensor], ours: Callable[[], Tensor], samples: int, rounding: float
) -> tuple[Tensor, Tensor]:
    """What both return, where the second chooses for each row what the first chose.

    It does so where its own scores of both choices are equal up to rounding: another router is not
    hidden. The scores stay those of each, so that what follows from a choice, such as an expert's
    weight, is compared. Of rows that only the second has, after those of the first, it chooses
    itself.

    Args:
        own: computes rows [N, T, D] of a model.
        ours: computes the same rows, all or the first of them.
        samples: N.
        rounding: by what share of the largest score two scores may differ.
    """
    made: list[Tensor] = []
    with _Choices(samples, made, rounding, held=False):
        first = own()
    with _Choices(samples, made, rounding, held=True):
        return first, ours()


class _Choices(TorchFunctionMode):
    """Appends each choice to `made` as [N, rows, K]; or, `held`, chooses what stands there.

    A mode of dispatch would see more, but keeps compiled parts, as of flex_attention, from running.
    """

    def __init__(self, samples: int, made: list[Tensor], rounding: float, *, held: bool) -> None:
        super().__init__()
        self.samples, self.made, self.rounding, self.held = samples, made, rounding, held
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
            return torch.where(self._near(scores, args[1], scores), chosen, own)
        places = chosen.reshape(*scores.shape[:-1], width)
        values, others = out[0].reshape(places.shape), scores.gather(-1, places)
        near = self._near(values.sort().values, others.sort().values, scores).all(-1, keepdim=True)
        chosen = torch.where(near, places, own.reshape(places.shape)).reshape(own.shape)
        values = torch.where(near, others, values).reshape(own.shape)
        return type(out)((values, chosen))

    def _near(self, a: Tensor, b: Any, scores: Tensor) -> Tensor:
        """Whether scores are equal up to rounding; infinite ones are masked out of the choice."""
        size = scores.abs().masked_fill(~scores.isfinite(), 0).max()
        return (a - b).abs() <= self.rounding * size

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
