"""How a class of modules is fused, and the class that takes its place on an instance.

Only here are classes made and instances' classes told apart. A subclass on the instance, in place
of a wrapper or of another `forward` in its `__dict__`, keeps the names in the state_dict, the
hooks, `isinstance` and copies, and leaves other instances of the class as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, cast

from torch import nn

from dblocks.integrations.digest import digest
from dblocks.ops._dispatch import Impl

# Imported when a model has a module of the library.
LIBRARIES = {"diffusers": "dblocks.integrations.fuse.diffusers"}


class Fusion(NamedTuple):
    """A forward to put in the place of a class's own."""

    forward: Callable[..., Any]
    ops: str
    """The ops that it calls, for people to read."""
    digests: tuple[str, ...] = ()
    """Of the sources of the forwards that it may replace; none means any."""
    fits: Callable[[Any], bool] | None = None
    """Whether it may replace that of an instance."""


class Fused(nn.Module):
    """Stands before a module's class in the class of its fused instances.

    The instance keeps its attributes, so parameters, buffers, hooks and submodules are untouched;
    copies and pickles find the class again by its original and the implementation.
    """

    unfused: type[nn.Module]
    fused_impl: Impl

    def _get_name(self) -> str:
        return f"Fused{self.unfused.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        create, arguments, *state = cast("tuple[Any, ...]", reduced)
        if arguments[:1] != (type(self),) or not is_fused(self):
            return reduced
        return (_new, (create, self.unfused, self.fused_impl, *arguments[1:]), *state)


REGISTERED: dict[type[nn.Module], Fusion] = {}
_MADE: set[type] = set()


def fusion_of(cls: type) -> Fusion | str | None:
    """How instances of `cls` are fused, or why a known class is not; None for any other."""
    owner = owner_of(cls)
    if owner in REGISTERED:
        return REGISTERED[owner]
    adapter = LIBRARIES.get(owner.__module__.partition(".")[0])
    if adapter is None:
        return None
    fusion = importlib.import_module(adapter).BY_CLASS.get(owner)
    if fusion is None or digest(owner.forward) in fusion.digests:
        return fusion
    return f"{owner.__module__}.{owner.__qualname__}, whose forward is not one that dblocks knows"


@cache
def fused_class(unfused: type[nn.Module], forward: Callable[..., Any], impl: Impl) -> type[Fused]:
    """A subclass of `unfused` with another forward.

    It keeps the name: libraries look for the blocks to shard, offload or compile by that.
    """
    namespace = {
        "__module__": unfused.__module__,
        "__qualname__": unfused.__qualname__,
        "__doc__": unfused.__doc__,
        "forward": _bound(forward),
        "unfused": unfused,
        "fused_impl": impl,
    }
    make = cast("Callable[..., type[Fused]]", type(unfused))
    made = make(unfused.__name__, (Fused, unfused), namespace)
    _MADE.add(made)
    adapter = LIBRARIES.get(owner_of(unfused).__module__.partition(".")[0])
    if adapter is not None:
        importlib.import_module(adapter).announce(made, unfused)
    return made


def _bound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` as long as the instance is fused, and after that the forward of its class.

    What wraps a module (hooks of offloading and caches, checkpointing) stores `module.forward` as
    it was then, and calls it for ever. This way it calls the right one after `unfuse_` too.
    """

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Fused):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return call


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse_` made the class of the module."""
    return type(module) in _MADE


def owner_of(cls: type) -> type:
    """The class among the bases of `cls` whose forward its instances run."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def _new(
    create: Callable[..., nn.Module], unfused: type[nn.Module], impl: Impl, *arguments: Any
) -> nn.Module:
    """An empty instance of the fused class, for a copy or a pickle to fill."""
    fusion = fusion_of(unfused)
    if not isinstance(fusion, Fusion):
        raise RuntimeError(
            f"{unfused.__qualname__} must have a fusion here as where it was written, got "
            f"{fusion}; register it first, or call unfuse_ before writing"
        )
    return create(fused_class(unfused, fusion.forward, impl), *arguments)
