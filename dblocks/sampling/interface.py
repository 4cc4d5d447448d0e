"""What a network offers whose text is written, filled in or scored here.

`CausalLM`, `RecurrentLM`, `MaskedLM` and what `dblocks.convert` makes of language models offer it;
a network of one's own may. Blocks of tokens need the members of `BlockModel` beside these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dblocks.sampling.cache import KVCache, Slots
from dblocks.schedules import NoiseLevel

RowsKind = Literal["single", "doubled"]


class TokenSizes(Protocol):
    """What the checks of tokens need."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence or document."""
        ...


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
    """One that also keeps keys and values of known tokens, for writing text token by token."""

    def current_readout(self) -> Any:
        """The matrices of the output head as they are now, made once for many calls."""
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
        readout: Any,
    ) -> Any:
        """Runs the noisy rows that follow the cached rows and `tokens`; see `LanguageModel`."""
        ...

    def read_out(self, hidden: Any, z: Tensor, level: NoiseLevel, readout: Any) -> Tensor:
        """Logits of what `run_cached` returned, [N, R, V]."""
        ...

    def denoise(self, prediction: Tensor, z: Tensor, level: NoiseLevel, readout: Any) -> Tensor:
        """The expected embedding under logits, [N, R, D]."""
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

    def current_readout(self) -> Any:
        """The matrices of the output head as they are now, made once for many calls."""
        ...

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits` with as many steps."""
        ...

    def next_logits(
        self, tokens: Tensor, cache: KVCache, readout: Any, *, num_steps: int, noise: Tensor
    ) -> Tensor:
        """Logits [N, V] of the token after the cached ones and `tokens` [N, C]."""
        ...

    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits [N, T, V] of the tokens that follow `tokens` [N, T]."""
        ...


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises unless `tokens` are int64 [N, T] in 0..vocab_size - 1; values are seen on the CPU."""
    if tokens.dtype != torch.int64:
        # uint8 and bool would select rows as masks do.
        raise TypeError(f"tokens must be int64, got {tokens.dtype}; call tokens.long()")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens must have shape [N, T] with T >= 1, got {list(tokens.shape)}; reshape them"
        )
    # On a GPU looking at the values would synchronise; there indexing itself asserts.
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
        return
    low, high = (int(value) for value in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens must be in 0..{vocab_size - 1}, got {low}..{high}")
