"""Families of encoders of transformers other than ViT, BERT and RoBERTa."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks import Batch
from dblocks.integrations.convert.families import (
    BertClassFamily,
    BertMaskedFamily,
    ViTFamily,
    backbone,
)
from dblocks.integrations.convert.layers import ByLayerType
from dblocks.integrations.convert.text_entries import ids_of

PLACED = ("attention_mask", "position_ids")  # the entries of models without token types

# Images


class DINOv2Family(ViTFamily):
    """DINOv2: its head takes the class token and the mean of the patches after the registers."""

    def pool(self, model: Any, x: Tensor) -> Tensor:
        x, first = backbone(model).layernorm(x), 1 + getattr(model.config, "num_register_tokens", 0)
        return torch.cat([x[:, 0], x[:, first:].mean(dim=1)], dim=1)


class CLIPFamily(ViTFamily):
    """CLIP's vision model: its head takes the mean of the patches."""

    class_row = False

    def enter(self, model: Any, batch: Batch) -> Tensor:
        vision = model.vision_model
        return vision.pre_layrnorm(vision.embeddings(batch["images"]))

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return {"attention_mask": None}

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return x[:, 1:].mean(dim=1)


class SigLIPFamily(CLIPFamily):
    """SigLIP's vision model, which has no class token."""

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return model.vision_model.embeddings(batch["images"])

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.vision_model.post_layernorm(x).mean(dim=1)


# Tokens


def electra_rows(model: Any, batch: Batch) -> Tensor:
    """Rows as they enter ELECTRA's layers, which may be wider than the embeddings."""
    electra = backbone(model)
    rows = electra.embeddings(input_ids=batch["tokens"], **ids_of(batch))
    return electra.embeddings_project(rows) if hasattr(electra, "embeddings_project") else rows


class ElectraClassFamily(BertClassFamily):
    """ELECTRA: its head pools the rows itself, as in RoBERTa."""

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return electra_rows(model, batch)

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return x[:, 0]

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.classifier(pooled[:, None])


class ElectraMaskedFamily(BertMaskedFamily):
    """ELECTRA's generator."""

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return electra_rows(model, batch)

    def head(self, model: Any, x: Tensor) -> Tensor:
        return model.generator_lm_head(model.generator_predictions(x))


class DistilBertClassFamily(BertClassFamily):
    """DistilBERT."""

    reads = PLACED

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.dropout(nnf.relu(model.pre_classifier(x[:, 0])))


class DistilBertMaskedFamily(BertMaskedFamily):
    """DistilBERT."""

    reads = PLACED

    def head(self, model: Any, x: Tensor) -> Tensor:
        x = model.activation(model.vocab_transform(x))
        return model.vocab_projector(model.vocab_layer_norm(x))


def modern_context(model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
    """Masks and rotary positions that ModernBERT computes once per type of layer."""
    from transformers.masking_utils import (
        create_bidirectional_mask,
        create_bidirectional_sliding_window_mask,
    )

    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    given = {"config": model.config, "inputs_embeds": rows, "attention_mask": mask}
    if positions is None:
        positions = torch.arange(rows.shape[1], device=rows.device)[None]
    rotary = backbone(model).rotary_emb
    kinds = set(model.config.layer_types)
    return {
        "attention_mask": ByLayerType(
            full_attention=create_bidirectional_mask(**given),
            sliding_attention=create_bidirectional_sliding_window_mask(**given),
        ),
        "position_embeddings": ByLayerType({kind: rotary(rows, positions, kind) for kind in kinds}),
    }


class ModernBertClassFamily(BertClassFamily):
    """ModernBERT: rotary positions, windows in most layers."""

    reads = PLACED

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return backbone(model).embeddings(input_ids=batch["tokens"])

    def unsupported(self, model: Any) -> str | None:
        pooling = model.config.classifier_pooling
        return None if pooling == "cls" else f"classifier_pooling={pooling!r} (a mean of all rows)"

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return modern_context(model, rows, batch)

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.drop(model.head(backbone(model).final_norm(x)[:, 0]))


class ModernBertMaskedFamily(BertMaskedFamily):
    """ModernBERT: rotary positions, windows in most layers."""

    reads = PLACED

    def enter(self, model: Any, batch: Batch) -> Tensor:
        return backbone(model).embeddings(input_ids=batch["tokens"])

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return modern_context(model, rows, batch)

    def head(self, model: Any, x: Tensor) -> Tensor:
        return model.decoder(model.head(backbone(model).final_norm(x)))
