"""A layer of the user's model, run with its own weights and conditioned on the noise level.

    h = norm1(x)*(1 + scale1) + shift1 ;  x = x + (1 + gate1)*attention(h)
    h = norm2(x)*(1 + scale2) + shift2 ;  x = x + (1 + gate2)*mlp(h)

between which a decoder such as T5's adds its attention to another text, which is not modulated; or,
where the norms come after the sums as in BERT,

    x = norm1(x + (1 + gate1)*attention(x))*(1 + scale1) + shift1, and the same of the MLP,

or, where both branches see the same rows as in GPT-J,

    h1 = norm1(x)*(1 + scale1) + shift1 ;  h2 = norm2(x)*(1 + scale2) + shift2
    x = x + (1 + gate1)*attention(h1) + (1 + gate2)*mlp(h2),

in which norm2 may be norm1. Without a norm before a branch, the branch takes the rows.

Without a modulation, or with zeros, this is the layer's own function. Norms, sums and modulations
run as fused ops; attention and MLP are the model's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dblocks import functional as F
from dblocks.blocks.changes import runs_more
from dblocks.blocks.sharding import within
from dblocks.integrations.convert.attention_view import follow_
from dblocks.integrations.convert.forms import LayerForm
from dblocks.integrations.norms import NormSpec, norm_spec
from dblocks.nn import Modulation, over_rows

CHUNKS = 6  # shift, scale and gate of the attention, then of the MLP
# Largest width of the conditioning vector. At the width of the model, as in DiT, the modulations
# would have half as many parameters as the layers, which is too many for a function of one number.
COND_DIM = 256


class ByLayerType(dict[str, Any]):
    """Keyword arguments of the attention by type of layer, as in the model's config."""


class OfLayer:
    """Keyword arguments of the attention that a module of its layer computes, such as a bias.

    Args:
        make: a function of the layer.
    """

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        self.make = make


def context_of(layer: nn.Module, attention: Any, context: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one layer's attention, out of those of all layers."""

    def own(value: Any) -> Any:
        if isinstance(value, ByLayerType):
            return value[attention.config.layer_types[attention.layer_idx]]
        return value.make(layer) if isinstance(value, OfLayer) else value

    return {name: own(value) for name, value in context.items() if name != "dblocks_cross"}


def cond_dim(width: int) -> int:
    """Width of the conditioning vector in a converted model with rows of this width."""
    return min(width, COND_DIM)


class ConditionedLayer(nn.Module):
    """A layer of a model with a modulation that starts at zero.

    Hooks on the layer itself do not run; those on its parts do.

    Args:
        layer: the model's own layer; its modules are used, not copied.
        dim: width D of its rows.
        form: the paths of its parts.
        attention: replacement of its attention, with the same parameters.
    """

    def __init__(
        self, layer: nn.Module, dim: int, form: LayerForm, attention: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.modulation = Modulation(dim, CHUNKS, cond_dim=cond_dim(dim))
        self.form = form
        # In a tuple, so that it is not registered: its parameters are the layer's.
        self.instead = () if attention is None else (attention,)

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        context: Mapping[str, Any] | None = None,
        *,
        clean: int = 0,
        checkpointing: bool = False,
    ) -> Tensor:
        """Runs the layer.

        Args:
            x: rows [N, T, D].
            cond: conditioning vectors [N, D] or [N, S, D]; None for the layer's own function.
            context: keyword arguments of the attention, and as "dblocks_cross" those of the one
                to another text.
            clean: how many segments of rows, as long as one of `cond` [N, S, D], stand before
                those that are modulated.
            checkpointing: store only the layer's input, and recompute the rest in the backward.
        """
        own = getattr(self.layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if checkpointing or own:
            return checkpoint(self._within, x, cond, context or {}, clean, use_reentrant=False)
        return self._within(x, cond, context or {}, clean)

    @property
    def attention(self) -> nn.Module:
        """The model's own attention."""
        return self.layer.get_submodule(self.form.attention)

    def follow_(self) -> None:
        """Takes over attributes that were set on the attention since the last call."""
        for view in self.instead:
            follow_(view, self.attention)

    def norms(self) -> list[nn.Module]:
        """The norms of the attention and of the MLP."""
        paths = filter(None, (self.form.norm1, self.form.norm2))
        return [self.layer.get_submodule(path) for path in paths]

    def _within(
        self, x: Tensor, cond: Tensor | None, context: Mapping[str, Any], clean: int
    ) -> Tensor:
        return within(self.layer, self._run)(x, cond, context, clean)

    def _run(
        self, x: Tensor, cond: Tensor | None, context: Mapping[str, Any], clean: int
    ) -> Tensor:
        chunks: tuple[Tensor | None, ...] = (None,) * CHUNKS
        if cond is not None:
            chunks = _chunks(self.modulation(cond, len(x)), clean=clean)
        run = self._post_norm if self.form.post_norm else self._pre_norm
        return (self._parallel if self.form.parallel else run)(x, chunks, context)

    def _pre_norm(
        self, x: Tensor, chunks: tuple[Tensor | None, ...], context: Mapping[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        h = _modulate(self._norm(self.form.norm1), x, shift1, scale1)
        branch, norm2 = self._attend(h, context), self._norm(self.form.norm2)
        if self.form.cross:
            cross = self.layer.get_submodule(self.form.cross)
            x = cross(F.gated_residual(x, branch, gate1), **context["dblocks_cross"])[0]
            h = _modulate(norm2, x, shift2, scale2)
        else:
            x, h = _add_and_modulate(norm2, x, branch, gate1, shift2, scale2)
        return F.gated_residual(x, self._transform(h), gate2)

    def _parallel(
        self, x: Tensor, chunks: tuple[Tensor | None, ...], context: Mapping[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        form = self.form
        norm1, norm2 = self._norm(form.norm1), self._norm(form.norm2 or form.norm1)
        h1 = _modulate(norm1, x, shift1, scale1)
        same = norm1 is norm2 and shift1 is None
        h2 = h1 if same else _modulate(norm2, x, shift2, scale2)
        attended, transformed = self._attend(h1, context), self._transform(h2)
        return F.gated_residual(F.gated_residual(x, attended, gate1), transformed, gate2)

    def _post_norm(
        self, x: Tensor, chunks: tuple[Tensor | None, ...], context: Mapping[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        norm1, norm2 = self._norm(self.form.norm1), self._norm(self.form.norm2)
        _, x = _add_and_modulate(norm1, x, self._attend(x, context), gate1, shift1, scale1)
        _, x = _add_and_modulate(norm2, x, self._transform(x), gate2, shift2, scale2)
        return x

    def _norm(self, path: str) -> nn.Module:
        return self.layer.get_submodule(path) if path else nn.Identity()

    def _attend(self, h: Tensor, context: Mapping[str, Any]) -> Tensor:
        attention = own = self.attention
        for attention in self.instead:
            attention.training = own.training
        out = attention(h, **context_of(self.layer, own, context))
        form, branch = self.form, out if isinstance(out, Tensor) else out[0]
        return self._after(branch, form.after_attention, form.multiplier)

    def _transform(self, h: Tensor) -> Tensor:
        zero = (h.new_zeros(()),) if self.form.adds_rows else ()
        out = self.layer.get_submodule(self.form.mlp)(h, *zero)
        # Some mixtures of experts also return the router's output.
        form, branch = self.form, out if isinstance(out, Tensor) else out[0]
        return self._after(branch, form.after_mlp, form.mlp_multiplier or form.multiplier)

    def _after(self, x: Tensor, paths: tuple[str, ...], multiplier: str) -> Tensor:
        for path in paths:
            x = self.layer.get_submodule(path)(x)
        layer: Any = self.layer
        if self.form.dropout:
            x = nnf.dropout(x, attrgetter(self.form.dropout)(layer), layer.training)
        factor = attrgetter(multiplier)(layer) if multiplier else None
        return x if factor is None else x * factor


def _chunks(chunks: Sequence[Tensor], *, clean: int) -> tuple[Tensor, ...]:
    """Shifts, scales and factors of the branches, from shifts, scales and gates [N, (S,) D]."""
    if clean:
        chunks = [nnf.pad(chunk, (0, 0, clean, 0)) for chunk in chunks]
    shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    return shift1, scale1, 1 + gate1, shift2, scale2, 1 + gate2


def _spec(norm: nn.Module, dtype: torch.dtype) -> NormSpec | None:
    """None if the norm itself must be called."""
    return None if runs_more(norm) else norm_spec(norm, dtype)


def _modulate(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    spec = _spec(norm, x.dtype)
    if spec is None:
        h = norm(x)
        if shift is None or scale is None:
            return h
        return (h * (1 + over_rows(scale, h)) + over_rows(shift, h)).to(h.dtype)
    return F.adaln(
        x, shift, scale, norm=spec.norm, eps=spec.eps, weight=spec.weight, bias=spec.bias
    )


def _add_and_modulate(
    norm: nn.Module,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    spec = _spec(norm, x.dtype)
    if spec is None:
        x = F.gated_residual(x, branch, gate)
        return x, _modulate(norm, x, shift, scale)
    return F.residual_adaln(
        x, branch, gate, shift, scale,
        norm=spec.norm, eps=spec.eps, weight=spec.weight, bias=spec.bias,
    )  # fmt: skip
