"""One block as a denoiser: the random numbers of a training step, its loss, and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks.bound import Predictions
from dblocks.blocks.changes import HOOKS, Seen, follow_changes_
from dblocks.blocks.config import BlocksConfig, Weighting
from dblocks.blocks.model import BlockModel, Divisible
from dblocks.blocks.parameters import warn_of_frozen_zeros
from dblocks.blocks.sharding import GlobalBatch, Replicas, global_batch, replicas_of, within
from dblocks.blocks.targets.base import Batch, Target
from dblocks.blocks.targets.entries import check_scored, checked, scored_shape
from dblocks.blocks.visits import Visits
from dblocks.config import check_block
from dblocks.schedules import Schedule
from dblocks.schedules.random import draw_seed

# Weighting "clamped": w reaches 250,000 at the lowest noise, which would dominate the loss.
CLAMPED_WEIGHT_MAX = 20.0
_LOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
LEVEL_KEY = 0x5DEECE66D  # any number but 0


class Draw(NamedTuple):
    """The random numbers of one training step, on the device."""

    sigma: Tensor
    """float32 levels [N] (or [N, T]): sigma, or t where tokens are masked."""
    seed: Tensor
    """0-d int64: seed of the noise or the masks."""
    drop: Tensor | None
    """bool [N]: true where the condition is dropped; None if the model never drops it."""
    whole: GlobalBatch | None = None
    """The global batch that these samples are part of; None if they are all of it."""

    def seed_of(self, y: Tensor) -> Tensor | F.OffsetSeed:
        """The seed of the noise of a target [N, ...], offset by the first sample here."""
        if self.whole is None:
            return self.seed
        return F.OffsetSeed(self.seed, self.whole.first * (y.numel() // max(len(y), 1)))

    def part(self, whole: GlobalBatch, N: int) -> Draw:
        """The part of a draw for the global batch that belongs to the N samples of this process."""
        here = slice(whole.first, whole.first + N)
        drop = None if self.drop is None else self.drop[here]
        return Draw(self.sigma[here], self.seed, drop, whole)


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


class Denoiser(Predictions, nn.Module):
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
    loaded: int | None = None
    """The only block with weights, of a network that was made without the others."""
    residency: Visits | None = None
    """Keeps one block at a time on a device, if set; see `dblocks.scale.resident`."""
    changes = 0
    """How often the network was changed since it was divided; a compiled graph is made anew."""
    _zeros_looked_for = False

    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """The network that embeds and predicts for a block, and its layers, on the device."""
        # In a compiled graph the block is already on the device: the draw before it fetched it.
        if self.residency is not None and not torch.compiler.is_compiling():
            self.residency.acquire(block)
        if self.changes < 0:  # never: a graph is guarded by what it reads, and not by hooks
            raise RuntimeError("changes must count up")
        return self.parts_at_rest(block)

    def parts_at_rest(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """As `parts`, but without moving them to the device."""
        block = self.held_block(block)
        model = self.copies._modules.get(str(block - 1), self.base_model)
        layers = list(self.base_model.layers._modules.values())
        if len(layers) != (known := max(part.stop for part in self.held.values())):
            raise ValueError(
                f"layers must stay {known} as they were divided into blocks, got {len(layers)}; "
                "create the DiffusionBlocks again"
            )
        layers = layers[self.held[block]]
        if model is not self.base_model and isinstance(model, Divisible):
            model.follow_(self.base_model)
        return cast(BlockModel, model), cast(list[nn.Module], layers)

    def any_block(self) -> int:
        """A block that is here, to read what all have in common."""
        return next(iter(self.held)) if self.loaded is None else self.loaded

    def held_block(self, block: int) -> int:
        """`block` as an int, which must be one that is held here.

        Raises:
            TypeError: it is no integer.
            ValueError: it is out of range, or held elsewhere.
        """
        asked = block if type(block) is int else check_block(block, self.config.num_blocks)
        # By comparison, not lookup: in a compiled graph the index may be symbolic, and this
        # specialises it.
        found = [b for b in self.held if b == asked and self.loaded in (None, b)]
        if not found:
            check_block(asked, self.config.num_blocks)
            only = self.index if self.loaded is None else self.loaded
            raise ValueError(f"block must be {only}, the only one held here, got {asked}")
        return found[0]

    @property
    def sharded(self) -> bool:
        """Whether `fully_shard` was called on it, which makes its class one of FSDP's."""
        return hasattr(type(self), "unshard")

    def before_use(self) -> None:
        """Called before a draw and before a condition is bound; calls that of the network."""
        self.follow_changes_()
        self.ready_()

    def ready_(self) -> None:
        """A hook of `before_use`, after changes of the network were taken over."""
        before_use = getattr(type(self.base_model), "before_use", None)
        if before_use is not None:
            before_use(self.base_model)

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]  # imports no compiler
    def prepare(self) -> None:
        """What needs the host before a block runs; outside of graphs, in each call."""
        self.before_use()
        self.follow_originals_()

    def follow_changes_(self) -> None:
        """Looks whether the network was changed, which it takes over or refuses by name.

        Raises:
            ValueError: blocks would not notice the change.
        """
        look = [*_look_at(self.watched()), *self.settings()]
        # What counts as a change is looked at closer, and seldom.
        if _LOOKS.get(self) != look:
            self.changes += follow_changes_(self, self.watched(), self.take_changes)
            _LOOKS[self] = look

    def settings(self) -> Iterable[Any]:
        """A hook: what else the network reads in calls, to be compared."""
        return ()

    def watched(self) -> list[nn.Module]:
        """The modules whose changes are followed, with all that they hold."""
        return [cast(nn.Module, self.base_model), *self.copies.children()]

    def take_changes(self, before: Seen | None, now: Seen) -> None:
        """Takes over what was changed in the network, or refuses it; nothing is changed then.

        Args:
            before: what it consisted of; None if that is not known.
            now: what it consists of.
        """

    def follow_originals_(self) -> None:
        """Brings private copies of a network's modules up to date with changes of it."""
        if not torch.compiler.is_compiling():
            for copied in self.copies.children():
                if isinstance(copied, Divisible):
                    # What is resident travels by itself.
                    copied.follow_original_(moved=self.residency is None)

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
            ValueError: `block` is out of range, the target refuses the batch, nothing of it is
                scored, or nothing reads one of its entries.

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
        self.prepare()
        model = self.parts(block)[0]
        given = checked(model, batch, model.target)
        drawn = self._draw(given, block, generator, replicas)
        return self.loss_at(given, block, drawn)

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
        self.prepare()
        return self._draw(batch, block, generator, replicas)

    def _draw(
        self,
        batch: Batch,
        block: int,
        generator: torch.Generator | None,
        replicas: Replicas | None,
    ) -> Draw:
        model, layers = self.parts(block)
        target = model.target
        given = checked(model, batch, target)
        shape = scored_shape(target, given)
        if replicas is None and self.sharded:
            replicas = replicas_of(self)
        scored = target.scored(given)
        if replicas is None:
            check_scored(scored)
        seed = draw_seed(generator)
        device = _device_of((*layers, cast(nn.Module, model)), batch)
        N = shape[0] if replicas is None else shape[0] * replicas.count
        # The generator of a GPU is Philox too: with the same key, sigma would come from the
        # same bits as the noise of the first elements.
        key = seed if device.type == "cpu" else seed ^ LEVEL_KEY
        on_device = torch.Generator(device).manual_seed(key)
        sigma = self.config.schedule.sample(
            block, self.config.num_blocks, (N, *shape[1:]), overlap=self.config.overlap,
            top_share=top_share_of(self.config, target), generator=on_device, device=device,
        )  # fmt: skip
        drop, share = None, getattr(model, "condition_drop", 0.0)
        if share > 0:
            drop = torch.rand(N, generator=on_device, device=device) < share
        drawn = Draw(sigma, torch.full((), seed, dtype=torch.int64, device=device), drop)
        if replicas is None:
            return drawn
        whole = global_batch(sigma, given, shape[0], block, scored, replicas)
        return drawn.part(whole, shape[0])

    def loss_at(self, batch: Batch, block: int, draw: Draw) -> Loss:
        """The loss of a block at given random numbers; compiles as one graph."""
        if self.sharded:
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


def unwrapped(model: Any) -> Any:
    """The `Denoiser` inside torch.compile's, AveragedModel's or DDP's wrapper, else `model`."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Denoiser):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return inner if isinstance(inner, Denoiser) else model


def _look_at(models: Iterable[nn.Module]) -> list[Any]:
    """What a change of the models changes; as quick as can be, since each loss takes it."""
    look: list[Any] = []
    met: set[int] = set()
    pending: list[Any] = [*models]
    while pending:
        module = pending.pop()
        if module is None or id(module) in met:
            continue
        met.add(id(module))
        own, kind = module.__dict__, type(module)
        # A scripted module's class has none.
        look += ref(module), kind, getattr(kind, "forward", None), id(own.get("forward"))
        look += map(id, own["_parameters"].values())
        for name in HOOKS:
            look += own[name]
        pending += own["_modules"].values()
    return look


def loss_factors(weighting: Weighting, loss_kind: str, w: Tensor) -> Tensor:
    """The factor of each sample's loss.

    `edm` is w_i, `clamped` min(w_i, 20), `none` 1 and `batch_mean` the mean of w, each for the loss
    of the denoised estimate. An L2 loss in F space already includes w_i, which is divided out.

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


def top_share_of(config: BlocksConfig, target: Target) -> float:
    """The fraction of a block's draws at the highest level."""
    return target.top_share if config.top_share == "auto" else config.top_share


def _device_of(modules: Iterable[nn.Module], batch: Batch) -> torch.device:
    """Where the first parameter is, or else the first tensor of the batch, or else the CPU."""
    parameters = chain.from_iterable(module.parameters() for module in modules)
    given = (value for value in batch.values() if isinstance(value, Tensor))
    first = next(chain(parameters, given), None)
    return torch.device("cpu") if first is None else first.device
