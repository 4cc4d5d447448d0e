"""Output heads of other libraries, as functions of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks.targets import OutputHead
from dblocks.blocks.targets.classes import IGNORED, at_least_float32
from dblocks.nn import Modulation


class FunctionHead(OutputHead):
    """An output head given as a function of features, such as a module of another library.

    Args:
        function: from features, in their own dtype, to logits.
        modulation: as in `OutputHead`.
        log_scale: as in `OutputHead`.
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
