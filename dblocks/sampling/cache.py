"""The key-value cache of text generation."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.nn import Attend


class Slots:
    """Assigns the tokens of a batch to slots of a cache, with their positions.

    Prompts start at slot 0; new tokens start at slot P, the length of the longest prompt. Slots
    between the end of a shorter prompt and P are masked.

    Args:
        lengths: lengths of the prompts; Python numbers, so that nothing synchronises.
        capacity: number of slots.
        device: device of the cache.
        block_size: number of tokens generated at once; a block of tokens starts after the prompt.
    """

    def __init__(
        self, lengths: list[int], capacity: int, device: torch.device, block_size: int = 1
    ) -> None:
        self.prompt = max(lengths, default=0)
        self.capacity = capacity
        self.device = device
        self.block_size = block_size
        self.lengths: Tensor | None = None
        if any(length < self.prompt for length in lengths):
            self.lengths = torch.tensor(lengths, device=device)

    def positions(self, first: int, last: int) -> Tensor:
        """Positions of the slots first to last - 1, int64 [R], or [N, R] for ragged prompts."""
        slot = torch.arange(first, last, device=self.device)
        if self.lengths is None:
            return slot
        return torch.where(slot < self.prompt, slot, slot - (self.prompt - self.lengths)[:, None])

    def mask(self, first: int, last: int) -> Tensor | None:
        """The attention mask of the slots `first` to last - 1 over the slots 0 to last - 1.

        bool [R, last], or [N, 1, R, last] for ragged prompts: a row attends to earlier slots and to
        its own block. None for prompts of equal length and blocks of one token, if a single row
        attends to all slots or attention is causal from slot 0.
        """
        plain = self.lengths is None and self.block_size == 1
        if plain and (first == 0 or last - first == 1):
            return None
        slot = torch.arange(last, device=self.device)
        block = slot if self.block_size == 1 else self._blocks(last)
        mask = block[..., first:, None] >= block[..., None, :]
        if self.lengths is None:
            return mask
        used = (slot < self.lengths[:, None]) | (slot >= self.prompt)
        mask = mask if mask.ndim == 2 else mask[:, None]
        return mask & used[:, None, None]

    def _blocks(self, last: int) -> Tensor:
        """The blocks of slots 0 to last - 1, int64 [last], or [N, last] for ragged prompts."""
        k = self.block_size
        if self.lengths is None:
            return (self.positions(0, last) + -self.prompt % k) // k
        return (self.positions(0, last) + (-self.lengths % k)[:, None]) // k


class KVCache:
    """Keys and values of some layers, [N, Hkv, capacity, D] each, allocated at first use.

    Rows are written by the functions of `attends` and kept by `commit`; rows that are not committed
    are overwritten by the next ones. The cache also holds the features of the last tokens, for
    networks whose rows are computed from an earlier token.

    Args:
        slots: the slots of the tokens, shared by the caches of several blocks.
        num_layers: number of layers.
    """

    def __init__(self, slots: Slots, num_layers: int) -> None:
        self.slots = slots
        self.committed = 0
        self._kv: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._last: Tensor | None = None

    @property
    def first(self) -> int:
        """The slot of the next row."""
        return self.committed

    def renew(self, known: int) -> None:
        """Called before rows run with `known` tokens; clears the cache if committed rows change.

        In this class they do not.
        """

    def positions(self, rows: int) -> Tensor:
        """Positions of the `rows` slots after the committed ones."""
        return self.slots.positions(self.committed, self.committed + rows)

    def attends(self, rows: int, first: int = 0, last: int | None = None) -> list[Attend]:
        """The attention of the next `rows` rows to the cache and themselves, layers first..last-1.

        Each function takes the queries of all rows or of the last one, and the keys and values of
        all rows, which it writes into the cache.
        """
        mask = self.slots.mask(self.committed, self.committed + rows)
        return [partial(self._attend, layer, mask) for layer in range(len(self._kv))[first:last]]

    def before(self, x: Tensor, distance: int = 1) -> Tensor:
        """Features of the tokens `distance` before each of the next R + `distance` slots.

        Args:
            x: features of the next R slots, [N, R, D].
            distance: number of tokens to look back.

        Returns:
            [N, R + distance, D]: the features of those tokens; 0 before the first token.
        """
        held = x.new_zeros(len(x), distance, x.shape[2]) if self._last is None else self._last
        rows = torch.cat([held, x], dim=1)
        lengths, first = self.slots.lengths, self.slots.prompt - self.committed
        if lengths is not None and 0 < first <= x.shape[1]:
            # Slots between the end of a shorter prompt and the next token have no tokens.
            back = torch.arange(-distance, 0, device=x.device)
            index = (lengths - self.committed)[:, None] + back + distance
            index = index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
            rows[:, first : first + distance] = rows.gather(1, index)
        return rows

    def commit(self, rows: int, last: Tensor | None = None) -> None:
        """Commits the first `rows` of the written rows, and stores `last` for `before`."""
        self.committed += rows
        self._last = self._last if last is None else last

    def last_row(self, x: Tensor) -> Tensor:
        """The last row of each sample, [N, 1, D], among rows [N, R, D] to be committed."""
        lengths, end = self.slots.lengths, self.committed + x.shape[1]
        if lengths is None or end > self.slots.prompt:
            return x[:, -1:]
        return self._prompt_ends(x, lengths)

    def _prompt_ends(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The rows of the prompts' last tokens, [N, 1, D], among rows [N, R, D]."""
        index = (lengths - 1 - self.committed)[:, None, None]
        return x.gather(1, index.expand(-1, 1, x.shape[2]))

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values of the next rows, [N, Hkv, R, Dk] and [N, Hkv, R, Dv].

        Returns:
            Keys and values of all slots up to the last one written.
        """
        first, last = self.first, self.first + k.shape[2]
        keys, values = self._stored(layer, k, v)
        keys[:, :, first:last] = k
        values[:, :, first:last] = v
        return keys[:, :, :last], values[:, :, :last]

    def _attend(self, layer: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.write(layer, k, v)
        mask = None if mask is None else mask[..., -q.shape[2] :, :]
        return nnf.scaled_dot_product_attention(
            q, keys, values,
            attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._kv[layer]
        if held is None:
            capacity = self.slots.capacity
            # Zeros: a NaN in a slot that is never written would not be masked.
            held = self._kv[layer] = (
                k.new_zeros(*k.shape[:2], capacity, k.shape[3]),
                v.new_zeros(*v.shape[:2], capacity, v.shape[3]),
            )
        return held
