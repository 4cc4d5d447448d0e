"""Vision transformers of timm: which can be converted, and as what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.conditioned import conditioned
from dblocks.integrations.convert.families import TimmFamily
from dblocks.integrations.convert.plain import check_classes


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
    if getattr(model, "head_dist", None) is not None:
        raise ValueError(
            "model must have one head, got head_dist beside head, as a distilled DeiT has; make it "
            "a plain one (timm.create_model without '_distilled')"
        )
    check_classes(model.num_classes)
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
