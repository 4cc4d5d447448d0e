"""Tensors of a block in one buffer of bytes, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# cuBLASLt chooses a kernel by the alignment of its operands, up to 256 bytes: their offset must not
# change a result.
ALIGNMENT = 256


class Item(Protocol):
    """A tensor that moves with a block, accessed through its holder."""

    name: str

    @property
    def frozen(self) -> bool:
        """Whether training does not change it, so that it is not copied back."""
        ...

    def read(self) -> Tensor:
        """The current tensor."""
        ...

    def place(self, value: Tensor) -> None:
        """Replaces the tensor by `value`."""
        ...


class Held:
    """A parameter or a buffer of the network; the object stays, its data moves."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor

    @property
    def frozen(self) -> bool:
        return isinstance(self.tensor, nn.Parameter) and not self.tensor.requires_grad

    def read(self) -> Tensor:
        return self.tensor.detach()

    def place(self, value: Tensor) -> None:
        tensor = self.tensor
        grad = tensor.grad if tensor.is_leaf else None
        if grad is not None:
            tensor.grad = None
        if torch._has_compatible_shallow_copy_type(  # pyright: ignore[reportPrivateImportUsage]
            tensor, value
        ):
            tensor.data = value
        else:
            kind = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor
            torch.utils.swap_tensors(tensor, _as(kind, value, tensor.requires_grad))
        if grad is not None:
            tensor.grad = grad.to(value.device)
        # The backward pass of a graph that saved this tensor then raises an error.
        torch.autograd.graph.increment_version(tensor)


class State:
    """A tensor of an optimizer's state."""

    frozen = False

    def __init__(self, name: str, values: dict[Any, Any], key: Any) -> None:
        self.name, self.values, self.key = name, values, key

    def read(self) -> Tensor:
        return self.values[self.key]

    def place(self, value: Tensor) -> None:
        self.values[self.key] = value


class Place(NamedTuple):
    """The position of a tensor in a buffer."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor, in a buffer on any device."""
        empty = torch.empty(0, dtype=self.dtype, device=buffer.device)
        first = self.offset // self.dtype.itemsize
        return empty.set_(buffer.untyped_storage(), first, self.shape, self.stride)

    def holds(self, tensor: Tensor, buffer: Tensor) -> bool:
        """Whether `tensor` is at this position of `buffer`."""
        here = buffer.data_ptr() + self.offset
        return tensor.device == buffer.device and (tensor.data_ptr() == here or not tensor.numel())


class Layout:
    """The positions of tensors in a buffer; frozen ones, which are not copied back, come last.

    Args:
        items: the tensors.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = sorted(items, key=lambda item: item.frozen)
        self.places: list[Place] = []
        self.nbytes = self.back = 0
        for item in self.items:
            tensor = item.read()
            # Keep the strides of dense tensors.
            stride = torch.empty_like(tensor, device="meta").stride()
            self.places.append(
                Place(item.name, self.nbytes, tensor.dtype, tuple(tensor.shape), stride)
            )
            self.nbytes += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
            if not item.frozen:
                self.back = self.nbytes

    def adopt(self, items: Sequence[Item]) -> bool:
        """Replaces the tensors by `items`, if they fit the positions."""
        if len(items) != len(self.places) or self.misfits(items):
            return False
        by_name = {item.name: item for item in items}
        self.items = [by_name[place.name] for place in self.places]
        return True

    def misfits(self, items: Sequence[Item]) -> list[str]:
        """Describes the tensors that do not fit their positions."""
        specs = {(p.name, p.dtype, p.shape) for p in self.places}
        read = {i.name: i.read() for i in items}
        found = {(name, t.dtype, tuple(t.shape)) for name, t in read.items()}
        wrong = [f"{name} {dtype} {list(shape)}" for name, dtype, shape in found - specs]
        return sorted(wrong) + sorted(f"no {name}" for name, *_ in specs if name not in read)

    def thawed(self, versions: Sequence[int]) -> list[Place]:
        """The positions of tensors that are no longer frozen, or were changed since `versions`."""
        frozen = zip(self.items, self.places, self.versions(), versions, strict=True)
        return [
            place
            for item, place, now, before in frozen
            if place.offset >= self.back and (now != before or not item.frozen)
        ]

    def bind(self, buffer: Tensor) -> None:
        """Makes every tensor a view of `buffer`."""
        for item, place in zip(self.items, self.places, strict=True):
            item.place(place.view(buffer))

    def strays(self, buffer: Tensor) -> list[tuple[Item, Place]]:
        """The tensors that are not in `buffer`, and their positions."""
        pairs = zip(self.items, self.places, strict=True)
        return [(item, place) for item, place in pairs if not place.holds(item.read(), buffer)]

    def versions(self) -> list[int]:
        """The version counter of each tensor, which in-place changes increase."""
        return [_version(item) for item in self.items]


def _version(item: Item) -> int:
    tensor = item.tensor if isinstance(item, Held) else item.read()
    return 0 if tensor.is_inference() else tensor._version


def _as(kind: type[Tensor], value: Tensor, requires_grad: bool) -> Tensor:
    if issubclass(kind, nn.Parameter):
        return nn.Parameter(value, requires_grad=requires_grad)
    return value.detach()
