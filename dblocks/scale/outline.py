"""Records the tensors that a constructor creates, and creates some of them in shared memory.

Initialisers draw random numbers in the order in which tensors are created, so the weights of some
layers depend on the draws for all. `Sharing` puts all unwanted tensors into the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
# Tensors from arange, linspace or torch.tensor are small, and constructors may read their values.
FACTORIES = {
    f"aten::{name}"
    for name in ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint")
}


class Memories:
    """A set of tensors' storages, which does not keep them alive.

    Weak references keep the address of a freed storage from being used again.
    """

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        """Adds the memory of a tensor."""
        if tensor not in self:
            self._held[storage_of(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def __contains__(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self._held


class Outline(TorchDispatchMode):
    """Tensors created inside the `with` block are on the meta device, without memory.

    At the end, generators that were passed to an op are restored to their earlier state.

    Args:
        floats: whether this applies to floating-point tensors only.
    """

    def __init__(self, *, floats: bool = False) -> None:
        super().__init__()
        self.floats = floats
        self.made: list[Tensor] = []
        """The tensors, in order."""
        self._memories = Memories()
        self._before: dict[torch.Generator, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Generator):
                self._before.setdefault(value, value.get_state())
        if func._schema.name not in FACTORIES:
            return self._noted(func, (args, kwargs), func(*args, **kwargs))
        drawn = {k: None if k == "generator" else v for k, v in kwargs.items()}
        made = func(*args, **drawn | {"device": META})
        if self.floats and not made.is_floating_point():
            return self._noted(func, (), func(*args, **kwargs))
        self.made.append(made)
        return made

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that were passed to an op inside the block."""
        return list(self._before)

    def is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor was created inside the block: it has no memory, or memory from there."""
        return tensor.is_meta or tensor in self._memories

    def _noted(self, func: Any, given: Any, result: Any) -> Any:
        # torch.tensor and from_numpy allocate before lift_fresh, the op that is dispatched.
        lifted = func._schema.name == "aten::lift_fresh"
        known = set() if lifted else {storage_of(t) for t in _tensors(given)}
        for tensor in _tensors(result):
            if storage_of(tensor) not in known:
                self._memories.add(tensor)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self._before.items():
            generator.set_state(state)


class Course:
    """What the first of several equal runs of a constructor did, so that others need not do it."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        """The state of the CPU's generator after each draw, by the number of the draw."""
        self.values: dict[int, Any] = {}
        """The values that were read, such as where draws are rejected."""


class Sharing(TorchDispatchMode):
    """Makes some of the tensors created inside the `with` block share the same memory.

    Args:
        absent: these tensors, by their index in the order of creation, as in an `Outline`.
        course: of the runs of the same constructor, empty in the first. In the others absent
            tensors are not drawn: the generator is put where it was after the draw.
    """

    def __init__(self, absent: Mapping[int, Tensor], course: Course | None = None) -> None:
        super().__init__()
        self.absent, self.count, self.course = absent, 0, course
        self.draws = self.reads = 0
        self._again = course is not None and bool(course.states)
        most = max((t.untyped_storage().nbytes() for t in absent.values()), default=0)
        self._memory: dict[torch.device, Tensor] = {}
        self._bytes = most
        self._unsound = Memories()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in FACTORIES:
            self.count += 1
            if (like := self.absent.get(self.count - 1)) is not None:
                return self._shared(func, args, kwargs, like)
        own = args[0] if args and isinstance(args[0], Tensor) else None
        in_place = own is not None and func._schema.name.endswith("_") and self.is_unsound(own)
        if torch.Tag.nondeterministic_seeded in func.tags:
            device = None if own is None else own.device
            result = self._drawn(func, args, kwargs, device, args[0] if in_place else None)
        elif func._schema.name == "aten::_local_scalar_dense":
            return self._read(func, args)
        elif in_place and self._again and torch.Tag.pointwise in func.tags:
            return own  # what nobody reads needs no values
        else:
            result = func(*args, **kwargs)
        # Values computed from absent ones are wrong too.
        for made, of in _made_of(func, args, kwargs, result):
            if any(self.is_unsound(t) for t in _tensors(of)):
                for tensor in _tensors(made):
                    self._unsound.add(tensor)
        return result

    def is_unsound(self, tensor: Tensor) -> bool:
        """Whether a tensor is absent, or was computed from values of an absent one."""
        return tensor in self._unsound

    def _shared(self, func: Any, args: Any, kwargs: Any, like: Tensor) -> Tensor:
        device = torch.device(kwargs.get("device") or "cpu")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawn(func, args, kwargs, device, like)
        if device not in self._memory:
            self._memory[device] = torch.zeros(self._bytes, dtype=torch.uint8, device=device)
            self._unsound.add(self._memory[device])
        values = self._memory[device][: like.untyped_storage().nbytes()].view(like.dtype)
        return values.as_strided(like.shape, like.stride())

    def _drawn(
        self, func: Any, args: Any, kwargs: Any, device: torch.device | None, absent: Any
    ) -> Any:
        """The result of an op that draws; `absent` itself, if it is given and need not be drawn."""
        number, self.draws = self.draws, self.draws + 1
        of_cpu = device is not None and device.type == "cpu"
        if self.course is None or not of_cpu:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        generator = torch.default_generator if generator is None else generator
        states = self.course.states
        if absent is not None and number in states:
            generator.set_state(states[number])
            return absent
        result = func(*args, **kwargs)
        states.setdefault(number, generator.get_state())
        return result

    def _read(self, func: Any, args: Any) -> Any:
        """The value of a tensor of one element; where it has none, that of the first run."""
        number, self.reads = self.reads, self.reads + 1
        values = {} if self.course is None else self.course.values
        if number in values and self.is_unsound(args[0]):
            return values[number]
        return values.setdefault(number, func(*args))


class Uncopied(TorchDispatchMode):
    """Makes copies of tensors inside the `with` block share the memory of the original."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::clone":
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def storage_of(tensor: Tensor) -> int:
    """An identifier of a tensor's storage, valid while the storage lives."""
    return tensor.untyped_storage()._cdata


def _made_of(func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[tuple[Any, Any]]:
    """The outputs of an op with their inputs; for ops on lists, element by element."""
    if not func._schema.name.startswith("aten::_foreach_"):
        yield result, (args, kwargs)
        return
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))]
    others = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    for made, *of in zip(args[0] if result is None else result, *lists, strict=False):
        yield made, (of, others)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
