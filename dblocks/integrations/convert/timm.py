"""Vision transformers of timm: where their parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.layers import conditioned


class TimmFamily:
    """timm's `VisionTransformer`."""

    input = "images"

    def __init__(self, *, class_row: bool) -> None:
        self.class_row = class_row

    def enter(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`, as for the others."""
        x = model._pos_embed(model.patch_embed(batch["images"]))
        return model.norm_pre(model.patch_drop(x))

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        return {}

    def pool(self, model: Any, x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x), pre_logits=True)

    def head(self, model: Any, pooled: Tensor) -> Tensor:
        return model.head(pooled)

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(batch["images"])


def classifier(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedClassifier:
    """A vision transformer of timm that classifies.

    Args:
        model: a `VisionTransformer`, with its blocks as layers.
        layers: its layers by name.
        **options: of `ConvertedClassifier`.

    Raises:
        ValueError: it is no such model, or has no head.
    """
    parts = ("_pos_embed", "patch_embed", "patch_drop", "norm_pre", "norm", "forward_head", "head")
    missing = [part for part in parts if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"task 'classes' needs a VisionTransformer of timm, got {type(model).__name__}, which "
            f"has no {', '.join(missing)}; write a network with the members of "
            "dblocks.blocks.BlockModel instead"
        )
    if not isinstance(model.head, nn.Linear):
        raise ValueError(
            "model must have a head that makes logits of classes, got a "
            f"{type(model.head).__name__}; create it with num_classes=, or reset_classifier()"
        )
    width = model.embed_dim
    class_row = model.cls_token is not None and model.global_pool == "token"
    return ConvertedClassifier(
        model,
        conditioned(layers, width),
        TimmFamily(class_row=class_row),
        num_classes=model.num_classes,
        width=width,
        **options,
    )
