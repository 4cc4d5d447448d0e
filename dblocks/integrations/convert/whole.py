"""Compares the whole model with its converted form, and refuses models that compute more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor

from dblocks.integrations.convert.choices import largest_rounding
from dblocks.integrations.convert.network import Converted


def check_whole(network: Converted) -> bool:
    """Raises unless the model's own forward equals that of its parts without noise.

    All layers run as in one block, with modulations and noise left out; see `Converted.compare`.
    Nothing random is drawn, and the model is not changed.

    Args:
        network: the converted model.

    Returns:
        Whether the model ran; it does not on the meta device or with fake tensors.

    Raises:
        ValueError: the outputs differ: the conversion would lose a part of the model.
    """
    tensors = chain(network.model.parameters(), network.model.buffers())
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors) or detect_fake_mode():
        return False
    with _evaluated(network.model), torch.no_grad():
        own, ours = network.compare()
    name = type(network.model).__name__
    if own.shape != ours.shape:
        raise ValueError(
            f"the model must return logits (or an image) of shape {list(ours.shape)} on a small "
            f"batch, as its embedding, layers and head do, got {list(own.shape)} from {name}; "
            "its head has another target, or rows are added outside of its layers"
        )
    difference = _difference(own, ours)
    dtype = next(network.layers.parameters()).dtype
    if not difference <= largest_rounding(own.dtype, dtype, layers=len(network.names)):
        raise ValueError(
            f"{name} must compute what its embedding, layers and head compute, but on a small "
            f"batch its output differs from theirs by {difference:.2g} of its size: something "
            "outside of these layers, such as a layer that is not among layers=, an adapter, a "
            "hook or a forward of its own, would be left out (or activations are quantised, which "
            "enlarges rounding: check=False); name all layers, merge or remove it, or write a "
            "network with the members of dblocks.blocks.BlockModel instead"
        )
    return True


def _difference(own: Tensor, ours: Tensor) -> float:
    own, ours = own.double(), ours.double()
    size = own.norm().item()
    return (own - ours).norm().item() / size if size else ours.norm().item()


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
