"""Embeddings of targets and of noise levels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

SINCOS_WIDTH = 256  # Peebles and Xie 2023 (DiT), frequency embedding
MAX_PERIOD = 10_000.0
EMBEDDING_STD = 0.02  # Peebles and Xie 2023 (DiT), initialisation of the timestep embedding


class LabelEmbedding(nn.Module):
    """A table of target embeddings whose rows are normalised to norm `embed_scale`.

    Args:
        num_classes: number of rows K.
        dim: width of a row.
        embed_scale: norm of each row.
    """

    def __init__(self, num_classes: int, dim: int, embed_scale: float = 1.0) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        self.weight = nn.Parameter(torch.randn(num_classes, dim))

    def rows(self) -> Tensor:
        """All normalised rows, float32 [K, D], as used in training and sampling."""
        return self.embed_scale * nnf.normalize(self.weight.float(), dim=-1)

    def forward(self, labels: Tensor) -> Tensor:
        """The normalised rows of `labels` [N] or [N, T]: float32 [N, D] or [N, T, D]."""
        return self.rows()[labels]


class NoiseEmbedding(nn.Module):
    """The conditioning vector of a noise level: `MLP(sincos(c_noise))`.

    `sincos` is [cos | sin] of `c_noise * exp(-ln(1e4) k/128)`, in float32 (float64 for float64),
    also under autocast.

    Args:
        cond_dim: width of the conditioning vector.
    """

    frequencies: Tensor

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        half = SINCOS_WIDTH // 2
        frequencies = torch.exp(
            -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half
        )
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.fc1 = nn.Linear(SINCOS_WIDTH, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)
        # DiT's initialisation: a weak dependence on the noise extrapolates to rarely drawn levels.
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=EMBEDDING_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embeds `c_noise` [N] or [N, S] as [N, cond_dim] or [N, S, cond_dim]."""
        angle = (c_noise if c_noise.dtype == torch.float64 else c_noise.float())[
            ..., None
        ] * self.frequencies.float()
        sincos = torch.cat([angle.cos(), angle.sin()], dim=-1)
        # Autocast would round sines and cosines to bfloat16; the work is one row per sample.
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.fc2(nnf.silu(self.fc1(sincos.to(self.fc1.weight.dtype))))
