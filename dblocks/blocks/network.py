"""Cutting a residual network into blocks that are trained one at a time.

A block is a run of layers together with a range of noise levels: block b denoises the levels that
it owns, so training it runs, and keeps gradients for, its own layers only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks.blocks.config import BlocksConfig as BlocksConfig
from dblocks.blocks.config import Weighting as Weighting
from dblocks.blocks.denoiser import Bound as Bound
from dblocks.blocks.denoiser import Denoiser as Denoiser
from dblocks.blocks.denoiser import Draw as Draw
from dblocks.blocks.denoiser import Loss as Loss
from dblocks.blocks.denoiser import check_trained_at_top as check_trained_at_top
from dblocks.blocks.denoiser import loss_factors as loss_factors
from dblocks.blocks.denoiser import trained_at_top as trained_at_top
from dblocks.blocks.denoiser import unwrapped as unwrapped
from dblocks.blocks.model import Batch as Batch
from dblocks.blocks.model import BlockModel as BlockModel
from dblocks.blocks.model import Divisible, check_model
from dblocks.config import check_block


class DiffusionBlocks(Denoiser):
    """A residual network as `num_blocks` denoisers, each of its own layers and noise levels.

    Called as k-diffusion calls a model, `model(z, sigma, **cond) -> denoised`; each call runs the
    layers of one block.

    Shared parameters (all outside `layers`) follow `config.shared`: "train" trains them with every
    block's step; "frozen" keeps them as they are, which suits a pretrained network only; "private"
    gives every block its own copy, except that the target embedding is common and frozen, since
    all blocks must mean the same target. Freezing is `requires_grad_(False)` on the network itself
    and lasts: for a second configuration give a `copy.deepcopy` of it, or `requires_grad_(True)`
    first.

    Args:
        model: a network with the four parts of `BlockModel`; its parameters are used, not copied.
        config: how it is cut.

    Warns:
        UserWarning: parameters that an earlier `DiffusionBlocks` froze would train here.

    Source: Shing, Koyama and Akiba 2026, arXiv 2506.14202.
    """

    def __init__(self, model: BlockModel, config: BlocksConfig) -> None:
        super().__init__()
        check_model(model)
        _check_loss_kind(model, config)
        self.config = config
        self.layer_ranges = config.layer_ranges(len(model.layers))
        self.base_model = model
        self.copies = nn.ModuleList()
        if config.shared != "train":
            for parameter in self.shared_parameters():
                parameter.requires_grad_(False)
        _check_frozen(model, config.shared, {id(p) for p in self.shared_parameters()})
        if config.shared == "private":
            self.copies.extend(_without_layers(model) for _ in range(1, config.num_blocks))

    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """The model that embeds and reads out for a block, and the block's layers."""
        block = check_block(block, self.config.num_blocks)
        first, last = self.layer_ranges[block]
        return self._model_of(block), list(self.base_model.layers)[first:last]

    def loss(self, batch: Batch, block: int, *, generator: torch.Generator | None = None) -> Loss:
        """The training loss of one block; runs that block's layers only.

        Only `loss_at` compiles as one graph; this draws on the host first.

        Args:
            batch: what the model's parts read, such as {"images": ..., "labels": ...}.
            block: the block.
            generator: a CPU generator; one number drawn from it seeds sigma and the noise.

        Raises:
            ValueError: `block` is out of range.
        """
        return self.loss_at(batch, block, self.draw(batch, block, generator=generator))

    def forward(
        self,
        z: Tensor,
        sigma: Tensor,
        *,
        block: int | None = None,
        guidance_scale: float = 1.0,
        **cond: Any,
    ) -> Tensor:
        """The estimate of the clean target from a noisy one.

        Args:
            z: noisy target [N, ...].
            sigma: its noise level: a number, 0-d, [N], or [N, S] for z [N, T, D], one for each of
                S segments of T/S tokens.
            block: the block to run; by default the one that owns sigma, compared in the dtype of
                sigma; the host looks it up, which synchronises where sigma is on a GPU.
            guidance_scale: 1 is no guidance; see `Bound`.
            **cond: what the model's `embed_condition` reads, such as `images=`.

        Returns:
            denoised [N, ...], float32.

        Raises:
            ValueError: the levels belong to several blocks, or `block` is out of range.
        """
        return self.bind(guidance_scale=guidance_scale, **cond)(z, sigma, block=block)

    def logits(
        self,
        z: Tensor,
        sigma: Tensor,
        *,
        block: int | None = None,
        guidance_scale: float = 1.0,
        **cond: Any,
    ) -> Tensor:
        """As `forward`, but the model's prediction itself: logits, or F for an L2 model."""
        return self.bind(guidance_scale=guidance_scale, **cond).logits(z, sigma, block=block)

    def block(self, block: int) -> Block:
        """The view of one block: what one worker trains and saves."""
        return Block(self, block)

    def block_parameters(self, block: int) -> Iterator[nn.Parameter]:
        """The parameters that belong to one block alone."""
        model, layers = self.parts(block)
        yield from (p for layer in layers for p in layer.parameters())
        if self.config.shared == "private":
            frozen = _parameters_of(model.target_embedding)
            yield from (p for p in _outside_layers(model) if id(p) not in frozen)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that all blocks use."""
        if self.config.shared == "private":
            if self.base_model.target_embedding is not None:
                yield from self.base_model.target_embedding.parameters()
        else:
            yield from _outside_layers(self.base_model)

    def print_blocks(self) -> None:
        """Prints each block's layers, levels (sigma, or t of masks) and parameters."""
        symbol = self.config.schedule.symbol
        print(f"{'block':>5} {'layers':>8} {symbol:>20} {'parameters':>12}")
        for b, (first, last) in enumerate(self.layer_ranges):
            lo, hi = self.config.schedule.range_of(b, self.config.num_blocks)
            count = sum(p.numel() for p in self.block_parameters(b))
            print(f"{b:>5} {f'{first}-{last - 1}':>8} {f'{hi:.4g} to {lo:.4g}':>20} {count:>12,}")
        print(
            f"{'all':>5} {'':>8} {'':>20} {sum(p.numel() for p in self.shared_parameters()):>12,}"
        )

    def _model_of(self, block: int) -> BlockModel:
        if block == 0 or self.config.shared != "private":
            return self.base_model
        return cast(BlockModel, self.copies[block - 1])


class Block(Denoiser):
    """One block of a `DiffusionBlocks`: the same tensors, without the other blocks' layers.

    Its state_dict keys are those of the whole network, so that a worker's checkpoint loads there
    with `strict=False`.

    Args:
        whole: the network.
        block: which of its blocks.
    """

    def __init__(self, whole: DiffusionBlocks, block: int) -> None:
        super().__init__()
        self.config = whole.config
        self.index = block = check_block(block, whole.config.num_blocks)
        model, layers = whole.parts(block)
        first = whole.layer_ranges[block][0]
        named = {str(first + k): layer for k, layer in enumerate(layers)}
        self.base_model = _with_layers(whole.base_model, named, shared=model is whole.base_model)
        self.copies = nn.ModuleDict()
        if model is not whole.base_model:
            self.copies[str(block - 1)] = cast(nn.Module, model)

    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """The model that embeds and reads out, and the layers; of this block only."""
        if block != self.index:
            raise ValueError(f"block must be {self.index}, the only one held here, got {block}")
        model = next(iter(self.copies.values()), self.base_model)
        return cast(BlockModel, model), list(cast(nn.Module, self.base_model.layers).children())

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        """The training loss of this block; see `DiffusionBlocks.loss`."""
        return self.loss_at(batch, self.index, self.draw(batch, self.index, generator=generator))

    def forward(
        self, z: Tensor, sigma: Tensor, *, guidance_scale: float = 1.0, **cond: Any
    ) -> Tensor:
        """The estimate of the clean target; see `DiffusionBlocks.forward`."""
        return self.bind(guidance_scale=guidance_scale, **cond)(z, sigma, block=self.index)


def _check_loss_kind(model: BlockModel, config: BlocksConfig) -> None:
    schedule = config.schedule
    if model.loss_kind not in schedule.loss_kinds:
        raise ValueError(
            f"loss_kind of {type(model).__name__} must be one of {schedule.loss_kinds} with a "
            f"{type(schedule).__name__}, got {model.loss_kind!r}; "
            "tokens that are masked need a MaskSchedule, all else a NoiseSchedule"
        )


def _check_frozen(model: BlockModel, shared: str, shared_ids: set[int]) -> None:
    """Warns of parameters that an earlier configuration froze and this one would train."""
    if shared != "frozen" and getattr(model, "_frozen_by_blocks", False):
        kept = shared_ids if shared == "private" else set()
        outside = (p for p in _outside_layers(model) if id(p) not in kept)
        count = sum(not p.requires_grad for p in outside)
        if count:
            warnings.warn(
                f"shared={shared!r} trains all parameters, got {count} outside the layers that an "
                "earlier DiffusionBlocks of this network froze; call requires_grad_(True) on it "
                "first, or give each configuration a copy.deepcopy of it",
                UserWarning,
                stacklevel=3,
            )
    if shared != "train":
        model._frozen_by_blocks = True  # pyright: ignore[reportAttributeAccessIssue]


def _without_layers(model: BlockModel) -> nn.Module:
    if isinstance(model, Divisible):
        return model.without_layers()
    return copy.deepcopy(cast(nn.Module, model), {id(model.layers): nn.ModuleList()})


def _with_layers(model: BlockModel, layers: dict[str, nn.Module], *, shared: bool) -> nn.Module:
    """A view of `model` that holds these layers only, and the same other tensors or none."""
    if isinstance(model, Divisible):
        return model.with_layers(layers, shared=shared)
    view = copy.copy(cast(nn.Module, model)) if shared else nn.Module()
    view._modules = dict(view._modules)
    view.layers = nn.ModuleDict(layers)
    return view


def _parameters_of(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(p) for p in module.parameters()}


def _outside_layers(model: BlockModel) -> Iterator[nn.Parameter]:
    inside = _parameters_of(model.layers)
    yield from (p for p in cast(nn.Module, model).parameters() if id(p) not in inside)
