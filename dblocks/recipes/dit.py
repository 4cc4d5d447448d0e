"""The diffusion transformer on images: `dblocks train dit`, also `eval` and `sample`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.models.dit import (
    GUIDANCE_SCALE,
    NUM_STEPS,
    DiT,
    DiTConditioning,
    DiTConfig,
    generate_images,
)
from dblocks.recipes import columns, image_grid
from dblocks.recipes.command import Recipe, load_network
from dblocks.recipes.data.augment import Augment
from dblocks.recipes.data.batches import ImageData
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import Images, values
from dblocks.recipes.drawing import OUT
from dblocks.recipes.drawing import Sample as Sample
from dblocks.recipes.evaluated import data_of
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.denoising import held_out_loss, measured
from dblocks.recipes.metrics.images import standard_deviation
from dblocks.recipes.metrics.judge import judge_of
from dblocks.recipes.metrics.judged import judged
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.progress import progress_bar
from dblocks.recipes.run import Run
from dblocks.recipes.tables import COSTS
from dblocks.recipes.trainer import Trainer
from dblocks.sampling import sampling_cost
from dblocks.schedules import NoiseSchedule

SHOWN = 5  # number of samples of each class in a record
MOST_CLASSES = 10  # kinds of samples in a record


@dataclass(frozen=True, kw_only=True)
class DiTRun(Run):
    """Train a 12-layer diffusion transformer to generate images, and save it.

    The layers are divided into equal blocks. Each block learns to denoise the image within its own
    range of noise levels, so a training step runs one block only and stores only its activations.
    Prints the distance of generated images from held-out ones, in the features of a small
    classifier, and the cost; writes model.safetensors, config.json and run.json to --out.
    """

    data: str = "digits"
    """Training data: digits, the 1,797 8x8 digits of scikit-learn, of which 30 % are held out;
    fashion-mnist, from Debian's package dataset-fashion-mnist; cifar-10, cifar-100, tiny-imagenet,
    imagenet or imagenet-latents, with --data-path; hf:NAME, a Hugging Face data set; or a path: a
    folder of images with a sub-folder for each class, a folder of IDX, CIFAR, parquet or arrow
    files or of latents, or a .npy or .npz file of images or latents."""
    data_path: str | None = None
    """Folder of the files of cifar-10 and other named data sets."""
    image_size: int | None = None
    """Height and width to which images of a folder are resized and cropped."""
    scale: float = 1.0
    """Factor for the values of arrays and latents."""
    sigma_data: float | None = None
    """Std of the data; by default measured on the training part."""
    steps: int = 3000
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 4e-3
    weighting: Weighting = "auto"
    points: int = 5
    width: int = 64
    """Width of the tokens."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the hidden layer of MLPs, as a multiple of --width."""
    conditioning: DiTConditioning = "dit"
    """AdaLN of the layers: dit, that of DiT; official, that of the published code, which also
    applies SiLU to shifts, scales and gates."""
    gate_init: float = 0.0
    """Initial gates of the layers."""
    patch_size: int = 2
    """Side of a patch."""
    samples: int = 500
    """Number of images to generate and evaluate at the end."""
    sampling_steps: int = NUM_STEPS
    """Euler steps per image."""
    guidance_scale: float = GUIDANCE_SCALE
    """Guidance scale of the guided samples."""
    flip: bool = False
    """Flip half of the training images horizontally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def dit_config(self, data: Images) -> DiTConfig:
        """The network for these images; data with a single class are treated as without classes."""
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
        """The configuration of blocks; one block end to end."""
        sigma_data = standard_deviation(data.images) if self.sigma_data is None else self.sigma_data
        schedule = NoiseSchedule(sigma_data=sigma_data)
        return BlocksConfig(self.num_blocks, schedule=schedule, weighting=self.weighting)

    def trainer(self) -> DiTTrainer:
        """The trainer of this run, with network and data."""
        data = load_images(
            self.data, self.part, path=self.data_path, size=self.image_size, scale=self.scale
        )
        return DiTTrainer(self, *data)


# The network of the paper's CIFAR-10 experiment, DiT-S/2, trained for longer.
GPU = DiTRun(
    data="cifar-10", steps=300_000, batch_size=256, lr=3e-4, weight_decay=0.01,
    width=384, heads=6, samples=10_000, device="cuda", bf16=True,
)  # fmt: skip

RECIPE = Recipe(
    run=DiTRun(),
    gpu=GPU,
    paper=EXPERIMENTS["dit"],
    out=OUT,
    columns=(*columns.DIT, *COSTS),
    after="Draw images with\ndblocks sample dit --checkpoint {out} --out samples.png",
)


class Sampled(NamedTuple):
    """Generated images and their time."""

    images: Tensor
    """float32 [n, C, H, W], on the CPU, clamped to the range of the training data."""
    labels: Tensor | None
    """int64 [n]; None for a network without classes."""
    seconds: float
    """Seconds per image."""


class DiTTrainer(Trainer):
    """Trains a DiT on images.

    Args:
        run: options of the run.
        data: the training images.
        evaluated: the images for evaluation.
    """

    def __init__(self, run: DiTRun, data: Images, evaluated: Images) -> None:
        augment = Augment(flip=run.flip)
        batches = ImageData(data, run.batch_size, run.seed, augment, run.device)
        super().__init__(
            run, batches, lambda: DiT(run.dit_config(data)), lambda: run.blocks_config(data)
        )
        self.dit_run, self.data, self.evaluated = run, data, evaluated

    def measure(self) -> dict[str, Any]:
        """The L2 loss on the images for evaluation."""
        return {"loss": held_out_loss(self.trained, self.evaluated)}

    def progress(self, point: dict[str, Any]) -> str:
        """The loss."""
        return f"loss {point['loss']:.4f}"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The loss; for final runs also metrics of samples by a classifier, and their cost."""
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
        """Generates the run's number of samples, cycling through the classes."""
        run, config = self.dit_run, self.network.config
        classes = self.data.labels.unique()
        labels = classes[torch.arange(run.samples) % len(classes)]
        scale = guidance_scale if config.drops_labels else 1.0
        generator = torch.Generator().manual_seed(NOISE_SEED)
        chunks, start = labels.split(run.batch_size), time.perf_counter()
        drawn = []
        total = run.sampling_steps * len(chunks)
        with progress_bar("sampling", "evaluating", total, shown=self.shows_progress) as bar:
            for chunk in chunks:
                given = chunk.to(run.device) if config.num_classes else len(chunk)
                with self.autocast():
                    images = generate_images(
                        self.trained, given, num_steps=run.sampling_steps, guidance_scale=scale,
                        generator=generator, callback=lambda state: bar.update(),
                    )  # fmt: skip
                drawn.append(images.cpu())
        seconds = (time.perf_counter() - start) / run.samples
        low, high = values(torch.stack(self.data.images.aminmax())).tolist()
        images = torch.cat(drawn).clamp(low, high)
        return Sampled(images, labels if config.num_classes else None, seconds)

    def _judged(self, guided: Sampled) -> dict[str, Any] | None:
        """Metrics of the samples by a classifier; None without classes."""
        num_classes = self.network.config.num_classes
        if not num_classes or guided.labels is None:
            return None
        judge = judge_of(self.data, num_classes, device=self.dit_run.device)
        unguided = self.sample(1.0).images
        return judged(judge, guided.images, unguided, guided.labels, self.data, self.evaluated)

    def _pictures(self, guided: Sampled) -> dict[str, Any] | None:
        """Some samples of each class, class by class; None for latents."""
        if guided.images.shape[1] not in image_grid.SHOWN_CHANNELS:
            return None
        labels = torch.zeros(len(guided.images)) if guided.labels is None else guided.labels
        classes = labels.unique()[:MOST_CLASSES]
        chosen = torch.cat([(labels == c).nonzero()[:SHOWN, 0] for c in classes])
        return image_grid.encode(guided.images[chosen])


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the loss of a saved diffusion transformer on held-out images.

    The loss is the squared error of the network's output at noise levels of equal probability, as
    in training, on at most 2,000 images. `dblocks train dit` also evaluates generated images.
    """

    data: str | None = None
    """Data to evaluate on; uses their held-out part. By default those of the training, by its
    run.json. See `dblocks train dit`."""
    data_path: str | None = None
    """See `dblocks train dit`."""
    image_size: int | None = None
    """Height and width to which images of a folder are resized and cropped."""
    scale: float | None = None
    """Factor for the values of latents; 1 by default."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train dit`."""

    def __call__(self) -> None:
        """Print the loss on the held-out part."""
        model, _ = load_network(self.checkpoint, DiT)
        data, options = data_of(
            self.checkpoint,
            data=self.data,
            data_path=self.data_path,
            image_size=self.image_size,
            scale=self.scale,
        )
        _, held_out = load_images(data, **options)
        value = held_out_loss(model, held_out)
        print(f"held-out L2 loss {value:.4f} on {len(measured(held_out)):,} images")
