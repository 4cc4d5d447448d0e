"""What a network offers whose text is written, filled in or scored here.

`CausalLM`, `RecurrentLM`, `MaskedLM` and what `dblocks.convert` makes of language models offer it;
a network of one's own may. Blocks of tokens need the members of `BlockModel` beside these.
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
    """A network of tokens: with a `MaskSchedule`, its blocks fill in masked ones."""

    @property
    def sizes(self) -> TokenSizes:
        """Of the vocabulary and of the longest text."""
        ...


@runtime_checkable
class CausalNetwork(TokenNetwork, Protocol):
    """A network whose blocks predict a token by denoising its embedding, from those before it."""

    @property
    def width(self) -> int:
        """Width D of a target."""
        ...

    @property
    def rows_kind(self) -> RowsKind:
        """Whether noisy rows take the place of clean ones or run beside them."""
        ...

    @property
    def block_size(self) -> int:
        """How many consecutive tokens are predicted at once."""
        ...


@runtime_checkable
class CachedNetwork(CausalNetwork, Protocol):
    """One that also keeps keys and values of known tokens, for writing text token by token.

    Without a cache they are computed at each call, unless it has an attribute `runs_whole` that is
    true: then all rows run as in training, by `embed_condition` and `run_layers`, whose result has
    the fields `x` and `cond`.
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
        """What the target makes logits of, from what `run_cached` returned."""
        ...


@runtime_checkable
class NextTokenNetwork(Protocol):
    """A model of the next token, trained end to end, with a cache of its own."""

    @property
    def sizes(self) -> TokenSizes:
        """Of the vocabulary and of the longest text."""
        ...

    @property
    def plain_noise_width(self) -> int:
        """Normals that it draws for each token."""
        ...

    def plain_steps(self, num_steps: int | None) -> int:
        """How often it runs its layers, `num_steps` if it can; else it raises ValueError."""
        ...

    @property
    def target(self) -> TokenTarget:
        """The embedding of each token."""
        ...

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits` with as many steps."""
        ...

    def next_logits(
        self, tokens: Tensor, cache: KVCache, target: TokenTarget, *, num_steps: int, noise: Tensor
    ) -> Tensor:
        """Logits [N, V] of the token after the cached ones and `tokens` [N, C]."""
        ...

    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits [N, T, V] of the tokens that follow `tokens` [N, T]."""
        ...
