"""The diffusion transformer on images: the network, its samples, what they are judged by."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblocks.blocks import (
    BlocksConfig,
    DiffusionBlocks,
    Draw,
    Weighting,
)
from dblocks.models.dit import (
    GUIDANCE_SCALE,
    NUM_STEPS,
    DiT,
    DiTConditioning,
    DiTConfig,
    generate_images,
)
from dblocks.recipes import image_grid
from dblocks.recipes.data.digits import Images, batch_indices
from dblocks.recipes.data.images import load_images
from dblocks.recipes.judge import FEATURES, train_judge
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.metrics.images import deviation, frechet_distance, in_batches
from dblocks.recipes.run import Batch, Learner, Run
from dblocks.sampling import sampling_cost
from dblocks.schedules import NoiseSchedule

NOISE_SEED = 7  # of the noise that evaluation and samples start from
LEVELS = 12  # noise levels at which the loss is measured
SHOWN = 5  # samples of each class that a record keeps
MOST_CLASSES = 10  # of which it keeps some


@dataclass(frozen=True, kw_only=True)
class DiTRun(Run):
    """Everything that decides the outcome of a run on images; see `load_images`."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, hf:NAME, or a folder or file as `load_images` takes it."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    scale: float = 1.0
    """Factor of the values of arrays and latents."""
    sigma_data: float | None = None
    """Standard deviation of the data; measured on the training part by default."""
    steps: int = 3000
    """Training steps, of one batch each."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 4e-3
    """Peak learning rate."""
    weighting: Weighting = "auto"
    """Weight of a noise level's loss: that of EDM."""
    points: int = 5
    """How often the loss is measured on the way, evenly spaced."""
    width: int = 64
    """Width of the tokens."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width inside an MLP over that of the tokens."""
    conditioning: DiTConditioning = "dit"
    """AdaLN of the layers."""
    gate_init: float = 0.0
    """What the gates of the layers start at."""
    patch_size: int = 2
    """Side of a patch."""
    samples: int = 500
    """Images that are generated and judged at the end."""
    sampling_steps: int = NUM_STEPS
    """Euler steps of each."""
    guidance_scale: float = GUIDANCE_SCALE
    """Guidance of those that are called guided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def images(self) -> tuple[Images, Images]:
        """What to train on and what to evaluate on."""
        return load_images(self.data, self.part, size=self.image_size, scale=self.scale)

    def dit_config(self, data: Images) -> DiTConfig:
        """The network for such images; data of a single class count as without classes."""
        num_classes = int(data.labels.max()) + 1
        _, channels, height, width = data.images.shape
        return DiTConfig(
            image_size=(height, width),
            channels=channels,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=num_classes if num_classes > 1 else 0,
            conditioning=self.conditioning,
            gate_init=self.gate_init,
        )

    def blocks_config(self, data: Images) -> BlocksConfig:
        """How the network is cut; one block end to end."""
        sigma_data = deviation(data.images) if self.sigma_data is None else self.sigma_data
        schedule = NoiseSchedule(sigma_data=sigma_data)
        return BlocksConfig(self.num_blocks, schedule=schedule, weighting=self.weighting)

    def learner(self) -> DiTLearner:
        """The network of this run with its data, ready to train."""
        return DiTLearner(self, *self.images())


# As in the paper's CIFAR-10 experiment: 12 layers of DiT-S, patches of 2.
GPU = DiTRun(
    data="cifar10",
    steps=300_000,
    batch_size=256,
    lr=3e-4,
    weight_decay=0.01,
    width=384,
    heads=6,
    samples=10_000,
    device="cuda",
    bf16=True,
)


class Sampled(NamedTuple):
    """Generated images and how long they took."""

    images: Tensor
    """float32 [n, C, H, W], on the CPU, clamped to the values of the training data."""
    labels: Tensor | None
    """int64 [n]; None for a network without classes."""
    seconds: float
    """For each image."""


class DiTLearner(Learner):
    """A DiT in training on images.

    Args:
        run: what to train.
        data: the images to train on.
        evaluated: the images to compare with.
    """

    def __init__(self, run: DiTRun, data: Images, evaluated: Images) -> None:
        if run.batch_size > len(data):
            raise ValueError(
                f"batch_size must be at most the number of training images {len(data)}, "
                f"got {run.batch_size}"
            )
        super().__init__(run, lambda: DiT(run.dit_config(data)), lambda: run.blocks_config(data))
        self.dit_run, self.data, self.evaluated = run, data, evaluated

    def host_batch(self, step: int) -> Batch:
        """Batch number `step`, on the CPU."""
        run, data = self.run, self.data
        chosen = data[batch_indices(len(data), run.batch_size, seed=run.seed, step=step)]
        return {"images": chosen.images.float(), "labels": chosen.labels}

    def measure(self) -> dict[str, Any]:
        """The L2 loss on the images to compare with."""
        return {"loss": held_out_loss(self.trained, self.evaluated)}

    def progress(self, point: dict[str, Any]) -> str:
        """The loss."""
        return f"loss {point['loss']:.4f}"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The loss; of final runs what the classifier says of samples, and what they cost."""
        run, schedule = self.dit_run, self.trained.config.schedule
        found = {"loss": last["loss"], "sigma_data": schedule.sigma_data}
        return found | self._of_samples() if run.part == "final" else found

    def _of_samples(self) -> dict[str, Any]:
        run, schedule = self.dit_run, self.trained.config.schedule
        guided = self.sample(run.guidance_scale)
        sigmas = schedule.steps(run.sampling_steps)
        scale = run.guidance_scale if self.network.config.drops_labels else 1.0
        cost = sampling_cost(self.trained, sigmas, guidance_scale=scale)
        return {
            "judged": self._judged(guided),
            "calls_of_blocks": list(cost.calls),
            "layer_evaluations_per_image": cost.layer_evaluations,
            "seconds_per_image": guided.seconds,
            "pictures": self._pictures(guided),
        }

    def sample(self, guidance_scale: float) -> Sampled:
        """As many samples as the run asks for, the classes in turn."""
        run, config = self.dit_run, self.network.config
        classes = self.data.labels.unique()
        labels = classes[torch.arange(run.samples) % len(classes)]
        scale = guidance_scale if config.drops_labels else 1.0
        generator = torch.Generator().manual_seed(NOISE_SEED)
        chunks, start = [], time.perf_counter()
        for chunk in labels.split(run.batch_size):
            given = chunk.to(run.device) if config.num_classes else len(chunk)
            with self._autocast():
                images = generate_images(
                    self.trained, given, num_steps=run.sampling_steps, guidance_scale=scale,
                    generator=generator,
                )  # fmt: skip
            chunks.append(images.cpu())
        seconds = (time.perf_counter() - start) / run.samples
        low, high = self.data.images.aminmax()
        images = torch.cat(chunks).clamp(low.item(), high.item())
        return Sampled(images, labels if config.num_classes else None, seconds)

    def _judged(self, guided: Sampled) -> dict[str, Any] | None:
        """The classifier's view of the samples, and of the training images in their place.

        Distances are None where there are not more images than features.
        """
        run, num_classes = self.dit_run, self.network.config.num_classes
        if not num_classes or guided.labels is None:
            return None
        judge = train_judge(self.data, num_classes, device=run.device)

        def features(images: Tensor) -> Tensor:
            return in_batches(lambda x: judge.features(x.float().to(run.device)), images)

        def correct(images: Tensor, labels: Tensor) -> float:
            logits = in_batches(lambda x: judge(x.float().to(run.device)), images)
            return accuracy(logits, labels)

        held_out = features(self.evaluated.images)

        def distance(images: Tensor) -> float | None:
            if min(len(images), len(held_out)) <= FEATURES:  # too few for their covariance
                return None
            return frechet_distance(features(images), held_out)

        plain = self.sample(1.0)
        return {
            "distance": distance(guided.images),
            "distance_unguided": distance(plain.images),
            "distance_of_training_images": distance(self.data.images),
            "accuracy": correct(guided.images, guided.labels),
            "accuracy_unguided": correct(plain.images, guided.labels),
            "accuracy_on_held_out": correct(self.evaluated.images, self.evaluated.labels),
        }

    def _pictures(self, guided: Sampled) -> dict[str, Any] | None:
        """Some samples of each class, class by class; None for latents."""
        if guided.images.shape[1] not in image_grid.SHOWN_CHANNELS:
            return None
        labels = torch.zeros(len(guided.images)) if guided.labels is None else guided.labels
        classes = labels.unique()[:MOST_CLASSES]
        chosen = torch.cat([(labels == c).nonzero()[:SHOWN, 0] for c in classes])
        return image_grid.encode(guided.images[chosen])


@torch.no_grad()
def held_out_loss(model: DiffusionBlocks, data: Images, *, batch_size: int = 512) -> float:
    """The mean L2 loss, in F space, at noise levels of equal probability, each by its block.

    The noise is the same for every model of the same images, so that losses compare across blocks.

    Args:
        model: the blocks of a `DiT`.
        data: the images.
        batch_size: images at a time.
    """
    config = model.config
    device = next(model.parameters()).device
    levels = config.noise_schedule.steps(2 * LEVELS + 1)[1::2]
    owners = config.noise_schedule.block_of(levels, config.num_blocks).tolist()
    total = 0.0
    for first in range(0, len(data), batch_size):
        images = data.images[first : first + batch_size].float().to(device)
        batch = {"images": images, "labels": data.labels[first : first + batch_size].to(device)}
        for i, (sigma, block) in enumerate(zip(levels.tolist(), owners, strict=True)):
            seed = torch.full((), NOISE_SEED + first + i, dtype=torch.int64, device=device)
            draw = Draw(torch.full((len(images),), sigma, device=device), seed, None)
            total += model.loss_at(batch, block, draw).losses.double().sum().item()
    return total / (len(data) * LEVELS)
