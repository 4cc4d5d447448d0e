"""Where the parts of a transformer layer are, by the names that libraries give them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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


# Tried in this order; `check_form` runs a layer to see that its form is right.
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


def form_of(layer: nn.Module) -> LayerForm | None:
    """The first of `FORMS` whose submodules the layer has."""
    for form in FORMS:
        if all(_has(layer, path) for path in form.paths()):
            return form
    return None


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


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
