"""The parts of a transformer layer, by the names that libraries give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerForm:
    """The parts of a layer: paths of its submodules."""

    norm1: str
    """The norm before the attention; empty if there is none."""
    attention: str
    """The attention."""
    norm2: str
    """The norm before the MLP; empty if there is none or a parallel MLP shares the other."""
    mlp: str
    """The MLP."""
    after_attention: tuple[str, ...] = ()
    """Modules between the attention and the residual sum."""
    after_mlp: tuple[str, ...] = ()
    """Modules between the MLP and the residual sum."""
    post_norm: bool = False
    """Whether norms follow the residual sums."""
    parallel: bool = False
    """Whether attention and MLP take the same rows, and are added together."""
    multiplier: str = ""
    """The layer's attribute that scales a branch; its value may be None."""
    mlp_multiplier: str = ""
    """The attribute that scales the MLP, if it is another."""
    dropout: str = ""
    """The layer's attribute with the dropout rate of a branch, if dropout is not a module."""
    cross: str = ""
    """The cross-attention between both branches, with its own norm."""
    adds_rows: bool = False
    """Whether the MLP takes the residual rows and adds them itself."""
    when: Mapping[str, Any] = field(default_factory=dict)
    """Required values of the layer's attributes, if layers with these parts run differently."""

    def paths(self) -> tuple[str, ...]:
        """All paths."""
        named = (self.norm1, self.attention, self.cross, self.norm2, self.mlp)
        return (*filter(None, named), *self.after_attention, *self.after_mlp)

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has these parts and attributes."""
        names = (self.multiplier, self.mlp_multiplier, self.dropout)
        attributes = [*filter(None, names), *self.when]
        try:
            for path in self.paths():
                layer.get_submodule(path)
            values = {name: attrgetter(name)(layer) for name in attributes}
        except AttributeError:
            return False
        return all(values[name] == value for name, value in self.when.items())


ATTENTION = ("input_layernorm", "self_attn")
SECOND = "post_attention_layernorm"

# Tried in this order: a form with more parts comes before one with some of them. `check_form` runs
# a layer to verify its form.
FORMS = (
    LayerForm(  # Gemma 2 and 3: norms before and after
        *ATTENTION, "pre_feedforward_layernorm", "mlp", (SECOND,), ("post_feedforward_layernorm",)
    ),
    LayerForm(*ATTENTION, "pre_feedforward_layernorm", "mlp"),  # VaultGemma
    LayerForm(  # GLM 4: the same under other names
        *ATTENTION, SECOND, "mlp", ("post_self_attn_layernorm",), ("post_mlp_layernorm",)
    ),
    LayerForm(*ATTENTION, SECOND, "mlp", multiplier="residual_multiplier"),  # Granite
    LayerForm(*ATTENTION, SECOND, "block_sparse_moe", multiplier="residual_multiplier"),
    LayerForm(*ATTENTION, SECOND, "mlp", multiplier="residual_scale"),  # MiniCPM
    LayerForm(  # Phi 3
        *ATTENTION, SECOND, "mlp", ("resid_attn_dropout",), ("resid_mlp_dropout",)
    ),
    LayerForm(  # StableLM
        *ATTENTION, "", "mlp", (), ("dropout",), parallel=True, when={"use_parallel_residual": True}
    ),
    LayerForm(*ATTENTION, SECOND, "mlp", (), ("dropout",)),
    LayerForm(*ATTENTION, SECOND, "mlp"),  # Llama
    LayerForm(*ATTENTION, SECOND, "block_sparse_moe"),  # Mixtral of transformers 4
    LayerForm(*ATTENTION, "", "mlp", ("resid_dropout",), ("resid_dropout",), parallel=True),  # Phi
    LayerForm(*ATTENTION, "", "mlp", parallel=True),  # Cohere
    LayerForm(  # OLMo 2: norms after only
        "", "self_attn", "", "mlp", (SECOND,), ("post_feedforward_layernorm",)
    ),
    LayerForm("attention_layernorm", "self_attn", "feedforward_layernorm", "mlp"),  # Apertus
    *(
        LayerForm(  # GPT-NeoX
            "input_layernorm",
            "attention",
            SECOND,
            "mlp",
            ("post_attention_dropout",),
            ("post_mlp_dropout",),
            parallel=parallel,
            when={"use_parallel_residual": parallel},
        )
        for parallel in (True, False)
    ),
    *(
        LayerForm(  # OPT
            "self_attn_layer_norm",
            "self_attn",
            "final_layer_norm",
            "fc1",
            after_mlp=("activation_fn", "fc2"),
            post_norm=not before,
            dropout="dropout",
            when={"do_layer_norm_before": before},
        )
        for before in (True, False)
    ),
    LayerForm(  # Bloom
        "input_layernorm",
        "self_attention",
        SECOND,
        "mlp",
        adds_rows=True,
        when={"apply_residual_connection_post_layernorm": False},
    ),
    LayerForm("norm_1", "attn", "norm_2", "ffn", ("resid_attn_dropout",), adds_rows=True),  # MPT
    LayerForm("ln_attn", "self_attention", "ln_mlp", "mlp", parallel=True),  # Falcon 40B
    LayerForm(
        "input_layernorm",
        "self_attention",
        "",
        "mlp",
        parallel=True,
        when={"config.parallel_attn": True},
    ),
    LayerForm(
        "input_layernorm",
        "self_attention",
        SECOND,
        "mlp",
        when={"config.parallel_attn": False},
    ),
    LayerForm(  # T5's decoder
        "layer.0.layer_norm",
        "layer.0.SelfAttention",
        "layer.2.layer_norm",
        "layer.2.DenseReluDense",
        ("layer.0.dropout",),
        ("layer.2.dropout",),
        cross="layer.1",
    ),
    LayerForm("ln_1", "attn", "ln_2", "mlp"),  # GPT-2
    LayerForm("ln_1", "attn", "", "mlp", parallel=True),  # GPT-J
    LayerForm(  # BEiT
        "layernorm_before",
        "attention",
        "layernorm_after",
        "mlp",
        ("dropout", "drop_path"),
        ("dropout", "drop_path"),
        multiplier="lambda_1",
        mlp_multiplier="lambda_2",
    ),
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
    LayerForm(  # Eva of timm, such as DINOv3
        "norm1",
        "attn",
        "norm2",
        "mlp",
        ("drop_path1",),
        ("drop_path2",),
        multiplier="gamma_1",
        mlp_multiplier="gamma_2",
    ),
    LayerForm(  # DINOv2
        "norm1",
        "attention",
        "norm2",
        "mlp",
        ("layer_scale1", "drop_path"),
        ("layer_scale2", "drop_path"),
    ),
    LayerForm("layer_norm1", "self_attn", "layer_norm2", "mlp"),  # CLIP
    LayerForm("attn_norm", "attn", "mlp_norm", "mlp"),  # ModernBERT
    LayerForm(  # DistilBERT
        "sa_layer_norm", "attention", "output_layer_norm", "ffn", post_norm=True
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
    """The first of `FORMS` that fits the layer."""
    for form in FORMS:
        if form.fits(layer):
            return form
    return None


def require_form(name: str, layer: nn.Module) -> LayerForm:
    """As `form_of`, but raises an error that names a layer without a form."""
    form = form_of(layer)
    if form is None:
        raise ValueError(
            f"{name} must be a transformer layer whose norms, attention and MLP are known by their "
            f"names, got a {type(layer).__name__} of {[n for n, _ in layer.named_children()]}; "
            "write a network with the members of dblocks.blocks.BlockModel instead"
        )
    return form
