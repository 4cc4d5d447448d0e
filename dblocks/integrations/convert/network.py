"""What converted models have in common: the user's model, its layers, and what is added to them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, Target
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.nn import NoiseEmbedding
from dblocks.nn.scalars import accept_scalars

SWITCHES = ("gradient_checkpointing", "grad_checkpointing")  # of diffusers, and of timm


class Converted(nn.Module, ABC):
    """Somebody's model with what `DiffusionBlocks` asks for; see `BlockModel`.

    It is called as the model is, and has its attributes: `converted(...)` is the model itself,
    whose modules it runs and does not change. Its names in the state_dict follow `model.`.

    Subclasses say what the target is and how it enters and leaves the layers. The target refers to
    the user's own embedding and head, as they are when it is asked for.

    Args:
        model: the user's; its modules are used, not copied.
        layers: its residual layers by name, and what runs in their place; they may be the same.
        width: D of the rows.
    """

    layers: nn.ModuleList

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], width: int, *, conditioned: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(layers)
        self.width = width
        # Not registered: the layers are registered in the model, and their modulations below.
        object.__setattr__(self, "layers", nn.ModuleList(layers.values()))
        self.noise_embedding = NoiseEmbedding(cond_dim(width)) if conditioned else None
        self.modulations = nn.ModuleList(
            layer.modulation for layer in layers.values() if isinstance(layer, ConditionedLayer)
        )

    whole_checked = True
    """Whether the whole model was compared with its parts, or need not be."""

    @property
    def _frozen_by_blocks(self) -> bool:
        # Of the model, which may be converted again.
        return getattr(self.model, "_frozen_by_blocks", False)

    @_frozen_by_blocks.setter
    def _frozen_by_blocks(self, frozen: bool) -> None:
        cast(Any, self.model)._frozen_by_blocks = frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself."""
        return self.model(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        accept_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ made it, and while unpickling, there is no model.
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    @property
    @abstractmethod
    def target(self) -> Target:
        """See `BlockModel`."""

    @abstractmethod
    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The loss of the model itself on a batch, 0-d; z, where masks say what is predicted.

        Raises:
            ValueError: the model has none.
        """

    @abstractmethod
    def compare(self) -> tuple[Tensor, Tensor]:
        """What the model itself makes of a small batch, and what its parts make of it.

        The parts run as here, with all layers, but without noise and modulations.
        """

    @property
    def checkpointing(self) -> bool:
        """Whether all layers keep their input only, as the model's own switch says.

        diffusers and timm have it on the model; transformers has one on each layer.
        """
        return torch.is_grad_enabled() and any(getattr(self.model, s, False) for s in SWITCHES)

    def added_to_(self) -> None:
        """Moves what is added to the device of the layers; float32, or float64 where they are."""
        first = next(self.layers.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        for child in self._added():
            child.to(first.device, dtype)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(first.device, dtype)
                self._parameters[name] = nn.Parameter(moved)

    # How `DiffusionBlocks` takes it apart

    def with_layers(self, layers: dict[str, nn.Module], *, shared: bool = True) -> nn.Module:
        """A view of some of the layers, by their number, beside all that is shared, or without it.

        It holds the same tensors under the same names.
        """
        view = copy.copy(self)
        # Lists: parameters must have one order in all processes, which that of a set is not.
        others = [name for i, name in enumerate(self.names) if str(i) not in layers]
        kept = [name for name in self.names if name not in others]
        modulations = nn.ModuleDict(
            {i: lay.modulation for i, lay in layers.items() if isinstance(lay, ConditionedLayer)}
        )
        model = _without(self.model, others) if shared else _only(self.model, kept)
        view._modules = dict(self._modules) if shared else {}
        view._modules["model"], view._modules["modulations"] = model, modulations
        view._parameters = {**self._parameters} if shared else {}
        object.__setattr__(view, "layers", nn.ModuleDict(layers))
        return view

    def without_layers(self) -> nn.Module:
        """A deep copy of what is shared."""
        memo: dict[int, Any] = {}
        for name in self.names:
            memo[id(self.model.get_submodule(name))] = nn.Module()
        memo[id(self.layers)] = nn.ModuleList()
        memo[id(self.modulations)] = nn.ModuleList()
        return copy.deepcopy(self, memo)

    def follow_(self, other: Converted) -> None:
        """Checkpoints as `other` does, of which this is a copy."""
        for switch in SWITCHES:
            if hasattr(other.model, switch):
                setattr(self.model, switch, getattr(other.model, switch))

    def _added(self) -> Iterable[nn.Module]:
        return (child for name, child in self.named_children() if name != "model")

    def _cond(self, level: Any) -> Tensor | None:
        return None if self.noise_embedding is None else self.noise_embedding(level.c_noise)


def example_tokens(
    vocab_size: int, without: Iterable[int | None], device: torch.device, length: int = 6
) -> Tensor:
    """Two texts [2, T] that hold none of some tokens."""
    left = sorted(set(range(min(vocab_size, 64))) - set(without))
    places = torch.arange(2 * length, device=device) * 5 % len(left)
    return torch.tensor(left, device=device)[places].view(2, length)


def check_some(samples: Tensor) -> None:
    """Raises for a batch of no samples, which the modules of other libraries do not take."""
    if len(samples) == 0:
        raise ValueError(
            "a batch for a converted model must hold at least one sample, got none; leave it out"
        )


def _without(module: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A shallow copy of a tree of modules without some of them; the others are the same."""
    view = _shallow(module)
    for name, inside in _by_child(paths).items():
        if "" in inside:
            del view._modules[name]
        else:
            view._modules[name] = _without(cast(nn.Module, module._modules[name]), inside)
    return view


def _only(module: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A tree of modules that holds some of those of `module`, under their names, and no other."""
    view = nn.Module()
    for name, inside in _by_child(paths).items():
        child = cast(nn.Module, module._modules[name])
        view._modules[name] = child if "" in inside else _only(child, inside)
    return view


def _shallow(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _by_child(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths below each child, in their order; the empty one is the child itself."""
    found: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        found.setdefault(name, []).append(rest)
    return found
