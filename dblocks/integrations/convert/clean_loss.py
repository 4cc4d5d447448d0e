"""The user's model's own loss, with gradients for the layers of one block only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.integrations.convert.network import Converted
from dblocks.ops._dispatch import check_first_order, distinct


def clean_loss(
    network: Converted, layers: Sequence[nn.Module], batch: Batch, z: Tensor | None
) -> Tensor:
    """The model's own loss, 0-d, whose gradients go to the parameters of `layers` only.

    The layers before them run without a graph; those after them, and the head, pass gradients on
    and get none.

    Its gradients are computed here, while the other parameters require none: layers that are
    checkpointed run again in this state. The graph is freed before that of denoising is built.

    Args:
        network: the converted model.
        layers: some of the model's own layers.
        batch: the inputs of the model.
        z: the masked tokens, if tokens are masked.
    """
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    with _only_gradients_of(network.model, trained):
        loss = network.plain_loss(batch, z)
        if not loss.requires_grad:
            return loss
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return _with_gradients(loss.detach(), trained, gradients)


@contextmanager
def _only_gradients_of(model: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """A context in which no other parameter of the model requires gradients."""
    kept = {id(p) for p in trained}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _with_gradients(
    value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """`value`, 0-d, as a function of the parameters with these gradients."""
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    return _Known.apply(*distinct(value, *(p for p, _ in pairs), *(g for _, g in pairs)))


class _Known(torch.autograd.Function):
    """(value, parameters, their gradients) -> value, with these gradients in the backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("the clean loss of ConvertedBlocks", "set clean_loss_weight=0")
        gradients = ctx.saved_tensors
        return (None, *(grad.to(g.dtype) * g for g in gradients), *(None for _ in gradients))
