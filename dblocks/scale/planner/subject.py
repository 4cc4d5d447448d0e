"""The network to plan: models without data, a batch, and the losses of a block and end to end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dblocks.blocks import Batch, BlocksConfig, DiffusionBlocks, Draw
from dblocks.blocks.config import Shared
from dblocks.checkpoint import NETWORKS
from dblocks.models import (
    CausalLM,
    CausalLMConfig,
    DiT,
    DiTConfig,
    MaskedLM,
    MaskedLMConfig,
    RecurrentConfig,
    RecurrentLM,
    ViT,
    ViTConfig,
)
from dblocks.schedules import MaskSchedule, NoiseSchedule, Schedule

CONFIGS = {
    "vit": ViTConfig,
    "causal-lm": CausalLMConfig,
    "masked-lm": MaskedLMConfig,
    "recurrent": RecurrentConfig,
    "dit": DiTConfig,
}
KINDS: dict[type, Any] = {
    ViTConfig: ViT,
    CausalLMConfig: CausalLM,
    MaskedLMConfig: MaskedLM,
    RecurrentConfig: RecurrentLM,
    DiTConfig: DiT,
}
LENGTH = 2048  # default length of texts for other libraries' models, if they accept it

Whole = tuple[nn.Module, list[nn.Module], Callable[[Batch], Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network to plan; its functions create models on the meta device."""

    name: str
    blocks: Callable[[BlocksConfig], DiffusionBlocks]
    """Creates the network in blocks."""
    whole: Callable[[], Whole] | None
    """Creates the end-to-end network, its layers and loss; None if that is one block of all
    layers."""
    batch: Callable[[int], dict[str, Tensor]]
    """Some samples."""
    tokens: int
    """Units per sample: the tokens of a text, or 1 for an image."""
    unit: str
    """The unit: tokens or images."""
    schedule: Schedule
    pretrained: bool
    """Whether it is another library's model, which has pretrained weights."""

    @property
    def size(self) -> str:
        """A description of a sample."""
        if self.unit == "tokens":
            return f"{self.tokens:,} tokens"
        with torch.device("meta"):
            shape = self.batch(1)["images"].shape[1:]
        return f"images of {' x '.join(map(str, shape))}"

    def config(self, num_blocks: int, shared: Shared) -> BlocksConfig:
        """How it is cut."""
        return BlocksConfig(num_blocks, schedule=self.schedule, shared=shared)


def of_network(config: Any, *, length: int | None = None) -> Subject:
    """A network of dblocks.

    Args:
        config: config of the network, such as a `ViTConfig`.
        length: sequence length; by default the network's context.
    """
    kind = KINDS[type(config)]
    name = next(name for name, made in CONFIGS.items() if made is type(config))
    text = hasattr(config, "vocab_size")
    schedule = MaskSchedule() if kind is MaskedLM else NoiseSchedule()
    size = _length(length, config.context) if text else _of_image(length, name)

    def batch(n: int) -> dict[str, Tensor]:
        if text:
            return {"tokens": torch.zeros(n, size, dtype=torch.int64)}
        images = torch.zeros(n, config.channels, *config.height_width)
        return {"images": images, "labels": torch.zeros(n, dtype=torch.int64)}

    def whole() -> Whole:
        plain: dict[str, Any] = {"conditioning": "none", "gate_init": 0.0, "head": "learned"}
        plain |= {"rows": "doubled"} if text else {"noise_scale": None}
        if kind is CausalLM:
            plain["tokens_per_block"] = 1
        model = kind(replace(config, **plain))
        return model, list(model.layers), lambda batch: _plain_loss(model, batch)

    apart = kind in (ViT, CausalLM, RecurrentLM)
    return Subject(
        name=name,
        blocks=lambda cut: DiffusionBlocks(kind(config), cut),
        whole=whole if apart else None,
        batch=batch,
        tokens=size,
        unit="tokens" if text else "images",
        schedule=schedule,
        pretrained=False,
    )


def of_saved(about: Mapping[str, Any], *, length: int | None = None) -> Subject:
    """A saved network.

    Args:
        about: the result of `read_config`.
        length: as for `of_network`.

    Raises:
        ValueError: it is not the config of a network.
    """
    subject = of_network(
        NETWORKS[about["model"]][1].from_dict(about["model_config"]), length=length
    )
    if about["blocks_config"] is None:
        return subject
    return replace(subject, schedule=BlocksConfig.from_dict(about["blocks_config"]).schedule)


def of_model(
    source: str, *, length: int | None = None, dtype: torch.dtype = torch.float32
) -> Subject:
    """Another library's model, built from its config alone.

    Args:
        source: where its config is; see `dblocks.integrations.build.build`.
        length: sequence length.
        dtype: dtype of its weights; modules that dblocks adds are float32.

    Raises:
        ValueError: there is no such model, or it cannot be converted.
        ImportError: its library is not installed.
    """
    from dblocks.integrations.build import build
    from dblocks.integrations.convert import Task, convert
    from dblocks.integrations.example_inputs import example_inputs

    def made(task: Task, cut: BlocksConfig) -> Any:
        # Built each time: a model that was moved off the meta device cannot be converted.
        masked = cut.schedule.corruption == "masks"
        model = build(source)
        if dtype != torch.float32:
            model.to(dtype=dtype)
        return convert(model, cut, task=task, mask_token_id=0 if masked else None)

    build(source)  # raise errors of the config once, not for each task
    task, schedule, dm = _first_converted(source, made, get_args(Task))
    network = dm.base_model
    call = example_inputs(network.model)
    given = list(call[0]) + list(call[1].values()) if call else []
    text = not given or given[0].ndim == 2
    sizes = getattr(network, "sizes", None) or getattr(network.target, "sizes", None)
    longest = sizes.context if sizes else LENGTH
    size = _length(length, longest) if text else _of_image(length, type(network.model).__name__)

    def batch(n: int) -> dict[str, Tensor]:
        labels = {} if task == "tokens" else {"labels": torch.zeros(n, dtype=torch.int64)}
        if text:
            # 1, as 0 may be the mask token.
            return {"tokens": torch.ones(n, size, dtype=torch.int64), **labels}
        return {"images": torch.zeros(n, *given[0].shape[1:], dtype=given[0].dtype), **labels}

    def whole() -> Whole:
        network = made(task, BlocksConfig(1, schedule=schedule)).base_model
        layers = [network.model.get_submodule(name) for name in network.names]

        def loss(batch: Batch) -> Tensor:
            z = batch["tokens"] if schedule.corruption == "masks" else None
            return network.plain_loss(batch, z)

        return network.model, layers, loss

    return Subject(
        name=type(network.model).__name__,
        blocks=lambda cut: made(task, cut),
        whole=None if task == "images" else whole,
        batch=batch,
        tokens=size,
        unit="tokens" if text else "images",
        schedule=schedule,
        pretrained=True,
    )


def _first_converted(
    source: str, made: Callable[[Any, BlocksConfig], Any], tasks: tuple[Any, ...]
) -> tuple[Any, Schedule, Any]:
    """The first task and schedule for which the model can be converted, and the converted model."""
    ways: list[tuple[Any, Schedule]] = [(task, NoiseSchedule()) for task in tasks]
    ways.append(("tokens", MaskSchedule()))
    refusals = []
    for task, schedule in ways:
        try:
            with torch.device("meta"):
                return task, schedule, made(task, BlocksConfig(1, schedule=schedule))
        except ValueError as error:
            refusals.append(f"{task}: {str(error).partition(';')[0]}")
    raise ValueError(f"{source} must be a model that can be converted; {'; '.join(refusals)}")


@contextmanager
def without_data() -> Iterator[None]:
    """Tensors created inside the `with` block have no data, but report the CPU as their device."""
    # transformers looks for packed texts in the positions. Without values it would create a mask,
    # which a real step without packed texts does not have.
    name, masks = "find_packed_sequence_indices", sys.modules.get("transformers.masking_utils")
    own = getattr(masks, name, None)
    if own is not None:
        setattr(masks, name, lambda *_, **__: None)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        if own is not None:
            setattr(masks, name, own)


def onto_cpu(model: nn.Module) -> nn.Module:
    """Moves a model from the meta device to the CPU, inside `without_data`; ties stay."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def new(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            fresh: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = tensor, fresh
        return moved[id(tensor)][1]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            named = cast(dict[str, Any], held)
            for name, tensor in named.items():
                if tensor is not None and tensor.is_meta:
                    named[name] = new(tensor)
    return model


def block_loss(dm: DiffusionBlocks, batch: Batch, block: int = 0) -> Tensor:
    """The loss of a block at fixed noise levels; no random numbers are drawn."""
    target = dm.base_model.target
    checked = target.check(batch)
    shape = target.sigma_shape(checked)
    drop = None
    if getattr(dm.base_model, "condition_drop", 0.0) > 0:
        drop = torch.zeros(shape[0], dtype=torch.bool)
    low, high = dm.config.schedule.range_of(block, dm.config.num_blocks)
    seed = torch.zeros((), dtype=torch.int64)
    return dm.loss_at(checked, block, Draw(torch.full(shape, (low + high) / 2), seed, drop)).loss


def _plain_loss(model: Any, batch: Batch) -> Tensor:
    if isinstance(model, ViT):
        return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
    if isinstance(model, RecurrentLM):
        steps = model.config.mean_recurrence
        # The initial state is drawn without drawing a seed.
        given = model.target.check(batch)
        noise = torch.zeros(*batch["tokens"].shape, model.config.width)
        target = model.target.fixed()
        return target.next_loss(model._plain_features(given, target, steps, noise), given)
    return model.next_token_loss(batch)


def _length(length: int | None, longest: int) -> int:
    if length is not None and not 1 <= length <= longest:
        raise ValueError(f"tokens must be from 1 to {longest}, the network's maximum, got {length}")
    return min(longest, LENGTH) if length is None else length


def _of_image(length: int | None, name: str) -> int:
    """The units of an image, 1; raises ValueError if a length is given."""
    if length is not None:
        raise ValueError(
            f"--tokens must be left out for {name}, whose samples are images, got {length}; the "
            "network's own flags set their size"
        )
    return 1
