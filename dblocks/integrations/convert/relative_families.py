"""Encoders of transformers with relative positions in the attention: BEiT and DeBERTa."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dblocks.blocks import Batch
from dblocks.integrations.convert.families import (
    BertClassFamily,
    BertMaskedFamily,
    ViTFamily,
    backbone,
)
from dblocks.integrations.convert.layers import OfLayer
from dblocks.integrations.convert.text_entries import ids_of

# Images


class BeitFamily(ViTFamily):
    """BEiT: a bias of the scores per layer, or one that all layers share."""

    class_row = False  # its head takes the mean of the patches

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """See `ClassFamily`."""
        beit, grid = backbone(model), _grid(model, rows, batch)
        shared = beit.shared_position_bias
        bias = None if shared is None else shared(grid)
        return {"attention_mask": OfLayer(partial(_bias_of, grid=grid, shared=bias))}

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `ViTFamily`; a layer adds its own bias."""
        shared, (height, width) = backbone(model).shared_position_bias, _grid(model, rows, {})
        patch = model.config.patch_size
        return {
            "attention_mask": None if shared is None else shared((height, width)),
            "resolution": (height * patch, width * patch),
        }

    def pool(self, model: Any, x: Tensor) -> Tensor:
        """See `ClassFamily`."""
        return backbone(model).pooler(backbone(model).layernorm(x))


def _grid(model: Any, rows: Tensor, batch: Batch) -> tuple[int, int]:
    """Rows and columns of patches; one row without images."""
    if "images" not in batch:
        return 1, rows.shape[1] - 1
    height, width = batch["images"].shape[2:]
    patch = model.config.patch_size
    return height // patch, width // patch


def _bias_of(layer: Any, *, grid: tuple[int, int], shared: Tensor | None) -> Tensor | None:
    own = layer.relative_position_bias
    if own is None:
        return shared
    return own(grid) if shared is None else own(grid) + shared


# Tokens


def deberta_rows(model: Any, batch: Batch) -> Tensor:
    """Rows as they enter DeBERTa's layers; padding is zero."""
    check_places(model, batch)
    mask = batch.get("attention_mask")
    return backbone(model).embeddings(input_ids=batch["tokens"], mask=mask, **ids_of(batch))


def check_places(model: Any, batch: Batch) -> None:
    """Raises for positions in a batch if the model adds none to its embeddings."""
    if batch.get("position_ids") is not None and not model.config.position_biased_input:
        raise ValueError(
            f"position_ids must be None for a {type(model).__name__} with "
            "position_biased_input=False, which counts positions by itself; leave them out"
        )


def deberta_context(model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
    """The mask of pairs and the relative positions that DeBERTa computes once for all layers."""
    encoder, mask = backbone(model).encoder, batch.get("attention_mask")
    mask = rows.new_ones(rows.shape[:2]) if mask is None else mask
    return {
        "attention_mask": encoder.get_attention_mask(mask),
        "relative_pos": encoder.get_rel_pos(rows),
        "rel_embeddings": encoder.get_rel_embedding(),
    }


def deberta_unsupported(model: Any) -> str | None:
    """See `RotaryFamily.unsupported`."""
    size = getattr(model.config, "conv_kernel_size", 0)
    return f"conv_kernel_size={size} (a convolution beside the first layer)" if size > 0 else None


class Deberta:
    """The base of DeBERTa's classifiers and masked language models."""

    def unsupported(self, model: Any) -> str | None:
        """See `ViTFamily`."""
        return deberta_unsupported(model)

    def enter(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`."""
        return deberta_rows(model, batch)

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """See `ClassFamily`."""
        return deberta_context(model, rows, batch)


class DebertaClassFamily(Deberta, BertClassFamily):
    """DeBERTa, of every version."""

    def pool(self, model: Any, x: Tensor) -> Tensor:
        """See `ClassFamily`."""
        return model.dropout(model.pooler(x))

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`."""
        check_places(model, batch)
        return super().plain_logits(model, batch)


class DebertaMaskedFamily(Deberta, BertMaskedFamily):
    """DeBERTa, of every version, with its new or its old head."""

    def head(self, model: Any, x: Tensor) -> Tensor:
        """See `MaskedFamily`."""
        if getattr(model, "legacy", True):
            return model.cls(x)
        return model.lm_predictions(x, backbone(model).embeddings.word_embeddings)

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        """See `MaskedFamily`."""
        check_places(model, batch)
        return super().plain_logits(model, batch)
