"""Vision transformers of timm that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.conditioned import conditioned
from dblocks.integrations.convert.families import waves
from dblocks.integrations.convert.layers import OfLayer
from dblocks.integrations.convert.plain import check_classes


class TimmFamily:
    """timm's `VisionTransformer`."""

    input = "images"
    reads: tuple[str, ...] = ()

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

    def example(self, model: Any) -> Batch:
        stem = model.patch_embed
        size = stem.img_size or tuple(4 * side for side in stem.patch_size)
        return {"images": waves(model, (1, stem.proj.in_channels, *size))}

    def plain_logits(self, model: Any, batch: Batch) -> Tensor:
        return model(batch["images"])


class EvaFamily(TimmFamily):
    """timm's `Eva`, such as DINOv3: the attention rotates patches only."""

    def enter(self, model: Any, batch: Batch) -> Tensor:
        """See `ClassFamily`."""
        return model.norm_pre(model._pos_embed(model.patch_embed(batch["images"]))[0])

    def context(self, model: Any, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """See `ClassFamily`; rotations of all layers, or of each."""
        rope, stem = model.rope, model.patch_embed
        if rope is None:
            return {}
        if model.dynamic_img_size:
            turned = rope.get_embed(shape=stem.dynamic_feat_size(batch["images"].shape[-2:]))
        elif hasattr(rope, "feat_shape"):
            turned = rope.get_embed()
        else:
            turned = rope.get_embed(shape=stem.grid_size)
        if not getattr(model, "rope_mixed", False):
            return {"rope": turned}
        place = {id(layer): number for number, layer in enumerate(model.blocks)}
        return {"rope": OfLayer(lambda layer: turned[place[id(layer)]])}


def classifier(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedClassifier:
    """Converts a classifier of timm.

    Args:
        model: a `VisionTransformer` or an `Eva`, with its blocks as layers.
        layers: its layers by name.
        **options: further arguments of `ConvertedClassifier`.

    Raises:
        ValueError: the model is of another class, or has no head.
    """
    parts = ("_pos_embed", "patch_embed", "patch_drop", "norm_pre", "norm", "forward_head", "head")
    missing = [part for part in parts if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"task 'classes' needs a VisionTransformer or an Eva of timm, got "
            f"{type(model).__name__}, which has no {', '.join(missing)}; write a network with the "
            "members of dblocks.blocks.BlockModel instead"
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
    if not model.global_pool:
        raise ValueError(
            "model must pool its rows into one, got global_pool='', which returns logits of every "
            "row; create it with global_pool='token' or 'avg', or reset_classifier()"
        )
    rotary = hasattr(model, "rope")
    if rotary and model.rope is not None and model.patch_drop is not None:
        raise ValueError(
            f"patch_drop_rate must be 0 for a {type(model).__name__} with rotary positions, whose "
            "rotations would be those of other patches; create it without"
        )
    family = EvaFamily if rotary else TimmFamily
    width = model.embed_dim
    class_row = model.cls_token is not None and model.global_pool == "token"
    return ConvertedClassifier(
        model,
        conditioned(layers, width),
        family(class_row=class_row),
        num_classes=model.num_classes,
        width=width,
        **options,
    )
