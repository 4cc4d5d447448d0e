"""The memory of PyTorch's optimizers: state, and temporaries of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Literal, NamedTuple

from torch import Tensor

Optimizer = Literal["adamw", "adamw-foreach", "sgd", "adafactor", "muon"]
COUNT_BYTES = 4  # bytes of the step count, which most optimizers keep per parameter
BF16 = 2  # bytes of an element; Muon iterates in bfloat16


class Use(NamedTuple):
    """Memory that an optimizer needs for a set of trained parameters, in bytes."""

    state: int = 0
    together: int = 0
    """Temporaries for all parameters at once."""
    largest: int = 0
    """Temporaries of the parameter that needs most."""

    def plus(self, other: Use) -> Use:
        """The memory for two groups of parameters."""
        state, together = self.state + other.state, self.together + other.together
        return Use(state, together, max(self.largest, other.largest))

    @property
    def temporaries(self) -> int:
        """Bytes that a step allocates and frees."""
        return self.together + self.largest


def use(parameters: Iterable[Tensor], optimizer: Optimizer, *, average: bool = False) -> Use:
    """The state that an optimizer holds for trained parameters, and its temporaries in a step.

    Args:
        parameters: the trained parameters.
        optimizer: name of the optimizer.
        average: whether a moving average of the weights is kept too.
    """
    found = Use()
    for parameter in parameters:
        found = found.plus(USES[optimizer](parameter))
        if average:  # updated in place
            found = found.plus(Use(parameter.nbytes))
    return found


def _adamw(p: Tensor) -> Use:
    return Use(2 * p.nbytes + COUNT_BYTES)


def _foreach(p: Tensor) -> Use:
    return _adamw(p)._replace(together=p.nbytes)


def _sgd(p: Tensor) -> Use:
    return Use(p.nbytes)


def _adafactor(p: Tensor) -> Use:
    """State: means over rows and columns of a matrix. Temporaries: the update, of the matrix's
    size.

    The update of the previous parameter is freed only after the next one is allocated.
    """
    if p.ndim < 2:
        return Use(p.nbytes + COUNT_BYTES, largest=2 * p.nbytes)
    factors = prod(p.shape[:-1]) + p.numel() // max(p.shape[-2], 1)
    return Use(factors * p.itemsize + COUNT_BYTES, largest=2 * p.nbytes)


def _muon(p: Tensor) -> Use:
    """For matrices: momentum; an update; three matrices and two squares in bfloat16.

    For other parameters as fused AdamW.
    """
    if p.ndim != 2:
        return _adamw(p)
    squares = 2 * min(p.shape) ** 2
    return Use(p.nbytes, largest=p.nbytes + BF16 * (3 * p.numel() + squares))


USES: dict[Optimizer, Callable[[Tensor], Use]] = {
    "adamw": _adamw,
    "adamw-foreach": _foreach,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
}
