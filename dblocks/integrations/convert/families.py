"""Families of models: how rows enter and leave the layers, and the head.

A family gets the model in every call and does not store it, so it also serves copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.blocks.targets.classes import IGNORED, at_least_float32
from dblocks.integrations.convert.attention_view import with_attention
from dblocks.integrations.convert.cached import rotation_limit
from dblocks.integrations.convert.layers import ByLayerType
from dblocks.integrations.convert.network import Sizes, example_tokens
from dblocks.integrations.convert.text_entries import TEXT, entries_of, ids_of

# Language models of transformers that predict the next token


# Options of a config that no family supports, and why.
UNSUPPORTED = {
    "use_bidirectional_attention": "rows that see later ones",
    "add_cross_attention": "another text",
    "layerdrop": "layers left out at random, where a block of them is trained",
}
# The same of encoders.
ENCODERS_UNSUPPORTED = {
    "is_decoder": "rows that do not see later ones",
    "add_cross_attention": "another text",
}
ADDED_LOSSES = {"output_router_logits": "a loss of the experts' loads is added"}
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class RotaryFamily:
    """Llama and similar models: rotary positions, which the backbone computes for all layers."""

    final_norm: str = "norm"
    """Name of the backbone's last norm."""
    embedding_factor: str = ""
    """Name of the config entry that multiplies embeddings."""
    logit_factor: str = ""
    """Name of the config entry that multiplies logits."""
    logit_divisor: str = ""
    """Name of the config entry that divides logits."""
    dropout: str = ""
    """Name of the backbone's dropout of its input rows, a module or a rate."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Options of the config that are not supported, and why."""

    def unsupported(self, model: Any) -> str | None:
        """The unsupported option of the model's config, if there is one."""
        config = model.config
        reason = first_option(config, UNSUPPORTED | dict(self.refused))
        if reason is not None:
            return reason
        others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
        return f"layers of the types {sorted(others)}" if others else None

    def reads(self, model: Any) -> tuple[str, ...]:
        """Entries of a batch that are read in addition to tokens."""
        return ("position_ids",)

    def attention(self, attention: nn.Module, name: str) -> nn.Module:
        """Replacement of an attention, which calls the named function."""
        return with_attention(attention, name)

    def probed(self, attention: nn.Module) -> nn.Module | None:
        """Replacement of an attention in the trial run of a layer; None for its own."""
        return None

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model's own layers for rows [N, T, D] from position 0 on."""
        return context_from_start(self, model, rows)

    def probe_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of the converted layers' attention for the same rows."""
        return context_from_start(self, model, rows)

    def embedding(self, model: Any) -> nn.Embedding:
        """See `CausalFamily`, as for the others."""
        return model.get_input_embeddings()

    def head(self, model: Any) -> nn.Linear:
        return model.get_output_embeddings()

    def softcap(self, model: Any) -> float | None:
        return getattr(model.config, "final_logit_softcapping", None)

    def context_length(self, model: Any) -> int:
        return model.config.max_position_embeddings

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        if self.embedding_factor:
            rows = rows * getattr(model.config, self.embedding_factor)
        dropout = getattr(backbone(model), self.dropout) if self.dropout else None
        if isinstance(dropout, float | int):
            return nnf.dropout(rows, dropout, backbone(model).training)
        return rows if dropout is None else dropout(rows)

    def context(
        self, model: Any, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        rotary, ids = backbone(model).rotary_emb, positions_of_samples(positions)
        kinds = getattr(rotary, "layer_types", None)
        turned: Any = (
            rotary(rows, position_ids=ids)
            if kinds is None
            else ByLayerType({kind: rotary(rows, ids, kind) for kind in kinds})
        )
        return {"position_embeddings": turned, "attention_mask": None}

    def cache_limit(self, model: Any) -> int | None:
        return rotation_limit(getattr(backbone(model), "rotary_emb", None))

    def leave(self, model: Any, x: Tensor) -> Tensor:
        x, config = getattr(backbone(model), self.final_norm)(x), model.config
        if self.logit_factor:
            x = x * getattr(config, self.logit_factor)
        return x / getattr(config, self.logit_divisor) if self.logit_divisor else x

    def plain_logits(
        self, model: Any, tokens: Tensor, position_ids: Tensor | None = None, **more: Any
    ) -> Tensor:
        if position_ids is not None:
            # Without a mask, positions that are not consecutive would mean packed documents.
            more |= {"position_ids": position_ids, "attention_mask": torch.ones_like(tokens)}
        return model(input_ids=tokens, use_cache=False, **more).logits

    def plain_loss(
        self,
        model: Any,
        tokens: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        if (reason := first_option(model.config, ADDED_LOSSES)) is not None:
            raise ValueError(
                f"the model's own loss must be its cross-entropy alone, got {reason}; set "
                "clean_loss_weight=0, or change the config"
            )
        # Padding is after the texts, where no row of a text sees it.
        logits = self.plain_logits(model, tokens, position_ids, **more)[:, :-1]
        logits, labels = at_least_float32(logits).flatten(0, 1), labels[:, 1:].flatten()
        total = nnf.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        # Of several processes, some may have nothing that is scored.
        return total / (labels != IGNORED).sum().clamp(min=1)


@dataclass(frozen=True)
class GemmaFamily(RotaryFamily):
    """Gemma: rows times sqrt(D), by the embedding in transformers 5 and outside of it in 4."""

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        if type(self.embedding(model)) is nn.Embedding:
            rows = rows * torch.tensor(rows.shape[-1] ** 0.5, dtype=rows.dtype)
        return super().enter(model, rows, positions)


@dataclass(frozen=True)
class GPT2Family(RotaryFamily):
    """GPT-2: learned positions, which are added to the rows."""

    final_norm: str = "ln_f"

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        gpt2 = backbone(model)
        return gpt2.drop(rows + gpt2.wpe(positions))

    def context(
        self, model: Any, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        return {"attention_mask": None}


@dataclass(frozen=True)
class OPTFamily(RotaryFamily):
    """OPT: learned positions, in a decoder inside the backbone."""

    def unsupported(self, model: Any) -> str | None:
        decoder = backbone(model).decoder
        if decoder.project_in is not None or decoder.project_out is not None:
            return "embeddings of another width than the layers' (word_embed_proj_dim)"
        return super().unsupported(model)

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ids = positions_of_samples(positions)
        return rows + backbone(model).decoder.embed_positions(None, position_ids=ids)

    def context(
        self, model: Any, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        return {"attention_mask": None}

    def leave(self, model: Any, x: Tensor) -> Tensor:
        norm = backbone(model).decoder.final_layer_norm
        return x if norm is None else norm(x)


def positions_of_samples(positions: Tensor) -> Tensor:
    """Positions [T] or [N, T], as [1 or N, T]."""
    return positions if positions.ndim == 2 else positions[None]


def context_from_start(family: RotaryFamily, model: Any, rows: Tensor) -> dict[str, Any]:
    """`family.context` of rows [N, T, D] at the positions 0 to T - 1.

    Nothing on the meta device with transformers 4, which cannot make rotations there.
    """
    import transformers

    if rows.is_meta and transformers.__version__.startswith("4."):
        return {}
    return family.context(model, rows, torch.arange(rows.shape[1], device=rows.device))


# Encoders of text


def bert_context(model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
    """The attention mask for padding, as the model itself makes it."""
    mask = batch.get("attention_mask")
    if mask is None:
        return {}
    try:
        from transformers.masking_utils import create_bidirectional_mask
    except ImportError:  # transformers 4
        mask = backbone(model).get_extended_attention_mask(mask, mask.shape, dtype=rows.dtype)
        return {"attention_mask": mask}
    return {
        "attention_mask": create_bidirectional_mask(
            config=model.config, inputs_embeds=rows, attention_mask=mask
        )
    }


# Classifiers of transformers


class ViTFamily:
    """ViT: the first row is the class token."""

    input = "images"
    reads: tuple[str, ...] = ()
    class_row = True

    def unsupported(self, model: Any) -> str | None:
        """As for `RotaryFamily`."""
        return first_option(model.config, ENCODERS_UNSUPPORTED)

    def width(self, model: Any) -> int:
        """D of the rows."""
        config = model.config
        return getattr(config, "vision_config", config).hidden_size

    def enter(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`, as for the others."""
        return backbone(model).embeddings(batch["images"])

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return {}

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model's own layers for some rows [N, P, D]."""
        return self.context(model, rows, {})

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return backbone(model).layernorm(x)[:, 0]

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.classifier(pooled)

    def example(self, model: Any) -> Batch:
        config = getattr(model.config, "vision_config", model.config)
        size = config.image_size
        sides = size if isinstance(size, Sequence) else (size, size)
        return {"images": waves(model, (1, config.num_channels, *sides))}

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(pixel_values=batch["images"]).logits


class BertClassFamily(ViTFamily):
    """BERT, whose first token stands for the class."""

    input = "tokens"
    reads: tuple[str, ...] = TEXT

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return backbone(model).embeddings(input_ids=batch["tokens"], **ids_of(batch))

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return bert_context(model, rows, batch)

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.dropout(backbone(model).pooler(x))

    def example(self, model: Any) -> Batch:
        return {"tokens": _example_text(model)}

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch["tokens"], **entries_of(batch)).logits


class RobertaClassFamily(BertClassFamily):
    """RoBERTa: its head pools the rows itself."""

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return x[:, 0]

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.classifier(pooled[:, None])


# Masked language models of transformers


class BertMaskedFamily:
    """BERT with the head of its pretraining."""

    head_name = "cls"
    reads: tuple[str, ...] = TEXT
    special_positions = 0

    def unsupported(self, model: Any) -> str | None:
        """As for `RotaryFamily`."""
        return first_option(model.config, ENCODERS_UNSUPPORTED)

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """As for `ViTFamily`."""
        return self.context(model, rows, {})

    def sizes(self, model: Any) -> Sizes:
        """See `MaskedFamily`, as for the others."""
        config = model.config
        return Sizes(config.vocab_size, config.max_position_embeddings - self.special_positions)

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return backbone(model).embeddings(input_ids=batch["tokens"], **ids_of(batch))

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return bert_context(model, rows, batch)

    def head(self, model: Any, x: Tensor) -> Tensor:
        return getattr(model, self.head_name)(x)

    def example(self, model: Any) -> Tensor:
        return _example_text(model)

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch["tokens"], **entries_of(batch)).logits


class RobertaMaskedFamily(BertMaskedFamily):
    """RoBERTa: positions begin after the padding index."""

    head_name = "lm_head"
    special_positions = 2


def first_option(config: Any, options: Mapping[str, str]) -> str | None:
    """The first of these options that a config has set, with its reason."""
    for name, why in options.items():
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)!r} ({why})"
    return None


def waves(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """A fixed image in the dtype and on the device of the model's parameters."""
    like = next(model.parameters())
    numbers = torch.arange(math.prod(shape), device=like.device, dtype=torch.float32)
    return numbers.sin().view(*shape).to(like.dtype)


def _example_text(model: Any) -> Tensor:
    device = next(model.parameters()).device
    config = model.config
    positions = config.max_position_embeddings - 2
    return example_tokens(config.vocab_size, (config.pad_token_id,), device, min(6, positions))


def backbone(model: Any) -> Any:
    """The model without its head and without peft's wrapper."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(own, own.base_model_prefix, own)
