"""One block as a denoiser: its training loss, and its prediction under a condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dblocks.blocks.config import BlocksConfig, Weighting
from dblocks.blocks.model import Batch, BlockModel
from dblocks.kernels.reference import in_forward_mode
from dblocks.schedules import Schedule
from dblocks.schedules.random import draw_seed

# Weighting "clamped": w reaches 250,000 at the lowest noise, which would outweigh all else.
CLAMPED_WEIGHT_MAX = 20.0
LEVEL_KEY = 0x5DEECE66D  # any number but 0


class Loss(NamedTuple):
    """The loss of one block on one batch."""

    loss: Tensor
    """The number to minimise: the mean of `weight * losses`; 0-d float32."""
    losses: Tensor
    """The model's own losses, of the shape of sigma (L2: in F space)."""
    weight: Tensor
    """What each was multiplied with."""
    sigma: Tensor
    """The levels drawn: sigma, or t where tokens are masked."""


class Draw(NamedTuple):
    """The random numbers of one training step, on the device."""

    sigma: Tensor
    """float32 levels [N] (or [N, T]): sigma, or t where tokens are masked."""
    seed: Tensor
    """0-d int64: seed of the noise or the masks."""
    drop: Tensor | None
    """bool [N]: whose condition is dropped; None where the model never drops."""


class Denoiser(nn.Module, ABC):
    """What `DiffusionBlocks` and the view of one block have in common: loss and prediction.

    Subclasses say which model and which layers belong to a block.
    """

    config: BlocksConfig

    @abstractmethod
    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """The model that embeds and reads out for a block, and the block's layers."""

    def bind(self, *, guidance_scale: float = 1.0, **cond: Any) -> Bound:
        """The denoiser with its condition, which is embedded once for all calls."""
        return Bound(self, cond, guidance_scale)

    def draw(self, batch: Batch, block: int, *, generator: torch.Generator | None = None) -> Draw:
        """Draws a training step's seed on the CPU, and from it sigma on the device.

        Args:
            batch: what the model's parts read.
            block: the block to train.
            generator: a CPU generator, of which one number is drawn.
        """
        model, layers = self.parts(block)
        seed = draw_seed(generator)
        device = _device_of((*layers, cast(nn.Module, model)), batch)
        # The generator of a GPU is Philox too: under the same key, sigma would be made of the same
        # bits as the first elements' noise.
        key = seed if device.type == "cpu" else seed ^ LEVEL_KEY
        on_device = torch.Generator(device).manual_seed(key)
        shape = model.sigma_shape(batch)
        sigma = self.config.schedule.sample(
            block, self.config.num_blocks, shape,
            overlap=self.config.overlap, top_share=self.config.top_share_for(model.loss_kind),
            generator=on_device, device=device,
        )  # fmt: skip
        drop = None
        if model.condition_drop > 0:
            uniform = torch.rand(shape[0], generator=on_device, device=device)
            drop = uniform < model.condition_drop
        return Draw(sigma, torch.full((), seed, dtype=torch.int64, device=device), drop)

    def loss_at(self, batch: Batch, block: int, draw: Draw) -> Loss:
        """The loss of a block at given random numbers; compiles as one graph."""
        model, layers = self.parts(block)
        config = self.config
        schedule: Schedule = config.schedule
        level: Any = schedule.level(draw.sigma)
        y = model.embed_target(batch)
        noised = schedule.corrupt(y, level, draw.seed)
        condition = model.embed_condition(batch, draw.drop)
        hidden = model.run_layers(layers, noised.z_in, level, condition)
        losses = model.score(hidden, cast(Tensor, noised.z), level, y, draw.seed, batch)
        if losses.shape != draw.sigma.shape:
            raise ValueError(
                f"score() of {type(model).__name__} must return one loss for each sigma, "
                f"{list(draw.sigma.shape)}, got {list(losses.shape)}; "
                "average over what shares a sigma, see dblocks.blocks.BlockModel"
            )
        w = schedule.loss_weight(draw.sigma, block, config.num_blocks, overlap=config.overlap)
        weight = loss_factors(config.weighting, model.loss_kind, w)
        return Loss((weight * losses).mean(), losses, weight, draw.sigma)


class Bound:
    """A denoiser with its condition: `bound(z, sigma) -> denoised`, for any k-diffusion sampler.

    The condition is embedded at the first call and kept for the following ones. With a
    `guidance_scale` g other than 1, the prediction is `uncond + g*(cond - uncond)`: of denoised
    estimates for the call itself, of logits for `logits`. Scales 1 and 0 are one of the two
    predictions, exactly and in one call of the network.
    """

    def __init__(self, denoiser: Denoiser, cond: Batch, guidance_scale: float = 1.0) -> None:
        self.denoiser = denoiser
        self.cond = cond
        self.guidance_scale = guidance_scale
        self._embedded: dict[tuple[int, bool], Any] = {}

    def __call__(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The estimate of y from z [N, ...] at sigma, 0-d, [N] or [N, S]; float32.

        With a `MaskSchedule`, z are tokens and sigma is t; the estimate are probabilities.
        """
        return self._guided(z, sigma, block, logits=False)

    def logits(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The model's prediction itself: logits, or F for a model with an L2 loss."""
        return self._guided(z, sigma, block, logits=True)

    def _guided(self, z: Tensor, sigma: Tensor, block: int | None, *, logits: bool) -> Tensor:
        schedule: Schedule = self.denoiser.config.schedule
        z = schedule.state(z)
        if not isinstance(sigma, Tensor):
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        _check_sigma(z, sigma)
        # A level belongs to a block in its own dtype, before it is converted.
        if block is None:
            block = self._owner(sigma)
        level = schedule.level(_sigma_for(z, sigma))
        if self.guidance_scale in (0, 1):
            unconditional = self.guidance_scale == 0
            return self._predict(z, level, block, logits=logits, drop=unconditional)
        given = self._predict(z, level, block, logits=logits, drop=False)
        null = self._predict(z, level, block, logits=logits, drop=True)
        return null + self.guidance_scale * (given - null)

    def _predict(self, z: Tensor, level: Any, block: int, *, logits: bool, drop: bool) -> Tensor:
        model, layers = self.denoiser.parts(block)
        z_in = self.denoiser.config.schedule.scale_in(z, level)
        condition = self._condition(model, z, drop)
        with attention_with_tangents():
            hidden = model.run_layers(layers, z_in, level, condition)
            prediction = model.read_out(hidden, z, level)
        return prediction if logits else model.denoise(prediction, z, level)

    def _condition(self, model: BlockModel, z: Tensor, drop: bool) -> Any:
        # With private parameters each block embeds the condition itself.
        key = (id(model), drop)
        if key not in self._embedded:
            mask = torch.ones(len(z), dtype=torch.bool, device=z.device) if drop else None
            self._embedded[key] = model.embed_condition(self.cond, mask)
        return self._embedded[key]

    def _owner(self, sigma: Tensor) -> int:
        config = self.denoiser.config
        if sigma.numel() == 0:
            return 0
        first, last = torch.aminmax(config.schedule.block_of(sigma, config.num_blocks))
        if first != last:
            raise ValueError(
                f"sigma must lie in one block, got levels of blocks {int(first)} to {int(last)}; "
                "make one call per block"
            )
        return int(first)


def loss_factors(weighting: Weighting, loss_kind: str, w: Tensor) -> Tensor:
    """What each sample's loss is multiplied with.

    `edm` is w_i, `clamped` min(w_i, 20), `none` 1 and `batch_mean` the mean of w, each on the loss
    of the denoised estimate. An L2 loss in F space already carries w_i, which is divided out.

    Args:
        weighting: the rule; `auto` is w_i for "l2" and "masked_cross_entropy", and `none` for
            "cross_entropy".
        loss_kind: "l2", "cross_entropy" or "masked_cross_entropy".
        w: the schedule's loss weights, of the shape of sigma.
    """
    if weighting == "auto":
        weighting = "none" if loss_kind == "cross_entropy" else "edm"
    if weighting == "edm":
        return torch.ones_like(w) if loss_kind == "l2" else w
    if weighting == "clamped":
        factor = w.clamp(max=CLAMPED_WEIGHT_MAX)
    elif weighting == "batch_mean":
        factor = w.mean().expand_as(w)
    else:
        factor = torch.ones_like(w)
    return factor / w if loss_kind == "l2" else factor


def check_trained_at_top(model: Denoiser) -> None:
    """Raises unless every block was trained at the highest level."""
    config = model.config
    if config.num_blocks > 1 and not trained_at_top(model):
        raise ValueError(
            "the product of blocks needs blocks that were all trained at sigma_max, got "
            "BlocksConfig.top_share = 0; train with a top_share such as .6, or use the first block"
        )


def trained_at_top(model: Denoiser) -> bool:
    """Whether blocks after the first one were trained at the highest level too."""
    return model.config.top_share_for(model.parts(0)[0].loss_kind) > 0


def attention_with_tangents() -> AbstractContextManager:
    """In forward-mode differentiation, PyTorch's attention in the form that alone can take part."""
    return sdpa_kernel(SDPBackend.MATH) if in_forward_mode() else nullcontext()


def unwrapped(model: Any) -> Any:
    """The `Denoiser` inside torch.compile's, AveragedModel's or DDP's wrapper, else `model`."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Denoiser):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return inner if isinstance(inner, Denoiser) else model


def _device_of(modules: Iterable[nn.Module], batch: Batch) -> torch.device:
    """Where the first parameter is, or else the first tensor of the batch, or else the CPU."""
    parameters = chain.from_iterable(module.parameters() for module in modules)
    given = (value for value in batch.values() if isinstance(value, Tensor))
    first = next(chain(parameters, given), None)
    return torch.device("cpu") if first is None else first.device


def _check_sigma(z: Tensor, sigma: Tensor) -> None:
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point, got {sigma.dtype}; convert it first")
    if sigma.ndim == 0 or sigma.shape == z.shape[:1]:
        return
    if sigma.ndim != 2 or len(sigma) != len(z):
        raise ValueError(
            f"sigma must be a number or have shape [N] = [{len(z)}] or [N, S] = [{len(z)}, S], "
            f"got {list(sigma.shape)}; give each sample its level"
        )
    S = sigma.shape[1]
    if z.ndim != 3 or S == 0 or z.shape[1] % S:
        raise ValueError(
            "z must have shape [N, T, D] with T a multiple of S where sigma is [N, S] = "
            f"{list(sigma.shape)}, got {list(z.shape)}; reshape z, or give sigma [N]"
        )


def _sigma_for(z: Tensor, sigma: Tensor) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    if sigma.ndim == 0:
        # Filling in a number from the host does not synchronise, copying it would.
        if sigma.device.type == "cpu" and z.device.type != "cpu":
            return torch.full((len(z),), sigma.item(), dtype=dtype, device=z.device)
        sigma = sigma.expand(len(z))
    return sigma.to(z.device, dtype)
