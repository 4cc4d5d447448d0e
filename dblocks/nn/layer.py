"""The noise-conditioned transformer layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.nn.branches import MLPS, Attend, Attention, MLPKind, Rotary
from dblocks.nn.conditioning import ConditioningKind
from dblocks.nn.modulation import GATE_CHUNKS, Modulation, Norm, NormKind


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer, conditioned on the noise by AdaLN-zero.

        h = norm1(x)*(1 + scale1) + shift1 ;  x = x + gate1*attention(h)
        h = norm2(x)*(1 + scale2) + shift2 ;  x = x + gate2*mlp(h)

    The first sum and the second norm are one op. With kind "none" there is no modulation, and the
    layer is that of the classical ViT; with `norm="rms", mlp="swiglu", bias=False` and rotary
    positions, that of Llama.

    Args:
        dim: width D.
        num_heads: number of heads.
        hidden_dim: width inside the MLP.
        kind: the convention of the conditioning.
        causal: whether attention is causal.
        gate_init: what the gates are at the start: 0, as published, makes the layer the identity,
            and 1 the plain layer.
        norm: "layer" or "rms".
        mlp: "gelu", "gelu_tanh" (GELU's approximation by tanh, as in DiT) or "swiglu".
        num_kv_heads: number of key/value heads; `num_heads` by default.
        bias: attention and MLP have biases.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        kind: ConditioningKind = "dit",
        causal: bool = False,
        gate_init: float = 0.0,
        norm: NormKind = "layer",
        mlp: MLPKind = "gelu",
        num_kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if mlp not in MLPS:
            raise ValueError(f"mlp must be one of {list(MLPS)}, got {mlp!r}")
        self.norm1 = Norm(dim, kind, norm=norm)
        self.attention = Attention(
            dim, num_heads, num_kv_heads=num_kv_heads, causal=causal, bias=bias
        )
        self.norm2 = Norm(dim, kind, norm=norm)
        self.mlp = MLPS[mlp](dim, hidden_dim, bias=bias)
        self.modulation = None if kind == "none" else Modulation(dim, 6, kind)
        if self.modulation is not None and gate_init:
            self.modulation.start_at_(GATE_CHUNKS, gate_init)

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: [N, T, D].
            cond: [N, cond_dim], [N, S, cond_dim], or None for the null conditioning.
            rotary: rotations of the queries and keys.
            attend: attention of queries over keys and values; the layer's own by default.

        Returns:
            [N, T, D] in the dtype of `x`.
        """
        h, modulation = self._enter(x, cond)
        return self._leave(x, self.attention(h, rotary, attend), modulation)

    def doubled(
        self,
        clean: Tensor,
        noisy: Tensor,
        cond: Tensor | None,
        *,
        rotary: Rotary,
        attend: Attend,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One layer on clean rows, under the null conditioning, beside noisy rows.

        The rows share the attention only, which sees them as `[clean | noisy]`.

        Args:
            clean: [N, C, D].
            noisy: [N, R, D].
            cond: conditioning of the noisy rows, [N, cond_dim] or [N, S, cond_dim].
            rotary: rotations of all C + R rows.
            attend: attention of the queries over keys and values of all rows; queries are of all
                rows too, or with `keys_only` of the noisy ones.
            keys_only: clean rows give keys and values and are not computed further.

        Returns:
            The clean rows, as they were with `keys_only`, and the noisy rows.
        """
        attention, C = self.attention, clean.shape[1]
        h_clean, m_clean = self._enter(clean, None)
        h_noisy, m_noisy = self._enter(noisy, cond)
        if keys_only:
            k_clean, v_clean = attention.project_keys(h_clean, rotary.rows(0, C))
            q, k, v = attention.project(h_noisy, rotary.rows(C))
            o = attend(q, torch.cat([k_clean, k], dim=2), torch.cat([v_clean, v], dim=2))
            return clean, self._leave(noisy, attention.merge(o), m_noisy)
        branch = attention(torch.cat([h_clean, h_noisy], dim=1), rotary, attend)
        b_clean, b_noisy = branch.split((C, noisy.shape[1]), dim=1)
        return self._leave(clean, b_clean, m_clean), self._leave(noisy, b_noisy, m_noisy)

    def _enter(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The input of the attention, and the modulation of the rest of the layer."""
        modulation: tuple[Tensor | None, ...] = (None,) * 6
        if self.modulation is not None:
            modulation = self.modulation(cond, x.shape[0])
        shift, scale, *rest = modulation
        return self.norm1.modulate(x, shift, scale), tuple(rest)

    def _leave(self, x: Tensor, branch: Tensor, modulation: tuple[Tensor | None, ...]) -> Tensor:
        gate1, shift, scale, gate2 = modulation
        x, h = self.norm2.add_and_modulate(x, branch, gate1, shift, scale)
        return F.gated_residual(x, self.mlp(h), gate2)
