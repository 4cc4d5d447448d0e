"""The base class of converted models: the user's model, its layers and their additions."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, Target
from dblocks.blocks.changes import (
    Row,
    children_of,
    remember,
    remembered,
    replaced_child,
    row_of,
    rows_of,
    settings_of,
    vocabularies,
)
from dblocks.integrations.convert.copied import Original
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.nn import NoiseEmbedding
from dblocks.nn.scalars import accept_scalars

SWITCHES = ("gradient_checkpointing", "grad_checkpointing")  # of diffusers, and of timm


@dataclass(frozen=True)
class Sizes:
    """The sizes that a batch is checked against."""

    vocab_size: int
    context: int


@dataclass(frozen=True)
class Taken:
    """What was seen of a model when a view of one block was taken."""

    rows: list[Row]
    """Of the modules that are not called, but whose parts or weights are."""
    children: list[Row]
    """Of what holds the layers, in the model and in the view."""
    models: tuple[tuple[ref[nn.Module], list[int], dict[str, Any]], ...]
    """The models, the sizes of their embeddings, and the entries of their configs."""


class Converted(nn.Module, ABC):
    """The user's model with the methods that `DiffusionBlocks` needs; see `BlockModel`.

    It is called as the model is, and has its attributes: `converted(...)` is the model itself,
    whose modules it runs and does not change. Its names in the state_dict follow `model.`.

    Subclasses define the target and how it enters and leaves the layers. The target refers to the
    user's own embedding and head at the time of the call.

    Args:
        model: the user's model; its modules are used, not copied.
        layers: its residual layers by name, with their replacements, which may be the layers.
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
    """Whether the comparison of the model with its parts is done or not needed."""
    compared = True
    """Whether it is to be compared: `check` of `convert`."""

    @property
    def _frozen_by_blocks(self) -> bool:
        # Stored on the model, which may be converted again.
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
        """The model's own loss on a batch, 0-d; `z` holds the masked tokens, if tokens are masked.

        Raises:
            ValueError: the model has none.
        """

    @abstractmethod
    def compare(self) -> tuple[Tensor, Tensor]:
        """The results of the model itself and of its parts on a small batch.

        The parts run with all layers, but without noise and modulations.
        """

    @property
    def checkpointing(self) -> bool:
        """Whether all layers are checkpointed, by the model's own switch.

        diffusers and timm have one switch on the model; transformers has one on each layer.
        """
        return torch.is_grad_enabled() and any(getattr(self.model, s, False) for s in SWITCHES)

    def added_to_(self) -> None:
        """Moves the added modules to the layers' device, as float32 (float64 if the layers are)."""
        first = next(self.layers.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        for child in self._added():
            child.to(first.device, dtype)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(first.device, dtype)
                self._parameters[name] = nn.Parameter(moved)

    def before_use(self) -> None:
        """Of a view of one block: raises if what it does not see was changed since it was taken.

        Raises:
            ValueError: it was.
        """
        taken = remembered(self)
        if isinstance(taken, Taken):
            _check_as_taken(taken)
        self.follow_model_()

    def follow_model_(self) -> None:
        """Takes over attributes of the model's attentions that were set since the last call."""
        for layer in self.layers.children():
            if isinstance(layer, ConditionedLayer):
                layer.follow_()

    def own_layers(self) -> list[nn.Module]:
        """The model's own layers."""
        held = self.layers.children()
        return [x.layer if isinstance(x, ConditionedLayer) else x for x in held]

    def _by_parts(self) -> Iterable[nn.Module]:
        """The modules that are not called, but whose parts or weights are."""
        for layer in self.layers.children():
            if isinstance(layer, ConditionedLayer):
                yield layer.layer
                yield layer.attention

    def read_as_weights(self) -> tuple[nn.Module, ...]:
        """The modules outside the layers whose weights are read."""
        return ()

    # How `DiffusionBlocks` takes it apart

    def with_layers(self, layers: dict[str, nn.Module], *, shared: bool = True) -> nn.Module:
        """A view of some layers by number, with or without the shared parameters.

        It holds the same tensors under the same names.
        """
        view = copy.copy(self)
        # Lists, not sets: parameters must have the same order in all processes.
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
        watched = (*view._by_parts(), *(view.read_as_weights() if shared else ()))
        children, models = children_of(self.model, self.names, others), (self.model,)
        if shared:
            children, models = children + children_of(model, kept, ()), (*models, model)
        told = tuple((ref(m), vocabularies(m), settings_of(m)) for m in models)
        remember(view, Taken([row_of(m) for m in watched], children, told))
        return view

    def without_layers(self) -> nn.Module:
        """A deep copy of the shared part."""
        memo: dict[int, Any] = {}
        for name in self.names:
            memo[id(self.model.get_submodule(name))] = nn.Module()
        memo[id(self.layers)] = nn.ModuleList()
        memo[id(self.modulations)] = nn.ModuleList()
        # The layers, which are the model's own, read the same config.
        memo |= {id(c): c for m in self.model.modules() if (c := vars(m).get("config")) is not None}
        copied = copy.deepcopy(self, memo)
        remember(copied, Original(self))
        return copied

    def follow_(self, other: Converted) -> None:
        """Sets checkpointing as in `other`, the original of this copy."""
        for switch in SWITCHES:
            if hasattr(other.model, switch):
                setattr(self.model, switch, getattr(other.model, switch))

    def follow_original_(self, *, moved: bool) -> None:
        """See `Divisible`."""
        original = remembered(self)
        if isinstance(original, Original):
            original.followed_by(self, moved=moved)

    def _added(self) -> Iterable[nn.Module]:
        return (child for name, child in self.named_children() if name != "model")

    def _cond(self, level: Any) -> Tensor | None:
        return None if self.noise_embedding is None else self.noise_embedding(level.c_noise)


def _check_as_taken(taken: Taken) -> None:
    """Raises if what a view of one block does not see was changed since it was taken."""
    anew = "take the block anew: dm.block(i)"
    for before, now in zip(taken.rows, rows_of(row[0] for row in taken.rows), strict=True):
        if now is not None and before != now:
            raise ValueError(
                f"a {type(now[0]()).__name__} must have the same hooks, class and forward as when "
                "its block was taken, since its parts are called and not it itself; change the "
                f"model before block(), or {anew}"
            )
    replaced = replaced_child(taken.children)
    if replaced is not None:
        raise ValueError(
            f"{replaced} must stay the module that it was when the block was taken, which the "
            f"block still holds, got another or none; {anew}"
        )
    for reference, sizes, settings in taken.models:
        model = reference()
        if model is None:
            continue
        if vocabularies(model) != sizes:
            raise ValueError(
                f"the embeddings must stay as large as when the block was taken, {sizes}, got "
                f"{vocabularies(model)} as by resize_token_embeddings; {anew}"
            )
        if (now := settings_of(model)) != settings:
            names = sorted(n for n in {**settings, **now} if settings.get(n) != now.get(n))
            raise ValueError(
                f"{', '.join(names)} of the model's config must stay as when the block was taken, "
                f"got another; {anew}"
            )


def example_tokens(
    vocab_size: int, without: Iterable[int | None], device: torch.device, length: int = 6
) -> Tensor:
    """Two texts [2, T] without the excluded tokens."""
    left = sorted(set(range(min(vocab_size, 64))) - set(without))
    places = torch.arange(2 * length, device=device) * 5 % len(left)
    return torch.tensor(left, device=device)[places].view(2, length)


def check_some(samples: Tensor) -> None:
    """Raises for an empty batch, which modules of other libraries do not take."""
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
    """A tree with only some of the modules of `module`, under their names."""
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
    """Paths below each child, in order; an empty path is the child itself."""
    found: dict[str, list[str]] = {}
    for path in paths:
        name, _, rest = path.partition(".")
        found.setdefault(name, []).append(rest)
    return found
