"""A denoiser of diffusers as a network of blocks: its own forward with some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.integrations.convert.denoiser_families import FAMILIES, DenoiserFamily, family_of
from dblocks.integrations.convert.latents import NEGATIVE, LatentTarget, check_samples, null_of
from dblocks.integrations.convert.network import Converted, check_some
from dblocks.integrations.convert.predictions import Rates
from dblocks.integrations.convert.stacks import join
from dblocks.schedules import NoiseLevel


class PlacedLayer(nn.Module):
    """A layer and its path in the model; it is put into the list there when its block runs.

    Args:
        layer: the model's own layer.
        path: its name in the model.
    """

    def __init__(self, layer: nn.Module, path: str) -> None:
        super().__init__()
        self.layer = layer
        self.path = path


class Denoised(NamedTuple):
    """The prediction of the model."""

    output: Tensor
    """Of the shape of z, in the dtype of `z_in`."""
    z_in: Tensor
    """c_in*z."""
    rates: Rates


class ConvertedDenoiser(Converted):
    """A denoiser of images, latents or videos of diffusers; see `FAMILIES`.

    The model's own forward runs once, with only the block's layers in its lists: everything around
    them is unchanged, including their modulation by the noise level. The model is called as it was
    trained, with the timestep and the scale of x that correspond to sigma, and F is computed from
    its prediction: all layers in one block are the pretrained denoiser.

    A batch holds "images", the target in the layout of the model's input, and other arguments of
    its forward by name.

    Args:
        model: the user's model.
        layers: its layers by name.
        family: the model's family.

    Raises:
        ValueError: these are not all layers of the family's lists in the order in which they run,
            or the model's forward was replaced.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], family: DenoiserFamily
    ) -> None:
        placed = {path: PlacedLayer(layer, path) for path, layer in layers.items()}
        super().__init__(model, placed, 0, conditioned=False)
        self.family = family
        _check_order(model, tuple(layers), family)
        self._running(list(placed.values()))

    @property
    def call_reads(self) -> list[str]:
        """See `BlockModel`."""
        known = sorted(self.family.arguments(_own(self.model))[1])
        return [*known, *(NEGATIVE + name for name in known)]

    @property
    def target(self) -> LatentTarget:
        """The image, latent or video itself."""
        family, own = self.family, _own(self.model)
        known = family.arguments(own)[1]
        return LatentTarget(family.layout, own.config["in_channels"], known)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> dict[str, Any]:
        """The arguments of the forward; where `drop` [N] is true, those named "negative_"."""
        needs, known = self.family.arguments(_own(self.model))
        given = {name: value for name, value in batch.items() if name != "images"}
        unknown = [n for n in given if n.removeprefix(NEGATIVE) not in known]
        missing = sorted(name for name in needs if given.get(name) is None)
        if unknown or missing:
            raise ValueError(
                f"a batch of {type(_own(self.model)).__name__} must hold {sorted(needs)}, and may "
                f"hold {sorted(known - needs)} and for guidance these with {NEGATIVE!r} before "
                f"their names, got {sorted(given)}"
            )
        positive = {name: value for name, value in given.items() if name in known}
        if drop is None:
            return positive
        negative = {n.removeprefix(NEGATIVE): v for n, v in given.items() if n not in known}
        return null_of(positive, negative, drop)

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Any
    ) -> Denoised:
        """Runs the model with `layers` alone on the noisy target c_in*z."""
        check_some(z_in)
        family, own = self.family, _own(self.model)
        check_samples(condition, len(z_in), family.whole)
        rates = family.prediction.rates(level)
        time = 1 - rates.time if family.reversed else rates.time
        x = z_in * _over(rates.rate / level.c_in, z_in)
        # The dtype of its parameters; a shared view may hold none of the layers.
        arguments = {
            **condition,
            "hidden_states": x.to(own.dtype),
            "timestep": time * family.timestep_scale(own),
        }
        output = _run(self._running, layers, arguments)
        axis = 1 + family.layout.index("C")
        if output.shape[axis] == 2 * z_in.shape[axis]:  # The other half are variances.
            output = output.narrow(axis, 0, z_in.shape[axis])
        if output.shape != z_in.shape:
            raise ValueError(
                f"{type(own).__name__} must return the shape that it is given, got "
                f"{list(output.shape)} for {list(z_in.shape)}; sizes must be multiples of its "
                "patches, and it must take no channels or patches beside the noisy ones"
            )
        return Denoised(-output if family.reversed else output, z_in, rates)

    def features(self, hidden: Denoised) -> Tensor:
        """F, of the shape of z."""
        rates, z_in = hidden.rates, hidden.z_in
        output = hidden.output.to(z_in.dtype)
        return _over(rates.skip, z_in) * z_in - _over(rates.out, z_in) * output

    def compare(self) -> tuple[Tensor, Tensor]:
        """Nothing to compare: the parts run only in the model's own forward."""
        return torch.ones(1), torch.ones(1)

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """None: the model has no loss other than denoising."""
        raise ValueError(
            "a denoiser has no loss besides that of denoising; set clean_loss_weight to 0"
        )

    def own_layers(self) -> list[nn.Module]:
        """See `Converted.own_layers`."""
        return [cast(PlacedLayer, placed).layer for placed in self.layers.children()]

    def follow_(self, other: Converted) -> None:
        """Sets checkpointing as in `other`, the original of this copy."""
        super().follow_(other)
        function = vars(_own(other.model)).get("_gradient_checkpointing_func")
        if function is not None:
            _own(self.model)._gradient_checkpointing_func = function

    def _running(self, layers: Iterable[nn.Module]) -> nn.Module:
        """A view of the model whose lists hold only these layers."""
        places: dict[str, dict[str, nn.Module]] = {n.rpartition(".")[0]: {} for n in self.names}
        for placed in layers:
            assert isinstance(placed, PlacedLayer)
            path, _, key = placed.path.rpartition(".")
            places[path][key] = placed.layer
        view = self.model
        for path, members in places.items():
            view = self._with_list(view, path.split("."), path, members)
        return view

    def _with_list(
        self, module: nn.Module, left: list[str], path: str, members: dict[str, nn.Module]
    ) -> nn.Module:
        """A copy of the modules above a list, with a list of `members` in its place."""
        if not left:
            return nn.ModuleList(members[key] for key in sorted(members, key=int))
        if "forward" in vars(module):
            raise ValueError(
                f"{type(module).__name__} must have no replaced forward, "
                "which would run the layers of all blocks; remove what put it there (a cache, an "
                "offload or group offload of the whole model), and put it on the layers"
            )
        view = copy.copy(module)
        view._modules = dict(module._modules)
        child = module._modules[left[0]]
        assert child is not None
        view._modules[left[0]] = self._with_list(child, left[1:], path, members)
        return view


@torch.compiler.disable()
def _run(
    running: Callable[[Sequence[nn.Module]], nn.Module],
    layers: Sequence[nn.Module],
    arguments: Mapping[str, Any],
) -> Tensor:
    """The result of the model's own forward with only these layers in its lists.

    The view is made at each call, since modules of the model may be replaced in between. A compiler
    would take each view for another model; layers that are compiled themselves stay compiled.
    """
    return running(layers)(**arguments, return_dict=False)[0]


def denoiser(model: nn.Module, layers: Mapping[str, nn.Module]) -> ConvertedDenoiser:
    """A denoiser of diffusers, possibly inside peft's wrapper.

    Raises:
        ValueError: its class is not supported, or its forward was replaced.
    """
    own = _own(model)
    family = family_of(own)
    if family is None:
        raise ValueError(
            "task 'images' needs a DiTTransformer2DModel or one of "
            f"{', '.join(FAMILIES)}, with the forward of its class, got "
            f"{type(own).__name__}; write a network with the members of "
            "dblocks.blocks.BlockModel instead"
        )
    return ConvertedDenoiser(model, layers, family)


def default_layers(model: nn.Module) -> list[str] | None:
    """The paths of the lists of layers of a supported denoiser; None for other models."""
    own = _own(model)
    family = family_of(own)
    if family is None:
        return None
    prefix = _prefix(model, own)
    return [join(prefix, path) for path in family.lists if len(own.get_submodule(path))]


def _check_order(model: nn.Module, names: tuple[str, ...], family: DenoiserFamily) -> None:
    """Raises unless these are all layers of the family's lists, in order."""
    own = _own(model)
    prefix = _prefix(model, own)
    lists = {path: own.get_submodule(path) for path in family.lists}
    whole = tuple(
        join(prefix, path, key) for path, members in lists.items() for key in members._modules
    )
    if names != whole:
        found = [join(prefix, path) for path in family.lists if len(lists[path])]
        raise ValueError(
            f"layers of {type(own).__name__} must be all of {' and '.join(found)}, in the order in "
            f"which they run, got {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; pass "
            f"layers={found}"
        )


def _own(model: nn.Module) -> Any:
    """The model without peft's wrapper."""
    own: Any = model
    return own.get_base_model() if hasattr(own, "get_base_model") else own


def _prefix(model: nn.Module, own: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is own)


def _over(value: Tensor, z: Tensor) -> Tensor:
    """[N] reshaped to multiply z [N, ...]."""
    return value.view(-1, *[1] * (z.ndim - 1))
