"""Output heads: logits and cross-entropy from features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.nn import Modulation, over_rows

IGNORED = -100  # PyTorch's ignore_index


class Linear(Protocol):
    """The matrix of an output head: an `nn.Linear`, or any object with its attributes."""

    @property
    def weight(self) -> Tensor:
        """[K, D]."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[K]."""
        ...


class OutputHead:
    """Logits of features m, in float32 (float64) whatever the layers' dtype.

        logits = W (g*(m*(1 + scale) + shift)) + b

    Args:
        linear: W and b, such as an `nn.Linear`.
        modulation: computes shift and scale from the conditioning vector; none by default.
        log_scale: ln g; g is 1 by default. If it is a parameter, create the target in a property of
            the network, as parameters may be replaced (`load_state_dict(assign=True)`).

    Raises:
        TypeError: `linear` is a module that does not compute `nn.Linear`, such as one with an
            adapter or packed weights: only weight and bias are used here.
    """

    def __init__(
        self,
        linear: Linear,
        *,
        modulation: Modulation | None = None,
        log_scale: Tensor | None = None,
    ) -> None:
        _check_linear(linear)
        self.linear = linear
        self.modulation = modulation
        self.log_scale = log_scale

    def rows(self, m: Tensor, cond: Tensor | None = None) -> Tensor:
        """The input of the product with W, from features [N, D] or [N, T, D]."""
        with torch.autocast(m.device.type, enabled=False):
            m = at_least_float32(m)
            if self.modulation is not None:
                shift, scale = self.modulation(cond, len(m))
                if m.ndim == 3:
                    shift, scale = over_rows(shift, m), over_rows(scale, m)
                m = m * (1 + scale) + shift
            return m if self.log_scale is None else m * self.log_scale.exp().to(m.dtype)

    def logits(
        self, m: Tensor, cond: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits [N, K] or [N, T, K]; `dtype`, by default that of m, is for heads of other
        classes."""
        return product(self.rows(m, cond), self.linear.weight, self.linear.bias)

    def losses(self, m: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of features [N, T, D] with `labels` [N, T], 0 where they are `IGNORED`.

        Logits of all rows are never in memory at once.
        """
        return F.linear_cross_entropy(
            self.rows(m), self.linear.weight, labels, bias=self.linear.bias,
            ignore_index=IGNORED, reduction="none",
        )  # fmt: skip


class FunctionHead(OutputHead):
    """An output head given as a function of features, such as a module of another library.

    Args:
        function: from features, in their own dtype, to logits.
        modulation: as in `OutputHead`. log_scale: as of `OutputHead`.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        modulation: Modulation | None = None,
        log_scale: Tensor | None = None,
    ) -> None:
        self.function = function
        self.modulation = modulation
        self.log_scale = log_scale

    def logits(
        self, m: Tensor, cond: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits, computed by the function in `dtype`; float32 (float64)."""
        return at_least_float32(self.function(self.rows(m, cond).to(dtype or m.dtype)))

    def losses(self, m: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of features [N, T, D] with `labels` [N, T], 0 where they are `IGNORED`."""
        logits = self.logits(m).transpose(1, 2)
        return nnf.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 (float64 stays), as losses and estimates are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in the dtype of the rows, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        bias = None if bias is None else bias.to(rows.dtype)
        return nnf.linear(rows, weight.to(rows.dtype), bias)


def _check_linear(linear: object) -> None:
    """Raises if the module's own forward, which would be bypassed, is not that of `nn.Linear`."""
    if isinstance(linear, nn.Module) and type(linear).forward is not nn.Linear.forward:
        raise TypeError(
            "an output head must be an nn.Linear, whose weight and bias are multiplied without "
            f"calling it, got a {type(linear).__name__}; merge its adapter, or leave the head out "
            "of those that get one"
        )
