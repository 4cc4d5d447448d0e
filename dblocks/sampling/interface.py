"""Interfaces of networks for text generation, unmasking and likelihoods.

`CausalLM`, `RecurrentLM`, `MaskedLM` and language models wrapped by `dblocks.convert` implement
them, and so can your own network. In blocks, the members of `BlockModel` are also needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dblocks.blocks import Features, TokenTarget
from dblocks.blocks.targets.token_batch import TokenSizes
from dblocks.sampling.cache import KVCache, Slots
from dblocks.schedules import NoiseLevel

RowsKind = Literal["single", "doubled"]


@runtime_checkable
class TokenNetwork(Protocol):
    """A network of tokens; with a `MaskSchedule`, its blocks fill in masked tokens."""

    @property
    def sizes(self) -> TokenSizes:
        """Sizes of the vocabulary and of the longest text."""
        ...


@runtime_checkable
class CausalNetwork(TokenNetwork, Protocol):
    """A network whose blocks predict a token from those before it by denoising its embedding."""

    @property
    def width(self) -> int:
        """Width D of a target."""
        ...

    @property
    def rows_kind(self) -> RowsKind:
        """ "single" if noisy rows replace clean ones, "doubled" if both run side by side."""
        ...

    @property
    def block_size(self) -> int:
        """Number of consecutive tokens predicted at once."""
        ...


@runtime_checkable
class CachedNetwork(CausalNetwork, Protocol):
    """A `CausalNetwork` with a key-value cache, to generate text token by token.

    Without a cache, keys and values are computed in each call. If the network has an attribute
    `runs_whole` that is true, all rows then run as in training, with `embed_condition` and
    `run_layers`, whose result has the fields `x` and `cond`.
    """

    @property
    def target(self) -> TokenTarget:
        """The embedding of each token."""
        ...

    def new_cache(self, slots: Slots, layers: Sequence[nn.Module]) -> KVCache:
        """A cache for `run_cached` with these layers."""
        ...

    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: KVCache,
        table: Tensor,
    ) -> Any:
        """Runs the noisy rows that follow the cached rows and `tokens`; see `LanguageModel`."""
        ...

    def features(self, hidden: Any) -> Features:
        """The input of the target's logits, from the result of `run_cached`."""
        ...


@runtime_checkable
class NextTokenNetwork(Protocol):
    """A next-token model, trained end to end, with a key-value cache."""

    @property
    def sizes(self) -> TokenSizes:
        """Sizes of the vocabulary and of the longest text."""
        ...

    @property
    def plain_noise_width(self) -> int:
        """Number of normal random numbers drawn for each token."""
        ...

    def plain_steps(self, num_steps: int | None) -> int:
        """Number of passes through the layers: `num_steps`, or ValueError if not supported."""
        ...

    @property
    def target(self) -> TokenTarget:
        """The embedding of each token."""
        ...

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits` with this number of steps."""
        ...

    def next_logits(
        self, tokens: Tensor, cache: KVCache, target: TokenTarget, *,
        num_steps: int, normals: Tensor,
    ) -> Tensor:  # fmt: skip
        """Logits [N, V] of the token after the cached ones and `tokens` [N, C]."""
        ...

    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits [N, T, V] of the tokens that follow `tokens` [N, T]."""
        ...


def check_some_texts(tokens: Tensor) -> None:
    """Raises TypeError for texts that are no tensor; ValueError for none, without a likelihood."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be an int64 tensor [N, T], got {type(tokens).__name__}; make one by "
            "torch.tensor, with texts of different lengths padded and an attention_mask"
        )
    if tokens.numel() == 0:
        raise ValueError(
            f"tokens must be [N, T] with at least one token, got shape {list(tokens.shape)}; leave "
            "empty batches out"
        )
