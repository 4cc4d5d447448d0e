"""Models of transformers: which can be converted, and where their parts are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.blocks.targets.heads import IGNORED, at_least_float32
from dblocks.integrations.convert.causal_lm import ConvertedCausalLM, Sizes
from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.layers import conditioned
from dblocks.integrations.convert.masked_lm import ConvertedMaskedLM
from dblocks.integrations.convert.row_attention import CAUSAL, DOUBLED, with_attention


class RotaryFamily:
    """Llama and those like it: rotary positions, which the backbone makes for all layers."""

    final_norm = "norm"

    def embedding(self, model: Any) -> nn.Embedding:
        """See `CausalFamily`, as for the others."""
        return model.get_input_embeddings()

    def head(self, model: Any) -> nn.Linear:
        return model.get_output_embeddings()

    def context_length(self, model: Any) -> int:
        return model.config.max_position_embeddings

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        return rows

    def context(self, model: Any, rows: Tensor, positions: Tensor) -> dict[str, Any]:
        rotary = backbone(model).rotary_emb(rows, position_ids=positions[None])
        return {"position_embeddings": rotary, "attention_mask": None}

    def leave(self, model: Any, x: Tensor) -> Tensor:
        return getattr(backbone(model), self.final_norm)(x)

    def plain_loss(self, model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return nnf.cross_entropy(
            at_least_float32(logits).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )


class GPT2Family(RotaryFamily):
    """GPT-2: learned positions, which are added to the rows."""

    final_norm = "ln_f"

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        gpt2 = backbone(model)
        return gpt2.drop(rows + gpt2.wpe(positions))

    def context(self, model: Any, rows: Tensor, positions: Tensor) -> dict[str, Any]:
        return {"attention_mask": None}


class ViTFamily:
    """ViT: the first row is the class token's."""

    input = "images"
    class_row = True

    def enter(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`, as for the others."""
        return backbone(model).embeddings(batch["images"])

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return {}

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return backbone(model).layernorm(x)[:, 0]

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.classifier(pooled)

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(pixel_values=batch["images"]).logits


class BertClassFamily(ViTFamily):
    """BERT, whose first token stands for the class; a batch may hold "attention_mask" [N, T]."""

    input = "tokens"

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return backbone(model).embeddings(input_ids=batch["tokens"])

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
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

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.dropout(backbone(model).pooler(x))

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch["tokens"], attention_mask=batch.get("attention_mask")).logits


class RobertaClassFamily(BertClassFamily):
    """RoBERTa, whose head pools the rows itself."""

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return x[:, 0]

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.classifier(pooled[:, None])


class BertMaskedFamily:
    """BERT with the head of its pretraining."""

    head_name = "cls"
    special_positions = 0

    def sizes(self, model: Any) -> Sizes:
        """See `MaskedFamily`, as for the others."""
        config = model.config
        return Sizes(config.vocab_size, config.max_position_embeddings - self.special_positions)

    def enter(self, model: Any, tokens: Tensor) -> Tensor:
        return backbone(model).embeddings(input_ids=tokens)

    def head(self, model: Any, x: Tensor) -> Tensor:
        return getattr(model, self.head_name)(x)

    def plain_logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits


class RobertaMaskedFamily(BertMaskedFamily):
    """RoBERTa, whose positions begin after that of the padding."""

    head_name = "lm_head"
    special_positions = 2


CAUSAL_FAMILIES = {
    "llama": RotaryFamily(),
    "mistral": RotaryFamily(),
    "qwen2": RotaryFamily(),
    "qwen3": RotaryFamily(),
    "gpt2": GPT2Family(),
}
CLASS_FAMILIES = {
    "vit": ViTFamily(),
    "bert": BertClassFamily(),
    "roberta": RobertaClassFamily(),
}
MASKED_FAMILIES = {"bert": BertMaskedFamily(), "roberta": RobertaMaskedFamily()}


def causal_lm(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedCausalLM:
    """A causal language model of transformers, with the attention of its rows in its layers.

    Args:
        model: such as a `LlamaForCausalLM`.
        layers: its layers by name.
        **options: of `ConvertedCausalLM`.

    Raises:
        ValueError: it has no head, or is of a family that is not known here.
    """
    family = _family(model, CAUSAL_FAMILIES, "'tokens' with a NoiseSchedule")
    if not isinstance(family.head(model), nn.Linear):
        raise _no_head(model, "AutoModelForCausalLM")

    def context(rows: Tensor) -> dict[str, Any]:
        return family.context(model, rows, torch.arange(rows.shape[1], device=rows.device))

    width = model.config.hidden_size
    name = CAUSAL if options["rows_kind"] == "single" else DOUBLED
    parts = conditioned(layers, width, context, partial(with_attention, name=name))
    return ConvertedCausalLM(model, parts, family, **options)


def classifier(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedClassifier:
    """A classifier of transformers.

    Args:
        model: such as a `ViTForImageClassification`.
        layers: its layers by name.
        **options: of `ConvertedClassifier`.

    Raises:
        ValueError: it has no head, or is of a family that is not known here.
    """
    family = _family(model, CLASS_FAMILIES, "'classes'")
    if not isinstance(getattr(model, "classifier", None), nn.Module) or isinstance(
        model.classifier, nn.Identity
    ):
        raise _no_head(model, "AutoModelForImageClassification or ...ForSequenceClassification")
    width = model.config.hidden_size
    return ConvertedClassifier(
        model,
        conditioned(layers, width),
        family,
        num_classes=model.config.num_labels,
        width=width,
        **options,
    )


def masked_lm(
    model: Any, layers: Mapping[str, nn.Module], *, mask_token_id: int | None
) -> ConvertedMaskedLM:
    """A masked language model of transformers.

    Args:
        model: such as a `BertForMaskedLM`.
        layers: its layers by name.
        mask_token_id: number of the mask, as the tokenizer has it.

    Raises:
        ValueError: it has no head, is of a family that is not known here, or the mask is none of
            its tokens.
    """
    family = _family(model, MASKED_FAMILIES, "'tokens' with a MaskSchedule")
    if model.get_output_embeddings() is None:
        raise _no_head(model, "AutoModelForMaskedLM")
    size = model.config.vocab_size
    if mask_token_id is None or not 0 <= mask_token_id < size:
        raise ValueError(
            f"mask_token_id must be a token in 0..{size - 1}, got {mask_token_id}; "
            "pass tokenizer.mask_token_id"
        )
    width = model.config.hidden_size
    parts = conditioned(layers, width)
    return ConvertedMaskedLM(model, parts, family, width=width, mask_token_id=mask_token_id)


def backbone(model: Any) -> Any:
    """The model without its head, also inside peft's wrapper."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(own, own.base_model_prefix, own)


Family = TypeVar("Family")


def _family(model: Any, families: Mapping[str, Family], task: str) -> Family:
    kind = model.config.model_type
    if kind not in families:
        raise ValueError(
            f"task {task} needs one of {sorted(families)}, got {kind!r} "
            f"({type(model).__name__}); write a network with the members of "
            "dblocks.blocks.BlockModel instead"
        )
    return families[kind]


def _no_head(model: Any, loader: str) -> ValueError:
    return ValueError(
        f"model must have a head for the task, got {type(model).__name__} without one; "
        f"load it as {loader}"
    )
