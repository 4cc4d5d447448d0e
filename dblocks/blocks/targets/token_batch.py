"""The entries of a batch of token sequences: checks, positions and labels."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks.targets.base import Batch, CheckedBatch, missing
from dblocks.blocks.targets.classes import IGNORED
from dblocks.blocks.targets.padding import (
    check_attention_mask,
    check_text_blocks,
    starts_of,
    to_front,
)
from dblocks.nn import Attend
from dblocks.ops._checks import values_known

READS = ("tokens", "loss_mask", "cu_seqlens")


class TokenSizes(Protocol):
    """The sizes that the checks of tokens need."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence or document."""
        ...


class TokenBatch(CheckedBatch):
    """The checked entries of a batch of token sequences.

    "tokens", int64 [N, T]. The first token of a sequence is given (a token that marks the
    beginning, or the first of a text) and is never predicted. Optional: "loss_mask", bool [N, T],
    false at tokens that are not scored, such as padding at the end; for N = 1, "cu_seqlens", int32
    [documents + 1], the boundaries of packed documents, each with its own positions and without
    attention to others; if the network supports it, "attention_mask", [N, T], 0 at padding before
    or after each text, which is not scored.
    """

    @classmethod
    def of(cls, batch: Batch, sizes: TokenSizes, *, padding: bool = False) -> TokenBatch:
        """The entries of `batch`, checked; an "attention_mask" only with `padding`.

        Raises:
            ValueError: for an entry that is missing, or of a shape or value that does not fit.
            TypeError: for an entry of another dtype.
        """
        given = cls(batch)
        tokens, mask, ends = given.get("tokens"), given.loss_mask, given.cu_seqlens
        if not isinstance(tokens, Tensor):
            content = "{'tokens': [N, T]}, the input_ids of a tokenizer, and optional entries"
            raise missing(batch, "tokens", content)
        check_tokens(tokens, sizes.vocab_size)
        if ends is not None:
            _check_documents(ends, tokens, sizes.context)
        elif tokens.shape[1] > sizes.context:
            raise ValueError(
                f"tokens must be at most context={sizes.context} long, got {tokens.shape[1]}; "
                "cut them"
            )
        if mask is not None:
            _check_loss_mask(mask, tokens)
        if padding and given.attention_mask is not None:
            given._leave_out_padding(given.attention_mask)
        return given

    def _leave_out_padding(self, attention_mask: Tensor) -> None:
        if self.cu_seqlens is not None:
            raise padded_documents()
        shown = check_attention_mask(attention_mask, tuple(self.tokens.shape))
        self["attention_mask"] = shown
        self["loss_mask"] = shown if self.loss_mask is None else self.loss_mask & shown

    @property
    def tokens(self) -> Tensor:
        """int64 [N, T]."""
        return self["tokens"]

    @property
    def loss_mask(self) -> Tensor | None:
        """bool [N, T]."""
        return self.get("loss_mask")

    @property
    def attention_mask(self) -> Tensor | None:
        """[N, T]; bool if the network supports padding."""
        return self.get("attention_mask")

    @property
    def cu_seqlens(self) -> Tensor | None:
        """int32 [documents + 1]."""
        return self.get("cu_seqlens")

    def check_blocks(self, block_size: int) -> None:
        """Raises unless every sequence, document or text consists of whole blocks of tokens."""
        T, ends = self.tokens.shape[1], self.cu_seqlens
        if T % block_size:
            raise ValueError(
                f"tokens must be multiples of tokens_per_block={block_size} long, got {T}; "
                "pad them, with a loss_mask"
            )
        if block_size > 1 and self.attention_mask is not None:
            check_text_blocks(self.attention_mask, block_size)
        if block_size == 1 or ends is None or not values_known(ends):
            return
        if (ends % block_size).any():
            raise ValueError(
                f"documents must be multiples of tokens_per_block={block_size} long, got ends "
                f"{ends.tolist()}; pad each, with a loss_mask"
            )

    def positions(self) -> Tensor:
        """Positions of the tokens, which begin again in each document, int64 [T]."""
        row = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if self.cu_seqlens is None:
            return row
        return row - self.cu_seqlens.long()[_document_of(row, self.cu_seqlens)]

    def labels(self) -> Tensor:
        """The tokens to predict, int64 [N, T]; `IGNORED` where there is none."""
        predicted = self.positions() > 0
        if self.loss_mask is not None:
            predicted = predicted & self.loss_mask
        if self.attention_mask is not None:
            # The first token of a text is given.
            predicted = predicted & nnf.pad(self.attention_mask[:, :-1], (1, 0))
        return torch.where(predicted, self.tokens, IGNORED)

    def attend_causally(self, block_size: int = 1) -> Attend | None:
        """Attention of a row to earlier tokens and to its own block, within its document.

        None if that is plain causal attention: blocks of one token, and one document.
        """
        if self.cu_seqlens is None and block_size == 1:
            return None
        block = self.positions() // block_size
        mask = block[:, None] >= block
        if self.cu_seqlens is not None:
            row = torch.arange(self.tokens.shape[1], device=self.tokens.device)
            document = _document_of(row, self.cu_seqlens)
            mask = mask & (document[:, None] == document)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nnf.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
            )

        return attend


def moved_to_front(given: TokenBatch) -> tuple[TokenBatch, Tensor | None]:
    """The batch with padding moved behind the texts, and where these began; see `padding`."""
    starts = starts_of(given.attention_mask)
    if starts is None:
        return given, None
    names = ("tokens", "loss_mask", "attention_mask", "position_ids")
    moved = {n: to_front(given[n], starts) for n in names if given.get(n) is not None}
    return TokenBatch({**given, **moved}), starts


def padded_documents() -> ValueError:
    """The error for an attention_mask of packed documents."""
    return ValueError(
        "attention_mask must be None with cu_seqlens: packed documents have no padding; "
        "leave one of them out"
    )


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises unless `tokens` are int64 [N, T] in 0..vocab_size - 1, checked on the CPU only."""
    if tokens.dtype != torch.int64:
        # uint8 and bool would select rows as masks do.
        raise TypeError(f"tokens must be int64, got {tokens.dtype}; call tokens.long()")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens must have shape [N, T] with T >= 1, got {list(tokens.shape)}; reshape them"
        )
    # On a GPU reading the values would synchronise; there indexing itself asserts.
    if not values_known(tokens) or not tokens.numel():
        return
    low, high = (int(value) for value in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens must be in 0..{vocab_size - 1}, got {low}..{high}")


def _check_loss_mask(mask: Tensor, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"loss_mask must be a bool tensor, got {got}; compare with 0")
    if mask.shape != tokens.shape:
        raise ValueError(
            "loss_mask must have the shape of the tokens, "
            f"{list(tokens.shape)}, got {list(mask.shape)}"
        )


def _check_documents(cu_seqlens: Tensor, tokens: Tensor, context: int) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {got}; call .int()")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must have shape [documents + 1] with at least one document, "
            f"got {list(cu_seqlens.shape)}"
        )
    N, T = tokens.shape
    if N != 1:
        raise ValueError(f"cu_seqlens needs N = 1, got N = {N}; pack the samples into one sequence")
    if not values_known(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must start with 0, never decrease and end with T = {T}, "
            f"got {cu_seqlens.tolist()}"
        )
    if lengths.max() > context:
        raise ValueError(
            f"documents must be at most context={context} long, got {int(lengths.max())}; cut them"
        )


def _document_of(row: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:].contiguous().long(), row, right=True)
