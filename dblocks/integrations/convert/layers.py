"""A layer of somebody's model, run with its own weights and conditioned on the noise.

    h = norm1(x)*(1 + scale1) + shift1 ;  x = x + (1 + gate1)*attention(h)
    h = norm2(x)*(1 + scale2) + shift2 ;  x = x + (1 + gate2)*mlp(h)

or, where the norms come after the sums as in BERT,

    x = norm1(x + (1 + gate1)*attention(x))*(1 + scale1) + shift1, and the same of the MLP.

With a modulation of zero, or without one, it is the layer's own function. Norms, sums and
modulation are the fused ops; attention and MLP are the model's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dblocks import functional as F
from dblocks.nn import Modulation, over_rows

CHUNKS = 6  # shift, scale and gate of the attention, then of the MLP
# Widest conditioning vector. As wide as the model, as in DiT, modulations would be half as large as
# the layers, which is much for what depends on one number.
COND_DIM = 256


@dataclass(frozen=True)
class LayerForm:
    """Where the parts of a layer are: paths of its submodules."""

    norm1: str
    """The attention's norm."""
    attention: str
    """The attention."""
    norm2: str
    """The MLP's norm."""
    mlp: str
    """The MLP."""
    after_attention: tuple[str, ...] = ()
    """What the attention's result goes through before it is added."""
    after_mlp: tuple[str, ...] = ()
    """What the MLP's result goes through before it is added."""
    post_norm: bool = False
    """Norms come after the sums."""

    def paths(self) -> tuple[str, ...]:
        """All of them."""
        named = (self.norm1, self.attention, self.norm2, self.mlp)
        return (*named, *self.after_attention, *self.after_mlp)


# Tried in this order; that a form is right is found out by running it, see `check_form`.
FORMS = (
    LayerForm("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),  # Llama
    LayerForm("ln_1", "attn", "ln_2", "mlp"),  # GPT-2
    LayerForm(  # ViT of transformers
        "layernorm_before", "attention", "layernorm_after", "mlp", ("dropout",), ("dropout",)
    ),
    LayerForm(  # ViT of transformers 4
        "layernorm_before",
        "attention",
        "layernorm_after",
        "intermediate",
        after_mlp=("output.dense", "output.dropout"),
    ),
    LayerForm(  # timm
        "norm1", "attn", "norm2", "mlp", ("ls1", "drop_path1"), ("ls2", "drop_path2")
    ),
    LayerForm(  # BERT
        "attention.output.LayerNorm",
        "attention.self",
        "output.LayerNorm",
        "intermediate",
        ("attention.output.dense", "attention.output.dropout"),
        ("output.dense", "output.dropout"),
        post_norm=True,
    ),
)


def cond_dim(width: int) -> int:
    """Width of the conditioning vector in a converted model with rows of this width."""
    return min(width, COND_DIM)


def form_of(layer: nn.Module) -> LayerForm | None:
    """The first of `FORMS` whose submodules the layer has."""
    for form in FORMS:
        if all(_has(layer, path) for path in form.paths()):
            return form
    return None


class NormKind(NamedTuple):
    """What the fused ops need to know of a norm."""

    norm: Literal["layer", "rms"]
    eps: float
    weight: Tensor | None
    bias: Tensor | None


def norm_kind(norm: nn.Module) -> NormKind | None:
    """A norm as the fused ops compute it; None where its own module has to."""
    name = type(norm).__name__
    if name == "LayerNorm" and isinstance(norm, nn.LayerNorm):
        if len(norm.normalized_shape) == 1:
            return NormKind("layer", norm.eps, norm.weight, norm.bias)
    elif isinstance(norm, nn.RMSNorm) and name == "RMSNorm" and norm.eps is not None:
        if len(norm.normalized_shape) == 1:
            return NormKind("rms", norm.eps, norm.weight, None)
    # Llama's and those that have its code; norms of other models scale by 1 + weight.
    elif name in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm"):
        return NormKind("rms", norm.variance_epsilon, norm.weight, None)  # pyright: ignore
    return None


class ConditionedLayer(nn.Module):
    """A layer of a model with a modulation that starts at zero.

    Hooks on the layer itself and on its norms do not run here.

    Args:
        layer: the model's own; its modules are used, not copied.
        dim: width D of its rows.
        form: where its parts are.
        attention: what runs in place of its attention, with the same parameters.
    """

    attention: nn.Module | None

    def __init__(
        self, layer: nn.Module, dim: int, form: LayerForm, attention: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.modulation = Modulation(dim, CHUNKS, cond_dim=cond_dim(dim))
        self.form = form
        # Not registered: its parameters are the layer's.
        object.__setattr__(self, "attention", attention)

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        context: Mapping[str, Any] | None = None,
        *,
        clean: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        """One layer.

        Args:
            x: rows [N, T, D].
            cond: conditioning vectors [N, D] or [N, S, D]; None for the layer's own function.
            context: keyword arguments of the attention.
            clean: the first half of the rows is not modulated, and `cond` [N, S, D] is that of the
                second.
            checkpointing: keep the layer's input only, and compute the rest again for gradients.
        """
        own = getattr(self.layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if checkpointing or own:
            return checkpoint(self._run, x, cond, context or {}, clean, use_reentrant=False)
        return self._run(x, cond, context or {}, clean)

    def _run(
        self, x: Tensor, cond: Tensor | None, context: Mapping[str, Any], clean: bool
    ) -> Tensor:
        chunks: tuple[Tensor | None, ...] = (None,) * CHUNKS
        if cond is not None:
            chunks = _chunks(self.modulation(cond, len(x)), clean=clean)
        run = self._post_norm if self.form.post_norm else self._pre_norm
        return run(x, chunks, context)

    def _pre_norm(
        self, x: Tensor, chunks: tuple[Tensor | None, ...], context: Mapping[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        part, form = self.layer.get_submodule, self.form
        h = _modulate(part(form.norm1), x, shift1, scale1)
        x, h = _add_and_modulate(
            part(form.norm2), x, self._attend(h, context), gate1, shift2, scale2
        )
        return F.gated_residual(x, self._transform(h), gate2)

    def _post_norm(
        self, x: Tensor, chunks: tuple[Tensor | None, ...], context: Mapping[str, Any]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        part, form = self.layer.get_submodule, self.form
        _, x = _add_and_modulate(
            part(form.norm1), x, self._attend(x, context), gate1, shift1, scale1
        )
        _, x = _add_and_modulate(part(form.norm2), x, self._transform(x), gate2, shift2, scale2)
        return x

    def _attend(self, h: Tensor, context: Mapping[str, Any]) -> Tensor:
        own = self.layer.get_submodule(self.form.attention)
        attention = own if self.attention is None else self.attention
        if attention is not own:
            attention.training = own.training
        out = attention(h, **context)
        return self._after(out if isinstance(out, Tensor) else out[0], self.form.after_attention)

    def _transform(self, h: Tensor) -> Tensor:
        return self._after(self.layer.get_submodule(self.form.mlp)(h), self.form.after_mlp)

    def _after(self, x: Tensor, paths: tuple[str, ...]) -> Tensor:
        for path in paths:
            x = self.layer.get_submodule(path)(x)
        return x


def conditioned(
    layers: Mapping[str, nn.Module],
    width: int,
    context: Callable[[Tensor], Mapping[str, Any]] = lambda rows: {},
    attention: Callable[[nn.Module], nn.Module] | None = None,
) -> dict[str, ConditionedLayer]:
    """The layers of a model with modulations, by name.

    Args:
        layers: its layers by name.
        width: D of their rows.
        context: keyword arguments of their attention for some rows [N, T, D].
        attention: what runs in place of an attention; its own by default.

    Raises:
        ValueError: the form of a layer is not known, or the first of its class is computed
            otherwise.
    """
    forms = {name: require_form(name, layer) for name, layer in layers.items()}
    first = {type(layer): name for name, layer in reversed(list(layers.items()))}
    for name in first.values():
        rows = probe(layers[name], width)
        check_form(layers[name], forms[name], rows, context(rows), name)
    instead = {
        name: None if attention is None else attention(layer.get_submodule(forms[name].attention))
        for name, layer in layers.items()
    }
    return {
        name: ConditionedLayer(layer, width, forms[name], instead[name])
        for name, layer in layers.items()
    }


def require_form(name: str, layer: nn.Module) -> LayerForm:
    """As `form_of`, but with an error that says which layer has none."""
    form = form_of(layer)
    if form is None:
        raise ValueError(
            f"{name} must be a transformer layer whose norms, attention and MLP are known by their "
            f"names, got a {type(layer).__name__} of {[n for n, _ in layer.named_children()]}; "
            "write a network with the members of dblocks.blocks.BlockModel instead"
        )
    return form


def probe(layer: nn.Module, width: int) -> Tensor:
    """Rows [1, 4, D] to try a layer with, like its parameters."""
    like = next(layer.parameters())
    rows = torch.linspace(0, 4 * width, 4 * width, device=like.device).sin()
    return rows.view(1, 4, width).to(like.dtype)


def check_form(
    layer: nn.Module, form: LayerForm, x: Tensor, context: Mapping[str, Any], name: str
) -> None:
    """Raises unless the form computes the layer's own function of the rows x [N, T, D].

    Raises:
        ValueError: it does not, so that the layer is of a kind that is not known.
    """
    if x.is_meta:
        return
    training = [m for m in layer.modules() if m.training]
    layer.eval()
    try:
        with torch.no_grad():
            own = layer(x, **context)
            own = own if isinstance(own, Tensor) else own[0]
            ours = ConditionedLayer(layer, x.shape[-1], form)(x, None, context)
    finally:
        for module in training:
            module.training = True
    # Both are rounded at each of a few operations, and a norm of the model may compute in float32
    # whatever the dtype; a wrong form differs by far more.
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    budget = 64 * eps * own.abs().max()
    if own.shape != ours.shape or not (own - ours).abs().max() <= budget:
        raise ValueError(
            f"{name} must be a pre-norm or a post-norm layer of attention and MLP, but "
            f"{type(layer).__name__} computes something else from its parts; "
            "write a network with the members of dblocks.blocks.BlockModel instead"
        )


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _chunks(chunks: Sequence[Tensor], *, clean: bool) -> tuple[Tensor, ...]:
    """Shifts, scales and factors of the branches, from shifts, scales and gates [N, (S,) D]."""
    if clean:
        # As many segments of zeros before, for the clean rows.
        chunks = [nnf.pad(chunk, (0, 0, chunk.shape[1], 0)) for chunk in chunks]
    shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    return shift1, scale1, 1 + gate1, shift2, scale2, 1 + gate2


def _modulate(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    kind = norm_kind(norm)
    if kind is None:
        h = norm(x)
        if shift is None or scale is None:
            return h
        return (h * (1 + over_rows(scale, h)) + over_rows(shift, h)).to(h.dtype)
    return F.adaln(
        x, shift, scale, norm=kind.norm, eps=kind.eps, weight=kind.weight, bias=kind.bias
    )


def _add_and_modulate(
    norm: nn.Module,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kind = norm_kind(norm)
    if kind is None:
        x = F.gated_residual(x, branch, gate)
        return x, _modulate(norm, x, shift, scale)
    return F.residual_adaln(
        x, branch, gate, shift, scale,
        norm=kind.norm, eps=kind.eps, weight=kind.weight, bias=kind.bias,
    )  # fmt: skip
