"""Networks of several members: one of them trains in a step, all of them predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, MaskedTokenTarget
from dblocks.models.dit import DiT, DiTConfig
from dblocks.models.masked_lm import FirstRows, MaskedLM, MaskedLMConfig
from dblocks.schedules import NoiseLevel


class Members(nn.Module):
    """Base: a network that is the first member, with the others in `others`.

    Its `layers` are those of the first member, so that a `DiffusionBlocks` of one block has it
    whole.
    """

    others: nn.ModuleList
    turn: int | None = None
    """The member that alone computes; None for all of them."""

    @property
    def members(self) -> list[Any]:
        """All of them."""
        return [self, *self.others]

    @property
    def computing(self) -> list[Any]:
        """Those that compute now."""
        return self.members if self.turn is None else [self.members[self.turn]]

    def parameters_of(self, member: int) -> list[nn.Parameter]:
        """Those of one member."""
        if member:
            return list(self.others[member - 1].parameters())
        others = {id(parameter) for parameter in self.others.parameters()}
        return [p for p in self.parameters() if id(p) not in others]

    @contextmanager
    def alone(self, member: int) -> Iterator[None]:
        """Inside the `with` block one member computes."""
        self.turn = member
        try:
            yield
        finally:
            self.turn = None


class EnsembleDiT(Members, DiT):
    """Diffusion transformers whose outputs F, and with them the denoised estimates, are averaged.

    Args:
        config: of all layers together.
        count: of members, which share the layers evenly.
    """

    def __init__(self, config: DiTConfig, count: int) -> None:
        DiT.__init__(self, small := replace(config, depth=config.depth // count))
        self.others = nn.ModuleList(DiT(small) for _ in range(count - 1))

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Any:
        """That of each member."""
        return [DiT.embed_condition(member, batch, drop) for member in self.computing]

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Any
    ) -> Any:
        """All layers of each member."""
        return [
            DiT.run_layers(member, member.layers, z_in, level, given)
            for member, given in zip(self.computing, condition, strict=True)
        ]

    def features(self, hidden: Any) -> Tensor:
        """The mean of F."""
        found = [
            DiT.features(member, one) for member, one in zip(self.computing, hidden, strict=True)
        ]
        return torch.stack(found).mean(0)


class JoinedHead:
    """The output heads of members beside each other, so that logits are the mean of theirs."""

    bias = None

    def __init__(self, heads: Sequence[FirstRows]) -> None:
        self.heads = heads

    @property
    def weight(self) -> Tensor:
        """[V, B*D]."""
        return torch.cat([head.weight for head in self.heads], dim=1) / len(self.heads)


class EnsembleMaskedLM(Members, MaskedLM):
    """Masked language models whose logits are averaged.

    Args:
        config: of all layers together; the output head is the embedding.
        count: of members, which share the layers evenly.
    """

    def __init__(self, config: MaskedLMConfig, count: int) -> None:
        MaskedLM.__init__(self, small := replace(config, depth=config.depth // count))
        self.others = nn.ModuleList(MaskedLM(small) for _ in range(count - 1))

    @property
    def target(self) -> MaskedTokenTarget:
        """The masked tokens, by the heads of those that compute."""
        heads = [FirstRows(member.embedding) for member in self.computing]
        head: Any = heads[0] if len(heads) == 1 else JoinedHead(heads)
        return MaskedTokenTarget(head, self.config, padding=True)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Any:
        """What is known of the texts, the same for all."""
        return MaskedLM.embed_condition(self, batch, drop)

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: Any, condition: Any
    ) -> Any:
        """All layers of each member."""
        return [
            MaskedLM.run_layers(member, member.layers, z_in, level, condition)
            for member in self.computing
        ]

    def features(self, hidden: Any) -> Tensor:
        """Rows of the members beside each other, [N, T, B*D]."""
        found = [
            MaskedLM.features(member, one)
            for member, one in zip(self.computing, hidden, strict=True)
        ]
        return torch.cat(found, dim=-1)
