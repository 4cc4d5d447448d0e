"""Embeddings of the user's model, scaled to one norm, as targets."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks.targets.classes import at_least_float32


class ScaledRows:
    """Embeddings of the user's model as targets, scaled to one norm.

    Args:
        embedding: the embedding of tokens.
        embed_scale: the norm of a target.
    """

    def __init__(self, embedding: nn.Embedding, embed_scale: float) -> None:
        self.embedding = embedding
        self.embed_scale = embed_scale

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight

    def rows(self) -> Tensor:
        """[V, D], float32 (float64)."""
        return self.embed_scale * nnf.normalize(at_least_float32(self.weight), dim=-1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the embedding."""
        return self.embedding.parameters()
