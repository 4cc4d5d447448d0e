"""The base class of trainers: steps and optimizers, in blocks and end to end.

End-to-end and block-wise training share the data, its order, the optimizer, the learning rate
schedule and the evaluation, so that runs are comparable. If a network is a denoiser in both cases,
end to end means one block of all layers; other networks are trained end to end without noise
levels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.blocks.training import not_finite
from dblocks.recipes.averages import exchange, keep_average, without_average_kept
from dblocks.recipes.data.batches import Batch, Data
from dblocks.recipes.run import Run
from dblocks.scale import Residency, build_block, data_parallel, resident
from dblocks.scale.mesh import mean
from dblocks.scale.shards import OutlinedBlock
from dblocks.scale.sharing import average_shared, join_owners
from dblocks.schedules.random import draw_seed

BLOCK_SEED = 2**31  # added to a run's seed to draw blocks and noise levels


class Trainer(ABC):
    """Trains a network: `step` trains it on a batch, in blocks or end to end.

    Args:
        run: options of the run.
        data: the source of batches.
        make: creates the network, which has its residual layers in `layers`.
        config: the configuration of blocks; end to end, one block, or None for networks without
            noise levels.
        end_to_end_loss: the 0-d loss of a network and a batch, for end-to-end training without
            noise levels.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        make: Callable[[], nn.Module],
        config: Callable[[], BlocksConfig] | None,
        end_to_end_loss: Callable[[Any, Batch], Tensor] | None = None,
    ) -> None:
        self.run, self.batches = run, data
        self.end_to_end_loss = end_to_end_loss if run.end_to_end else None
        self.config = None
        if config is not None and self.end_to_end_loss is None:
            self.config = self._shared_as_asked(config())
        self._outlined: OutlinedBlock | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.network, self.model = self._made(make)
        self.mesh: Any = None
        """The processes that train together, each on a part of the batch; None for one process."""
        self.parallel: Any = None
        """The model passed to `train_step`, possibly wrapped for several processes."""
        self.residency: Residency | None = None
        self.shows_progress = False
        """Whether long evaluations show progress bars."""
        self.continued: list[list[int]] = []
        """Where the run was resumed with another number of steps; see `Progress`."""
        if not run.resident and run.sharding != "fsdp":
            self.trained.to(run.device)
        # The optimizer of an outlined block is created with its weights.
        self.block_optimizers = (
            None
            if self.model is None or self._outlined is not None
            else make_optimizers(self.model, self._adamw)
        )
        whole = self._adamw(list(self.network.parameters())) if self.model is None else None
        self.optimizers: list[Optimizer] = [whole] if whole else list(self.block_optimizers or ())
        # Independent of the random numbers of the weights and of the order of the data.
        self.generator = torch.Generator().manual_seed(BLOCK_SEED + run.seed)

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Evaluates a point of the curve; returns JSON values."""

    @abstractmethod
    def progress(self, point: dict[str, Any]) -> str:
        """A short text of a point of the curve, for the progress bar."""

    @abstractmethod
    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Results of the trained network as JSON values; `last` is its last measurement."""

    def counted(self) -> list[nn.Module]:
        """The modules whose calls in training count as layer evaluations."""
        return list(self.network.layers)

    def measured_loss(self, batch: Batch) -> Tensor:
        """The end-to-end loss for measuring memory; a random amount of work is set to its mean."""
        return cast(Any, self.end_to_end_loss)(self.network, batch)

    def place(self, mesh: Any = None) -> None:
        """Moves the trained model to its device, before the first step.

        Args:
            mesh: the processes that train it together, a 1-D DeviceMesh; None for one process.

        Raises:
            ValueError: the batch cannot be divided evenly among the processes.
        """
        run, model = self.run, self.model
        if mesh is not None and model is not None:
            if run.batch_size % mesh.size():
                raise ValueError(
                    f"batch_size must be a multiple of the {mesh.size()} processes that train a "
                    f"block, got {run.batch_size}"
                )
            self.mesh, sharding = mesh, run.sharding or "ddp"
            if sharding == "ddp":
                model.to(run.device)
            if self._outlined is not None:
                self._fill(self._outlined, mesh)
                self.parallel = model
            else:
                self.parallel = data_parallel(model, mesh, sharding)
            self.block_optimizers = make_optimizers(self.parallel, self._adamw)
            self.optimizers = list(self.block_optimizers)
        elif self._outlined is not None:
            self._fill(self._outlined, None)
            self.block_optimizers = make_optimizers(cast(Any, model), self._adamw)
            self.optimizers = list(self.block_optimizers)
        elif run.resident and run.block is None and self.block_optimizers is not None:
            self.residency = resident(
                cast(Any, model), self.block_optimizers, run.device,
                steps_per_visit=run.steps_per_visit or 1,
                prefetch=run.prefetch or "none", host=run.host or "pinned",
            )  # fmt: skip
        else:
            self.trained.to(run.device)

    def _fill(self, outlined: OutlinedBlock, mesh: Any) -> None:
        """Creates the weights of a block; with a mesh, as shards."""
        with torch.random.fork_rng(devices=[]):
            outlined.fill_(mesh, self.run.device)

    @property
    def trained(self) -> Any:
        """The trained model: the `DiffusionBlocks`, one `Block`, or the end-to-end network."""
        return self.network if self.model is None else self.model

    @property
    def num_blocks(self) -> int:
        """Number of blocks; 1 end to end."""
        return 1 if self.config is None else self.config.num_blocks

    def batch(self, step: int) -> Batch:
        """Batch number `step`, or this process's part of it, on the device of the run."""
        batch = self.batches.batch(step)
        if self.mesh is not None:
            each = self.run.batch_size // self.mesh.size()
            first = each * self.mesh.get_local_rank()
            batch = {key: value[first : first + each] for key, value in batch.items()}
        return {key: value.to(self.run.device) for key, value in batch.items()}

    @property
    def trained_blocks(self) -> Sequence[int]:
        """The blocks that are trained here."""
        return range(self.num_blocks) if self.run.block is None else (self.run.block,)

    def step(self, step: int) -> tuple[int, float | None]:
        """Trains on batch number `step`; returns the block (0 end to end) and its loss.

        If one block is trained alone, steps of other blocks only draw their random numbers and
        return None as the loss, so the block takes the same steps as in a run of all blocks.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the network is unchanged.
        """
        try:
            taken = self._step(step)
            every = self.run.averaged_every
            if every and ((step + 1) % every == 0 or step + 1 == self.run.steps):
                self.average_copies(step + 1)
            return taken
        except FloatingPointError as error:
            raise FloatingPointError(
                f"training stopped at step {step + 1} of {self.run.steps}: {error}"
            ) from error

    def average_copies(self, steps: int) -> None:
        """With `--shared reduce`, averages the blocks' copies of the shared parameters.

        Args:
            steps: number of steps taken.
        """
        if self.run.averaged_every is None:
            return
        average_shared(self.trained, step=steps)
        if self.run.ema is None:
            return
        with self.averaged():
            # At the end, the copy of a block without steps is the average of the others.
            last = steps == self.run.steps
            with nullcontext() if last else without_average_kept(self.optimizers):
                average_shared(self.trained, step=steps)

    def take_average(self) -> None:
        """Swaps the weights with their average, if the run keeps one; a second call undoes this."""
        if self.run.ema is not None:
            exchange(self.model, self.optimizers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Uses the average of the weights inside the `with` block, if the run keeps one."""
        self.take_average()
        try:
            yield
        finally:
            self.take_average()

    def check_finite(self) -> None:
        """Raises FloatingPointError unless all parameters are finite numbers."""
        for name, parameter in self.network.named_parameters():
            if not parameter.detach().isfinite().all():
                raise FloatingPointError(
                    f"trained parameters must be finite, got NaN or infinite values in {name}; "
                    "lower the learning rate"
                )

    def _shared_as_asked(self, config: BlocksConfig) -> BlocksConfig:
        sharing = "train" if self.run.end_to_end else self.run.sharing
        return dataclasses.replace(config, shared=sharing)

    def _made(self, make: Callable[[], Any]) -> tuple[Any, Any]:
        """The network and its `DiffusionBlocks`; if one block is trained alone, only this block."""
        config, alone = self.config, self.run.block
        if config is None:
            return make(), None
        if alone is None:
            network = make()
            return network, DiffusionBlocks(network, config)
        if self.run.sharding == "fsdp" and config.shared != "reduce":
            # No process has memory for the whole block: `place` creates the weights as shards.
            self._outlined = OutlinedBlock(self._seeded(make), config, alone)
            return self._outlined.block.parts(alone)[0], self._outlined.block
        block = build_block(make, config, alone)
        if config.shared == "reduce":
            join_owners(alone, self.num_blocks, self.run.device)
        return block.parts(alone)[0], block

    def _seeded(self, make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            torch.manual_seed(self.run.seed)
            return make()

        return made

    def _step(self, step: int) -> tuple[int, float | None]:
        alone = self.run.block
        if alone is not None:
            block = int(torch.randint(self.num_blocks, (), generator=self.generator))
            if block != alone:
                draw_seed(self.generator)
                return block, None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.run.lr_at(step)
        batch = self.batch(step)
        with self.autocast():
            if self.model is None or self.block_optimizers is None:
                return 0, self._end_to_end_step(batch)
            # The step draws one of all blocks, as above.
            result = train_step(
                self.model if self.parallel is None else self.parallel,
                batch, self.block_optimizers, block=alone,
                generator=self.generator, clip_grad_norm=self.run.clip, nonfinite="raise",
            )  # fmt: skip
        return result.block, mean(result.details.losses.mean(), self.mesh).item()

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """The optimizers that step on `block`."""
        if self.block_optimizers is None:
            return self.optimizers
        return self.block_optimizers.of_block(block)

    def loss(self, batch: Batch, block: int) -> Tensor:
        """The loss of a block, or end to end, for measuring the memory of a step."""
        with self.autocast():
            if self.model is None:
                return self.measured_loss(batch)
            return self.model.loss(batch, block, generator=torch.Generator().manual_seed(0)).loss

    def autocast(self) -> torch.autocast:
        """bfloat16 autocast, if the run uses it."""
        device = torch.device(self.run.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.run.bf16)

    def _end_to_end_step(self, batch: Batch) -> float:
        self.network.zero_grad(set_to_none=True)
        loss: Tensor = cast(Any, self.end_to_end_loss)(self.network, batch)
        loss.backward()
        if wrong := not_finite(loss, self.network.parameters()):
            raise FloatingPointError(f"loss and gradients must be finite, got {wrong}")
        nn.utils.clip_grad_norm_(self.network.parameters(), self.run.clip)
        self.optimizers[0].step()
        self.network.zero_grad(set_to_none=True)
        return loss.item()

    def _adamw(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.run.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.run.lr, fused=True)
        if self.run.ema is not None:
            keep_average(optimizer, self.run.ema)
        return optimizer
