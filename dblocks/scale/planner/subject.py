"""What is planned: a network without data, its batch, and how it is trained in blocks and whole."""

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
LENGTH = 2048  # of texts for other libraries' models, or what they take if that is less

Whole = tuple[nn.Module, list[nn.Module], Callable[[Batch], Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network to plan; it makes models on the meta device."""

    name: str
    blocks: Callable[[BlocksConfig], DiffusionBlocks]
    """The network in blocks."""
    whole: Callable[[], Whole] | None
    """The network end to end, its layers and its loss; None: one block of all layers is that."""
    batch: Callable[[int], dict[str, Tensor]]
    """Some samples."""
    tokens: int
    """What a sample counts as: the tokens of a text, or 1."""
    unit: str
    """What is counted: tokens or images."""
    schedule: Schedule
    pretrained: bool
    """Whether it is another library's model, which has weights somewhere."""

    @property
    def size(self) -> str:
        """What a sample is, in words."""
        if self.unit == "tokens":
            return f"{self.tokens:,} tokens"
        with torch.device("meta"):
            shape = self.batch(1)["images"].shape[1:]
        return f"images of {' x '.join(map(str, shape))}"

    def config(self, num_blocks: int, shared: Shared) -> BlocksConfig:
        """How it is cut."""
        return BlocksConfig(num_blocks, schedule=self.schedule, shared=shared)


def of_network(config: Any, *, length: int | None = None) -> Subject:
    """One of the networks here.

    Args:
        config: such as a `ViTConfig`.
        length: tokens of a text; its context by default.
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
    """A network that was saved.

    Args:
        about: what `read_config` finds.
        length: as of `of_network`.

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
    """Another library's model, known by its config alone.

    Args:
        source: where its config is; see `dblocks.integrations.build.build`.
        length: tokens of a text.
        dtype: of its weights; what blocks add is float32.

    Raises:
        ValueError: there is no such model, or it cannot be converted.
        ImportError: its library is not installed.
    """
    from dblocks.integrations.build import build
    from dblocks.integrations.convert import Task, convert
    from dblocks.integrations.example_inputs import example_inputs

    def made(task: Task, cut: BlocksConfig) -> Any:
        # Anew each time: a model that has been moved off the meta device cannot be converted.
        masked = cut.schedule.corruption == "masks"
        model = build(source)
        if dtype != torch.float32:
            model.to(dtype=dtype)
        return convert(model, cut, task=task, mask_token_id=0 if masked else None)

    build(source)  # an error of the config is raised once, not for each task
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
            # 1, as 0 may be the mask.
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
    """The first task and schedule that the model can be converted for, and the model in a block."""
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
    """Tensors made meanwhile have no data, though they count as the CPU's."""
    # transformers looks at positions for packed texts, of which a batch here has none; without
    # values it makes a mask for them, which a real step does not have.
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
    """The loss of a block at some noise levels; nothing is drawn."""
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
        # The state's noise without a seed that is drawn.
        given = model.target.check(batch)
        noise = torch.zeros(*batch["tokens"].shape, model.config.width)
        target = model.target.fixed()
        return target.next_loss(model._plain_features(given, target, steps, noise), given)
    return model.next_token_loss(batch)


def _length(length: int | None, longest: int) -> int:
    if length is not None and not 1 <= length <= longest:
        raise ValueError(
            f"tokens must be from 1 to {longest}, which the network takes, got {length}"
        )
    return min(longest, LENGTH) if length is None else length


def _of_image(length: int | None, name: str) -> int:
    """What an image counts as, 1; it has no length to choose."""
    if length is not None:
        raise ValueError(
            f"--tokens must be left out for {name}, whose samples are images, got {length}; sizes "
            "of the network say how large they are"
        )
    return 1
