"""Runs of ensembles: a step trains the member whose turn it is, by an optimizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.study.ensembles.networks import EnsembleDiT, EnsembleMaskedLM, Members
from dblocks.blocks import BlockOptimizers, DiffusionBlocks, train_step
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import Images
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.dit import DiTRun, DiTTrainer
from dblocks.recipes.masked_lm import MaskedLMRun, MaskedLMTrainer
from dblocks.recipes.run import Run
from dblocks.recipes.trainer import Trainer


def check_members(run: Run, members: int) -> None:
    """Raises ValueError for what is no ensemble of denoisers over all noise levels."""
    if not run.end_to_end or members < 2 or run.depth % members:
        raise ValueError(
            "an ensemble must have 2 or more members that divide the layers, and end_to_end=True, "
            f"got {members} of {run.depth} layers and end_to_end={run.end_to_end}"
        )
    if run.ema is not None or run.sharding is not None:
        raise ValueError(
            f"ema and sharding must be left out, got {run.ema} and {run.sharding!r}; members are "
            "trained in one process, without averages"
        )


class EnsembleTrainer(Trainer):
    """Mixed into the trainer of a network of `Members`, which it calls one at a time."""

    ensemble: Members

    def take_turns(self) -> None:
        """Gives every member an optimizer of its own."""
        self.ensemble = cast(Members, self.network)
        count = len(self.ensemble.members)
        self.optimizers: list[Optimizer] = [
            self._adamw(self.ensemble.parameters_of(member)) for member in range(count)
        ]
        self.block_optimizers = BlockOptimizers(self.optimizers, None)

    def counted(self) -> list[nn.Module]:
        """The layers of all members."""
        return [layer for member in self.ensemble.members for layer in member.layers]

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """That of the member whose step is measured, the first."""
        return self.optimizers[:1]

    def loss(self, batch: Batch, block: int) -> Tensor:
        """The loss of the first member, by which the memory of a step is measured."""
        with self.ensemble.alone(0):
            return super().loss(batch, block)

    def _step(self, step: int) -> tuple[int, float | None]:
        member = step % len(self.optimizers)
        optimizer = self.optimizers[member]
        for group in optimizer.param_groups:
            group["lr"] = self.run.lr_at(step)
        with self.autocast(), self.ensemble.alone(member):
            result = train_step(
                cast(DiffusionBlocks, self.model), self.batch(step),
                BlockOptimizers([optimizer], None), block=0, generator=self.generator,
                clip_grad_norm=self.run.clip, nonfinite="raise",
            )  # fmt: skip
        return 0, result.details.losses.mean().item()


@dataclass(frozen=True, kw_only=True)
class EnsembleDiTRun(DiTRun):
    """Train an ensemble of diffusion transformers."""

    members: int = 3
    """How many, of `depth` layers together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_members(self, self.members)

    def trainer(self) -> EnsembleDiTTrainer:
        """The networks of this run with their data, ready to train."""
        data = load_images(
            self.data, self.part, path=self.data_path, size=self.image_size, scale=self.scale
        )
        return EnsembleDiTTrainer(self, *data)


class EnsembleDiTTrainer(EnsembleTrainer, DiTTrainer):
    """Trains an `EnsembleDiT`."""

    def __init__(self, run: EnsembleDiTRun, data: Images, evaluated: Images) -> None:
        self.count, self.of_all = run.members, run.dit_config(data)
        DiTTrainer.__init__(self, run, data, evaluated)
        self.take_turns()

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """As of a DiT; an image takes the layers of all members."""
        found = super().results(last)
        if "layer_evaluations_per_image" in found:
            found["layer_evaluations_per_image"] *= self.count
        return found

    def _made(self, make: Any) -> tuple[Any, Any]:
        network = EnsembleDiT(self.of_all, self.count)
        return network, DiffusionBlocks(network, cast(Any, self.config))


@dataclass(frozen=True, kw_only=True)
class EnsembleMaskedRun(MaskedLMRun):
    """Train an ensemble of masked language models."""

    members: int = 3
    """How many, of `depth` layers together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_members(self, self.members)

    def trainer(self) -> EnsembleMaskedTrainer:
        """The networks of this run with their data, ready to train."""
        return EnsembleMaskedTrainer(self, self.read_corpus(self.part))


class EnsembleMaskedTrainer(EnsembleTrainer, MaskedLMTrainer):
    """Trains an `EnsembleMaskedLM`."""

    def __init__(self, run: EnsembleMaskedRun, corpus: Corpus) -> None:
        self.count, self.of_all = run.members, run.model_config(corpus.tokenizer.size)
        MaskedLMTrainer.__init__(self, run, corpus)
        self.take_turns()

    def _made(self, make: Any) -> tuple[Any, Any]:
        network = EnsembleMaskedLM(self.of_all, self.count)
        return network, DiffusionBlocks(network, cast(Any, self.config))
