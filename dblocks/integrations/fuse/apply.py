"""`fuse_` puts the fused ops into an existing model; `unfuse_` undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from dblocks.integrations.fuse.fusion import (
    REGISTERED,
    Fused,
    Fusion,
    fused_class,
    fusion_of,
    is_fused,
    owner_of,
)
from dblocks.integrations.norms import warn_of_subclasses
from dblocks.ops._dispatch import Impl, resolve_impl


class Replacement(NamedTuple):
    """A module whose forward was replaced."""

    name: str
    """Name in `named_modules`; empty for the model itself."""
    before: str
    """Its class."""
    after: str
    """The ops that its forward calls now."""


def fuse_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    impl: Impl = "auto",
) -> list[Replacement]:
    """Replaces norm + modulation and gate + residual by dblocks' fused ops, in place.

    It replaces the adaptive norms of diffusers, the blocks of its DiT, PixArt, Stable Diffusion 3
    and Flux transformers, and classes registered by `register_fusion`. Only instances change: a
    replaced module becomes an instance of a subclass of its own class and keeps its attributes. So
    parameters, `state_dict`, hooks, modes, devices, `isinstance`, `copy.deepcopy` and pickling do
    not change, and `unfuse_` restores the original. Outputs and gradients differ from the original
    by rounding: an op rounds its result once, plain PyTorch at each step.

    A module is replaced if its class runs the library's own forward, with a source known to
    dblocks. A subclass that overrides forward is not replaced; nor is a version of the library with
    another source, with a warning. A module on which something else set `forward` (a hook of
    offloading or of a cache, checkpointing) raises an error: fuse first. Code that stores
    `module.forward` later calls the fused one, and the plain one after `unfuse_`. Inside a replaced
    module, the norms of `dblocks.integrations.norms` are fused; any other runs its own forward,
    with a warning if it is a subclass of one of them.

    Args:
        model: any module, changed in place.
        filter_fn: called with a module that could be replaced and its name; False keeps the module.
        impl: the implementation that every op uses, as in `dblocks.functional.adaln`.

    Returns:
        The replacements, in the order of `named_modules`; [] for a second call, or a model without
        such modules.

    Raises:
        ValueError: if an `impl` other than "auto" is given and nothing was replaced.
        RuntimeError: if `forward` was set on a module to be replaced. Then nothing is changed.
        TypeError, RuntimeError, ImportError: for a named `impl` that cannot run on the module's
            parameters, as in the ops. Nothing is changed then.
    """
    _check_module(model)
    if not (filter_fn is None or callable(filter_fn)):
        raise TypeError(f"filter_fn must be a function or None, got {type(filter_fn).__name__}")
    resolve_impl(impl, _sample(model), "fuse_")
    found: list[tuple[str, nn.Module, Fusion]] = []
    unknown: dict[str, None] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if is_fused(module):
            continue
        fusion = fusion_of(type(module))
        if isinstance(fusion, str):
            unknown[fusion] = None
        elif (
            fusion
            and (fusion.fits is None or fusion.fits(module))
            and (filter_fn is None or filter_fn(module, name))
        ):
            found.append((name, module, fusion))
            if "forward" in vars(module):
                wrapped.append(f"{name or 'the model'} ({type(module).__name__})")
    if wrapped:
        raise RuntimeError(
            f"modules to fuse must run the forward of their class, got one set on "
            f"{len(wrapped)} of {len(found)}: {', '.join(wrapped[:4])}; call fuse_ before what "
            "wraps modules (enable_cache, offloading, checkpointing), or leave them by filter_fn"
        )
    if impl != "auto" and not found:
        why = "; ".join(unknown) or "they are fused already, filtered out or of other classes"
        raise ValueError(
            f"impl={impl!r} must have modules to work in, got none to replace in "
            f"{type(model).__name__} ({why}); see unfuse_, filter_fn and register_fusion"
        )
    if unknown:
        warnings.warn(f"not fused: {'; '.join(unknown)}", stacklevel=2)
    for _, module, _ in found:
        resolve_impl(impl, _sample(module), "fuse_")
        warn_of_subclasses(module.children(), stacklevel=2)
    replaced = []
    for name, module, fusion in found:
        before = type(module)
        module.__class__ = fused_class(before, fusion.forward, impl)
        replaced.append(Replacement(name, before.__qualname__, fusion.ops))
    return replaced


def unfuse_(model: nn.Module) -> list[str]:
    """Restores the class of every module that `fuse_` replaced, in place.

    Args:
        model: any module.

    Returns:
        The names of the modules that were restored.

    Raises:
        RuntimeError: if something, such as FSDP's `fully_shard`, has given a fused module another
            class since. Then nothing is changed.
    """
    _check_module(model)
    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Fused)
    ]
    for name, module in found:
        if not is_fused(module):
            raise RuntimeError(
                f"{name or 'the model'} must have the class that fuse_ gave it, got "
                f"{type(module).__name__} made of it; call unfuse_ before what changed it"
            )
    for _, module in found:
        module.__class__ = module.unfused
    return [name for name, _ in found]


def register_fusion(
    cls: type[nn.Module], forward: Callable[..., Any], ops: str = "registered"
) -> None:
    """Registers a replacement for the forward of `cls`, for `fuse_`.

    It applies to instances of `cls` and of subclasses that do not override forward. `forward` takes
    `self` and the arguments of the original, and computes the same with `modulate`, `gated_add`,
    `gated_add_and_modulate` or `dblocks.functional`; `self.fused_impl` is the `impl` passed to
    `fuse_`, and `self.unfused` the original class, for `self.unfused.forward(self, ...)`.
    `dit_block` and `dit_final_layer` are such forwards, for blocks written like those of DiT. A
    second registration of a class replaces the first.

    Args:
        cls: a class of modules that defines its own forward.
        forward: the function.
        ops: the value of `Replacement.after`.

    Raises:
        TypeError: if `cls` is not a class of modules, or `forward` not a function.
        ValueError: if `cls` inherits its forward.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r}")
    if not callable(forward):
        raise TypeError(f"forward must be a function, got {forward!r}")
    owner = owner_of(cls)
    if owner is not cls:
        raise ValueError(
            f"cls must define forward, got {cls.__qualname__}, which inherits it; register "
            f"{owner.__qualname__}"
        )
    REGISTERED[cls] = Fusion(forward, ops)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _sample(module: nn.Module) -> torch.Tensor:
    """A tensor of the dtype and device that the module computes with."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
