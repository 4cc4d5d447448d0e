"""Finds and replaces the tensors of a network by module and name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Place(NamedTuple):
    """Where a parameter or buffer is."""

    path: str
    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def saved(self) -> bool:
        return self.name not in self.module._non_persistent_buffers_set

    def of(self, network: nn.Module) -> Tensor:
        """The tensor at this place in the whole network."""
        return getattr(network.get_submodule(self.path) if self.path else network, self.name)

    def put(self, tensor: Tensor) -> None:
        """Puts another tensor there, with the `requires_grad` of the previous one."""
        own = self.module._parameters
        trains = self.tensor.requires_grad
        if self.name in own and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=trains)
        held: Any = own if self.name in own else self.module._buffers
        held[self.name] = tensor.requires_grad_(trains)


def fitted(name: str, given: Tensor, like: Tensor) -> Tensor:
    """The values of a file's tensor in the dtype of `like`.

    Raises:
        ValueError: the stored values are quantised, with a separate scale; the shape differs; or a
            finite number is not finite in that dtype.
    """
    if given.dtype != like.dtype and not (_plain(given.dtype) and _plain(like.dtype)):
        accepted = "a floating dtype of 16 bits or more" if _plain(like.dtype) else like.dtype
        raise ValueError(
            f"{name} must be stored in {accepted}, got {given.dtype}, as quantised weights are; "
            "dequantise them: load the model with from_pretrained in a floating dtype, and write "
            "it with save_pretrained"
        )
    if given.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(given.shape)}")
    fresh = torch.empty_like(like, device="cpu", requires_grad=False).copy_(given)
    if given.dtype != like.dtype and torch.finfo(given.dtype).max > torch.finfo(like.dtype).max:
        lost = fresh.isfinite().logical_not_().logical_and_(given.isfinite())
        if lost.any():
            raise ValueError(
                f"{name} must fit into {like.dtype}, got {given[lost][0].item():.3g}, which does "
                f"not; make the model in {given.dtype}"
            )
    return fresh


def _plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def check_complete(block: nn.Module, whole: str) -> None:
    """Raises RuntimeError if a tensor of a block has no memory; `whole` says what to do."""
    for path, module in block.named_modules():
        bare = [name for name, tensor in reached_tensors(module) if tensor.is_meta]
        if bare:
            raise RuntimeError(
                f"tensors of a network must be parameters or buffers, got {path}.{bare[0]} of "
                f"{type(module).__name__}; use register_buffer, or: {whole}"
            )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, without those of its children."""
    held = (*module._parameters.items(), *module._buffers.items())
    yield from ((name, tensor) for name, tensor in held if tensor is not None)


def reached_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `own_tensors`, with tensors in other attributes, also in lists or dictionaries."""
    yield from own_tensors(module)
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from ((name, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
