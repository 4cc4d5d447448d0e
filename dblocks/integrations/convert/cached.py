"""Cached keys and values of a converted causal model, for generating text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dblocks.sampling.cache import KVCache, Slots

Keep: TypeAlias = Callable[[Tensor, Tensor, "int | None"], "tuple[Tensor, Tensor, Tensor | None]"]
"""Of one layer: keys and values of the next rows and its window, to those of all rows and a mask.

The mask is bool [R, K] or [N, 1, R, K]; None for a single row that sees all, and for a square of
rows that see the earlier ones and themselves.
"""


class RowCache(KVCache):
    """A `KVCache` of rows of transformers' attentions, which have windows and other scales.

    The row of a slot is the noisy one that predicts its token, or in doubled rows, once the token
    is known, the clean one that holds it. In a single stream the first slot has none.

    Args:
        slots: the positions of the tokens.
        num_layers: number of layers.
        start: the first slot that has a row, 1 in a single stream.
        limit: number of tokens beyond which all rows change; see `rotation_limit`.
    """

    def __init__(
        self, slots: Slots, num_layers: int, *, start: int, limit: int | None = None
    ) -> None:
        super().__init__(slots, num_layers)
        self.start = start
        self.limit = limit

    def renew(self, known: int) -> None:
        """See `KVCache.renew`."""
        if self.limit is not None and 0 < self.committed <= self.limit < known:
            self.committed, self._last = 0, None

    @property
    def first(self) -> int:
        """See `KVCache.first`; a slot without a row is skipped."""
        return max(self.committed, self.start)

    def keeps(self, last: int) -> list[Keep]:
        """Per layer, the function that caches keys and values of rows from the next to last - 1."""
        masks: dict[int | None, Tensor | None] = {}

        def keep_of(layer: int) -> Keep:
            def keep(k: Tensor, v: Tensor, window: int | None) -> tuple[Any, ...]:
                if window not in masks:
                    masks[window] = self.mask(last, window)
                keys, values = self.write(layer, k, v)
                return keys[:, :, self.start :], values[:, :, self.start :], masks[window]

            return keep

        return [keep_of(layer) for layer in range(len(self._kv))]

    def kept_positions(self, last: int) -> Tensor:
        """Positions of the cached rows up to slot last - 1, int64 [K] or [N, K].

        Noisy rows, which all are in a single stream and the last one is in doubled rows, stand at
        the token before.
        """
        slot = torch.arange(self.start, last, device=self.slots.device)
        noisy = slot == last - 1 if self.start == 0 else slot > 0
        return self.slots.positions(self.start, last) - noisy.long()

    def mask(self, last: int, window: int | None) -> Tensor | None:
        """The cached rows that each row from the next to last - 1 sees; see `Keep`.

        Args:
            last: the slot after the rows.
            window: number of positions that a row sees, its own included.
        """
        slots, first, start = self.slots, self.first, self.start
        far = window if window is not None and window < last - start else None
        if far is None and slots.lengths is None and (first == start or last - first == 1):
            return None
        slot = torch.arange(last, device=slots.device)
        row, column = slot[first:, None], slot[start:]
        seen = row >= column
        if far is not None:
            at = slots.positions(0, last)
            seen = seen & (at[..., first:, None] - at[..., None, start:] < far)
        if slots.lengths is not None:
            used = (slot < slots.lengths[:, None]) | (slot >= slots.prompt)
            seen = seen & used[:, None, start:]
        # Rows between a short prompt and the next token see themselves: a row that sees nothing
        # would be NaN. No other row sees them.
        seen = seen | (row == column)
        return seen if seen.ndim == 2 else seen[:, None]


def rotation_limit(rotary: Any) -> int | None:
    """The longest text whose rotary positions equal those of shorter texts; None if unlimited.

    With LongRoPE, all rotations change when a text is longer than those of pretraining.

    Args:
        rotary: the rotary embedding of a model of transformers.
    """
    kinds = getattr(rotary, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, Mapping) else [kinds]
    return _pretrained_length(rotary.config) if "longrope" in kinds else None


def _pretrained_length(config: Any) -> int:
    name = "original_max_position_embeddings"
    for options in (
        getattr(config, "rope_parameters", None),
        getattr(config, "rope_scaling", None),
    ):
        if isinstance(options, Mapping) and options.get(name):
            return options[name]
    return getattr(config, name, None) or config.max_position_embeddings
