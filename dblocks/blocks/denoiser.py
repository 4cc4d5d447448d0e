"""One block as a denoiser: its training loss, and its prediction under a condition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dblocks.blocks.config import BlocksConfig
from dblocks.blocks.draws import Draw as Draw
from dblocks.blocks.draws import draw_levels, part_of
from dblocks.blocks.model import BlockModel, Divisible
from dblocks.blocks.parameters import warn_of_frozen_zeros
from dblocks.blocks.sharding import Replicas, replicas_of, within
from dblocks.blocks.sigmas import check_sigma, sigma_for
from dblocks.blocks.targets.base import Batch, Target
from dblocks.blocks.targets.entries import check_call, checked, scored_shape
from dblocks.blocks.visits import Residency
from dblocks.blocks.weighting import loss_factors as loss_factors
from dblocks.config import check_block, check_finite
from dblocks.kernels.reference import in_forward_mode
from dblocks.schedules import Schedule
from dblocks.schedules.random import draw_seed


class Loss(NamedTuple):
    """The loss of one block on one batch."""

    loss: Tensor
    """The number to minimise: the mean of `weight * losses`; 0-d float32."""
    losses: Tensor
    """The model's own losses, of the shape of sigma (L2: in F space)."""
    weight: Tensor
    """The factor of each loss."""
    sigma: Tensor
    """The levels drawn: sigma, or t where tokens are masked."""


class Denoiser(nn.Module):
    """Base of `DiffusionBlocks` and of the view of one block: loss and prediction.

    Subclasses define which networks and which layers they hold.
    """

    config: BlocksConfig
    base_model: BlockModel
    """The network, with the layers of all blocks or of one."""
    copies: nn.ModuleList | nn.ModuleDict
    """Private copies of the modules outside the layers, indexed by `block - 1`."""
    held: Mapping[int, slice]
    """The blocks held here, and the range of each one's layers in `base_model.layers`."""
    index: int | None = None
    """The only block held here; None if all are."""
    residency: Residency | None = None
    """Keeps one block at a time on a device, if set; see `dblocks.scale.resident`."""
    _zeros_looked_for = False

    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """The network that embeds and predicts for a block, and its layers, on the device."""
        # In a compiled graph the block is already on the device: the draw before it fetched it.
        if self.residency is not None and not torch.compiler.is_compiling():
            self.residency.acquire(block)
        return self.parts_at_rest(block)

    def parts_at_rest(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """As `parts`, but without moving them to the device."""
        asked = check_block(block, self.config.num_blocks)
        # By comparison, not lookup: in a compiled graph the index may be symbolic, and this
        # specialises it.
        found = [held for held in self.held if held == asked]
        if not found:
            raise ValueError(f"block must be {self.index}, the only one held here, got {asked}")
        model = self.copies._modules.get(str(found[0] - 1), self.base_model)
        layers = list(self.base_model.layers._modules.values())
        if len(layers) != (known := max(part.stop for part in self.held.values())):
            raise ValueError(
                f"layers must stay {known} as they were divided into blocks, got {len(layers)}; "
                "make the DiffusionBlocks anew"
            )
        layers = layers[self.held[found[0]]]
        if model is not self.base_model and isinstance(model, Divisible):
            model.follow_(self.base_model)
        return cast(BlockModel, model), cast(list[nn.Module], layers)

    def before_use(self) -> None:
        """A hook, called before a draw and before a condition is bound; does nothing here."""

    def extra_loss(self, batch: Batch, block: int, draw: Draw) -> Tensor | None:
        """A hook: a further loss, 0-d, that `loss_at` adds to the denoising loss; None for none."""
        return None

    def loss(
        self,
        batch: Batch,
        block: int | None = None,
        *,
        generator: torch.Generator | None = None,
        replicas: Replicas | None = None,
    ) -> Loss:
        """The training loss of one block; runs that block's layers only.

        Only `loss_at` compiles as one graph; this draws on the host first.

        Args:
            batch: what the network reads, such as {"images": ..., "labels": ...}.
            block: the block; the only one by default.
            generator: a CPU generator; one number drawn from it seeds sigma and the noise.
            replicas: as of `draw`.

        Raises:
            ValueError: `block` is out of range, the target refuses the batch, or nothing reads one
                of its entries.

        Warns:
            UserWarning: at the first call, if weights frozen by `shared="frozen"` are all zero,
                such as those of an output head, through which no gradient would pass.
        """
        block = self.index if block is None else block
        if block is None:
            raise ValueError("block must say which block's loss to take, got None")
        if self.config.shared == "frozen" and not self._zeros_looked_for:
            self._zeros_looked_for = True
            warn_of_frozen_zeros(self.base_model, stacklevel=2)
        model = self.parts(block)[0]
        given = checked(model, batch, model.target)
        drawn = self.draw(given, block, generator=generator, replicas=replicas)
        return self.loss_at(given, block, drawn)

    def forward(
        self,
        z: Tensor,
        sigma: Tensor,
        *,
        block: int | None = None,
        guidance_scale: float = 1.0,
        **cond: Any,
    ) -> Tensor:
        """The denoised estimate of the clean target from a noisy one.

        Args:
            z: noisy target [N, ...].
            sigma: its noise level: a number, 0-d, [N], or [N, S] for z [N, T, D], one for each of
                S segments of T/S tokens.
            block: the block to run; by default the only one held here, or the one that owns sigma,
                compared in the dtype of sigma; the host looks it up, which synchronises where sigma
                is on a GPU.
            guidance_scale: 1 is no guidance; see `Bound`.
            **cond: what the network's `embed_condition` reads, such as `images=`.

        Returns:
            denoised [N, ...], float32.

        Raises:
            ValueError: the levels belong to several blocks, `block` is out of range, or nothing
                reads one of the keywords.
        """
        block = self.index if block is None else block
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
        """As `forward`, but the prediction itself: logits, or F for an L2 target."""
        block = self.index if block is None else block
        return self.bind(guidance_scale=guidance_scale, **cond).logits(z, sigma, block=block)

    def bind(self, *, guidance_scale: float = 1.0, **cond: Any) -> Bound:
        """The denoiser with its condition bound, which is embedded once for all calls."""
        self.before_use()
        return Bound(self, cond, guidance_scale)

    def draw(
        self,
        batch: Batch,
        block: int,
        *,
        generator: torch.Generator | None = None,
        replicas: Replicas | None = None,
    ) -> Draw:
        """Draws a training step's seed on the CPU, and from it sigma on the device.

        Args:
            batch: what the network reads.
            block: the block to train.
            generator: a CPU generator, of which one number is drawn; if several processes share a
                batch, its state must be the same in all.
            replicas: the processes that share a batch; found here after `fully_shard` on this
                module, and by `train_step` for a `DistributedDataParallel`. Then sigma, drop and
                noise are drawn for the global batch: the batches of all processes in their order.

        Raises:
            ValueError: as in `loss`; or the batches of the processes differ in shape.
        """
        self.before_use()
        model, layers = self.parts(block)
        target = model.target
        given = checked(model, batch, target)
        shape = scored_shape(target, given)
        seed = draw_seed(generator)
        device = _device_of((*layers, cast(nn.Module, model)), batch)
        replicas = replicas_of(self) if replicas is None else replicas
        count = 1 if replicas is None else replicas.count
        sigma, drop = draw_levels(
            self.config.schedule, seed, (count * shape[0], *shape[1:]), block,
            self.config.num_blocks, overlap=self.config.overlap,
            top_share=top_share_of(self.config, target),
            condition_drop=getattr(model, "condition_drop", 0.0), device=device,
        )  # fmt: skip
        drawn = Draw(sigma, torch.full((), seed, dtype=torch.int64, device=device), drop)
        return drawn if replicas is None else part_of(drawn, given, block, target, shape, replicas)

    def loss_at(self, batch: Batch, block: int, draw: Draw) -> Loss:
        """The loss of a block at given random numbers; compiles as one graph."""
        if hasattr(type(self), "unshard"):  # fully_shard made its class one of FSDP's
            return within(self, self._loss_at)(batch, block, draw)
        return self._loss_at(batch, block, draw)

    def _loss_at(self, batch: Batch, block: int, draw: Draw) -> Loss:
        # First, so that its graph is freed before that of denoising is built.
        extra = self.extra_loss(batch, block, draw)
        model, layers = self.parts(block)
        config, target = self.config, model.target
        schedule: Schedule = config.schedule
        batch = checked(model, batch, target)
        level: Any = schedule.level(draw.sigma)
        y = target.embed(batch)
        seed = cast(Any, draw.seed_of(y))
        noised = schedule.corrupt(y, level, seed)
        condition = model.embed_condition(batch, draw.drop)
        features = model.features(model.run_layers(layers, noised.z_in, level, condition))
        losses = target.score(features, cast(Tensor, noised.z), level, y, seed, batch)
        if losses.shape != draw.sigma.shape:
            raise ValueError(
                f"score() of {type(target).__name__} must return one loss for each sigma, "
                f"{list(draw.sigma.shape)}, got {list(losses.shape)}; "
                "average over what shares a sigma, see dblocks.blocks.Target"
            )
        whole = draw.whole
        sigma = draw.sigma if whole is None else whole.sigma
        w = schedule.loss_weight(sigma, block, config.num_blocks, overlap=config.overlap)
        weight = loss_factors(config.weighting, target.loss_kind, w)
        weight = weight if whole is None else whole.here(weight, losses)
        loss = (weight * losses).mean()
        loss = loss if extra is None else loss + extra
        loss = loss if whole is None or whole.factor is None else loss * whole.factor
        return Loss(loss, losses, weight, draw.sigma)


class Bound:
    """A denoiser with a bound condition: `bound(z, sigma) -> denoised`, for k-diffusion samplers.

    The condition is embedded at the first call and kept for the following ones. With a
    `guidance_scale` g other than 1, the prediction is `uncond + g*(cond - uncond)`: of denoised
    estimates for the call itself, of logits for `logits`. At scales 1 and 0 it is exactly one of
    the two predictions, in one call of the network.
    """

    def __init__(self, denoiser: Denoiser, cond: Batch, guidance_scale: float = 1.0) -> None:
        model, _ = denoiser.parts(next(iter(denoiser.held)))
        check_call(model, cond, model.target)
        self.denoiser = denoiser
        self.cond = cond
        self.guidance_scale = check_finite("guidance_scale", guidance_scale)
        self._embedded: dict[tuple[int, bool], Any] = {}

    def __call__(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The estimate of y from z [N, ...] at sigma, 0-d, [N] or [N, S]; float32.

        With a `MaskSchedule`, z holds tokens and sigma is t; the estimate holds probabilities.
        """
        return self._guided(z, sigma, block, logits=False)

    def logits(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The prediction itself: logits, or F for an L2 target."""
        return self._guided(z, sigma, block, logits=True)

    def _guided(self, z: Tensor, sigma: Tensor, block: int | None, *, logits: bool) -> Tensor:
        schedule: Schedule = self.denoiser.config.schedule
        if z.is_complex():
            raise TypeError(f"z must be real, got {z.dtype}; pass real numbers as channels")
        z = schedule.state(z)
        if not isinstance(sigma, Tensor):
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        check_sigma(z, sigma, masks=schedule.corruption == "masks")
        # The block that owns a level is decided in the level's own dtype, before conversion.
        if block is None:
            block = self._owner(sigma)
        level = schedule.level(sigma_for(z, sigma))
        if self.guidance_scale in (0, 1):
            unconditional = self.guidance_scale == 0
            return self._predict(z, level, block, logits=logits, drop=unconditional)
        given = self._predict(z, level, block, logits=logits, drop=False)
        null = self._predict(z, level, block, logits=logits, drop=True)
        return null + self.guidance_scale * (given - null)

    def _predict(self, z: Tensor, level: Any, block: int, *, logits: bool, drop: bool) -> Tensor:
        predict = within(self.denoiser, self._predict_whole)
        return predict(z, level, block, logits=logits, drop=drop)

    def _predict_whole(
        self, z: Tensor, level: Any, block: int, *, logits: bool, drop: bool
    ) -> Tensor:
        model, layers = self.denoiser.parts(block)
        z_in = self.denoiser.config.schedule.scale_in(z, level)
        condition = self._condition(model, z, drop)
        with attention_with_tangents():
            features = model.features(model.run_layers(layers, z_in, level, condition))
            prediction = model.target.predict(features, z, level)
        return prediction if logits else model.target.denoise(prediction, z, level)

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


def attention_with_tangents() -> AbstractContextManager:
    """Selects PyTorch's math attention in forward-mode differentiation, which no other supports."""
    return sdpa_kernel(SDPBackend.MATH) if in_forward_mode() else nullcontext()


def unwrapped(model: Any) -> Any:
    """The `Denoiser` inside torch.compile's, AveragedModel's or DDP's wrapper, else `model`."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Denoiser):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return inner if isinstance(inner, Denoiser) else model


def top_share_of(config: BlocksConfig, target: Target) -> float:
    """The fraction of a block's draws at the highest level."""
    return target.top_share if config.top_share == "auto" else config.top_share


def _device_of(modules: Iterable[nn.Module], batch: Batch) -> torch.device:
    """Where the first parameter is, or else the first tensor of the batch, or else the CPU."""
    parameters = chain.from_iterable(module.parameters() for module in modules)
    given = (value for value in batch.values() if isinstance(value, Tensor))
    first = next(chain(parameters, given), None)
    return torch.device("cpu") if first is None else first.device
