"""Images, latents and videos as targets, and their conditions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dblocks.blocks import Batch, L2Target
from dblocks.integrations.convert.network import check_some

NEGATIVE = "negative_"
"""Before the name of an argument, what stands for it where the condition is dropped."""
AXES = {"C": "channels", "F": "frames", "H": "height", "W": "width", "T": "patches"}


class LatentTarget(L2Target):
    """Images, latents or videos `batch["images"]` under the L2 loss, in a model's own layout.

    Args:
        layout: the layout of a sample, such as "CHW"; see `AXES`.
        channels: number of channels C.
        arguments: the other entries that a batch may hold.
    """

    def __init__(self, layout: str, channels: int, arguments: Collection[str]) -> None:
        super().__init__("images")
        self.layout = layout
        self.channels = channels
        self.arguments = arguments

    def check(self, batch: Batch) -> Batch:
        """See `Target.check`."""
        checked = super().check(batch)
        images = batch["images"]
        check_some(images)
        axis = 1 + self.layout.index("C")
        if images.ndim != 1 + len(self.layout) or images.shape[axis] != self.channels:
            shape = ", ".join(("N", *self.layout))
            names = ", ".join(f"{axis} {AXES[axis]}" for axis in self.layout)
            raise ValueError(
                f"images must have shape [{shape}] ({names}) with C = {self.channels}, got "
                f"{list(images.shape)}; pass the target as the model takes its hidden_states"
            )
        unknown = sorted(set(batch) - {"images", *self.arguments})
        if unknown:
            raise ValueError(
                f"a batch must hold nothing but images and {sorted(self.arguments)}, got "
                f"{unknown}, which training would not read; leave them out"
            )
        return checked


def check_samples(condition: Mapping[str, Any], count: int, whole: Collection[str]) -> None:
    """Raises unless each tensor that samples do not share has one entry per sample."""
    for name, value in condition.items():
        for key, tensor in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if name not in whole and isinstance(tensor, Tensor) and len(tensor) != count:
                raise ValueError(
                    f"{key} must have one entry for each of {count} samples, got shape "
                    f"{list(tensor.shape)}; expand it"
                )


def null_of(given: Mapping[str, Any], negative: Mapping[str, Any], drop: Tensor) -> dict[str, Any]:
    """The condition, with the negative one where `drop` [N] is true.

    Raises:
        ValueError: there is no negative condition, or its shape differs.
    """
    if not negative:
        raise ValueError(
            "guidance needs the condition without a prompt, got no entry whose name begins with "
            f"{NEGATIVE!r}; pass negative_encoder_hidden_states=, or set guidance_scale to 1"
        )
    mixed = dict(given)
    for name, value in negative.items():
        other = given.get(name)
        if not (isinstance(value, Tensor) and isinstance(other, Tensor)) or (
            value.shape != other.shape
        ):
            found = [
                list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (other, value)
            ]
            raise ValueError(
                f"{name} and {NEGATIVE}{name} must be tensors of one shape, got {found[0]} and "
                f"{found[1]}; pad both to the same length"
            )
        mixed[name] = torch.where(drop.view(-1, *[1] * (value.ndim - 1)), value, other)
    return mixed
