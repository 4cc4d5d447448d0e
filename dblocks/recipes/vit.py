"""The vision transformer on images: `dblocks train vit`, also `eval`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.blocks import BlocksConfig, Weighting, trained_at_top
from dblocks.blocks.targets.classes import Head
from dblocks.models.vit import Noise, ViT, ViTConfig
from dblocks.nn import ConditioningKind
from dblocks.recipes import columns
from dblocks.recipes.command import Recipe, check_steps, load_network
from dblocks.recipes.data.augment import Augment, Crop
from dblocks.recipes.data.batches import Batch, ImageData
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import Images
from dblocks.recipes.dropout import Dropout
from dblocks.recipes.evaluated import data_of
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.metrics.classifier import Classifier
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.run import Run, check_seed
from dblocks.recipes.tables import COSTS
from dblocks.recipes.trainer import Trainer

DENOISING_STEPS = (1, 2, 3, 4, 6, 12)  # numbers of Euler steps to evaluate at the end
MOST_PATCH = 7  # largest default patch size


@dataclass(frozen=True, kw_only=True)
class ViTRun(Run):
    """Train a 12-layer vision transformer, in blocks or end to end, and save it.

    The layers are divided into equal blocks. Each block learns to denoise the label's embedding
    within its own range of noise levels, so a training step runs one block only and stores only its
    activations. Prints the accuracy on held-out data and the cost; writes model.safetensors,
    config.json and run.json to --out.
    """

    data: str = "digits"
    """Training data: digits, the 1,797 8x8 digits of scikit-learn, of which 30 % are held out;
    fashion-mnist, from Debian's package dataset-fashion-mnist; cifar-10, cifar-100, tiny-imagenet
    or imagenet, with --data-path; hf:NAME, a Hugging Face data set; or a path: a folder of images
    with a sub-folder for each class, a folder of IDX, CIFAR, parquet or arrow files, or a .npz file
    of images and labels."""
    data_path: str | None = None
    """Folder of the files of cifar-10 and other named data sets."""
    image_size: int | None = None
    """Height and width to which images of a folder are resized and cropped."""
    steps: int = 4500
    batch_size: int = 128
    """Images in a batch."""
    width: int = 64
    """Width of the tokens."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Width of the hidden layer of MLPs, as a multiple of --width."""
    head: Head = "posterior"
    """How blocks compute logits: posterior, by Bayes' rule for the clean label given the noisy one;
    learned, by a linear layer."""
    noise_scale: float | None = 0.1
    """Initial value of a learned factor for the noisy label; None for no factor."""
    top_share: float = 0.6
    """Fraction of every block's draws at sigma_max."""
    noise: Noise = "none"
    """Initial state of Euler steps in evaluations: none, the mean of the noise; paper, noise of std
    sigma_max; unit_variance, noise of variance 1 + sigma_max^2."""
    weighting: Weighting = "none"
    conditioning: ConditioningKind = "official"
    """AdaLN of the blocks: none, a plain layer norm; dit, that of DiT;
    official, that of the published code, which also applies SiLU to shifts, scales and gates.
    End-to-end networks have a plain layer norm."""
    gate_init: float = 1.0
    """Initial gates of the blocks' layers; with 1 they start like those of the end-to-end
    network."""
    patch_size: int | None = None
    """Patch size. By default the largest one up to 7 with at least 4 patches along each side: 2 for
    digits, 7 for 28x28 images, 4 for 32x32."""
    crop: Crop = "none"
    """Random crops of training images: pad, shifts by up to 4 pixels with black borders; resize,
    crops of 8 % to 100 % of the area, resized to the image's size."""
    flip: bool = False
    """Flip half of the training images horizontally."""
    rand_augment: bool = False
    """Apply RandAugment to training images: two random operations of magnitude 9 each."""
    dropout: float = 0.0
    """Dropout rate in training, for input tokens, the outputs of attention and MLP, and attention
    probabilities. Masks depend on the number of processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")

    def augment(self) -> Augment:
        """The augmentation of training images."""
        return Augment(self.crop, self.flip, self.rand_augment)

    def vit_config(self, data: Images, evaluated: Images) -> ViTConfig:
        """The network for these images: with AdaLN in blocks, without it end to end.

        Raises:
            ValueError: all images have the same class.
        """
        num_classes = 1 + max(int(part.labels.max()) for part in (data, evaluated))
        if num_classes < 2:
            raise ValueError(
                "images must have at least 2 classes, got 1; "
                "give each class a sub-folder, or an array file its labels"
            )
        _, channels, height, width = data.images.shape
        patch_size = patch_size_of(height, width) if self.patch_size is None else self.patch_size
        return ViTConfig(
            image_size=height if height == width else (height, width),
            channels=channels,
            patch_size=patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=num_classes,
            conditioning="none" if self.end_to_end else self.conditioning,
            gate_init=0.0 if self.end_to_end else self.gate_init,
            head="learned" if self.end_to_end else self.head,
            noise_scale=None if self.end_to_end else self.noise_scale,
        )

    def blocks_config(self) -> BlocksConfig:
        """The configuration of blocks."""
        return BlocksConfig(
            num_blocks=self.blocks, weighting=self.weighting, top_share=self.top_share
        )

    def trainer(self) -> ViTTrainer:
        """The trainer of this run, with network and data."""
        data = load_images(self.data, self.part, path=self.data_path, size=self.image_size)
        return ViTTrainer(self, *data)


# What --published changes: the blocks of the paper.
PUBLISHED: dict[str, Any] = {
    "head": "learned", "noise_scale": None, "top_share": 0.0, "weighting": "batch_mean",
    "noise": "paper",
}  # fmt: skip

RECIPE = Recipe(
    run=ViTRun(),
    paper=EXPERIMENTS["vit"],
    out=Path("runs/vit"),
    columns=(*columns.VIT, *COSTS),
    published=PUBLISHED,
    published_help="As in the paper: a learned head, an unscaled noisy label, and noise levels "
    "drawn only from each block's own range.",
)


def patch_size_of(height: int, width: int) -> int:
    """The largest patch size up to 7 that divides both sides, with at least 4 patches along each.

    2 for 8x8 digits, 7 for 28x28, 4 for 32x32 and 64x64; 1 if there is none.
    """
    sides = range(1, min(MOST_PATCH, height // 4, width // 4) + 1)
    return max((p for p in sides if math.gcd(height, width) % p == 0), default=1)


class ViTTrainer(Trainer):
    """Trains a ViT on images.

    Args:
        run: options of the run.
        data: the training images.
        evaluated: the images for evaluation.
    """

    def __init__(self, run: ViTRun, data: Images, evaluated: Images) -> None:
        batches = ImageData(data, run.batch_size, run.seed, run.augment(), run.device)
        if not len(evaluated):
            raise ValueError(f"there must be enough images to hold some out, got {len(data)}")
        super().__init__(
            run,
            batches,
            lambda: ViT(run.vit_config(data, evaluated)),
            run.blocks_config,
            lambda vit, batch: nn.functional.cross_entropy(vit(batch["images"]), batch["labels"]),
        )
        self.data, self.evaluated = data, evaluated
        self.noise: Noise = run.noise
        self.classifier = Classifier(self.network, self.model)
        self.dropout = Dropout(run.dropout, self._layers(), run.seed)

    def loss(self, batch: Batch, block: int) -> Tensor:
        """As in `Trainer`, with dropout, which needs memory too."""
        with self.dropout.at(0, self.run.device, self.mesh):
            return super().loss(batch, block)

    def measure(self) -> dict[str, Any]:
        """The accuracy; in blocks also that of each block alone."""
        reached = self.classifier.accuracy(self.evaluated, noise=self.noise)
        return {"accuracy": reached, "blocks_alone": self._alone()}

    def progress(self, point: dict[str, Any]) -> str:
        """The accuracy."""
        return f"accuracy {100 * point['accuracy']:.1f} %"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The accuracy, also for several numbers of denoising steps, from mean and from noise."""
        by_steps = self.model is not None and self.run.part == "final"
        return {
            "accuracy": last["accuracy"],
            "blocks_alone": last["blocks_alone"],
            "adaln": self.network.config.conditioning != "none",
            "accuracy_by_denoising_steps": self._by_denoising_steps("none") if by_steps else None,
            "accuracy_from_noise": self._by_denoising_steps("paper") if by_steps else None,
        }

    def _step(self, step: int) -> tuple[int, float | None]:
        with self.dropout.at(step, self.run.device, self.mesh):
            return super()._step(step)

    def _layers(self) -> list[Sequence[nn.Module]]:
        """The layers of each block that is trained here."""
        if self.model is None:
            return [list(self.network.layers)]
        return [self.model.parts_at_rest(block)[1] for block in self.trained_blocks]

    @torch.no_grad()
    def _alone(self) -> list[float] | None:
        if self.model is None:
            return None
        data = self.evaluated
        return [
            accuracy(self.classifier.alone(data.images, block), data.labels)
            for block in range(self.num_blocks)
        ]

    def _by_denoising_steps(self, noise: Noise) -> dict[str, float]:
        with warnings.catch_warnings():
            # Fewer steps than blocks skip some blocks on purpose here.
            warnings.simplefilter("ignore", UserWarning)
            return {
                str(n): self.classifier.accuracy(self.evaluated, n, noise=noise)
                for n in DENOISING_STEPS
            }


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the accuracy of a saved vision transformer on held-out data."""

    data: str | None = None
    """Data to evaluate on; uses their held-out part. By default those of the training, by its
    run.json. See `dblocks train vit`."""
    data_path: str | None = None
    """See `dblocks train vit`."""
    image_size: int | None = None
    """Height and width to which images of a folder are resized and cropped."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train vit`."""
    steps: int | None = None
    """Number of denoising steps, each with one block. By default uses the product of all blocks'
    predictions or, for blocks trained as published, one step for each block."""
    noise: Noise = "none"
    """Initial state of the steps, see `dblocks train vit`."""
    seed: int = NOISE_SEED
    """Seed of the noise; by default that of evaluations in training."""

    def __call__(self) -> None:
        """Print the accuracy on the held-out part."""
        check_seed(self.seed)
        model, network = load_network(self.checkpoint, ViT)
        if check_steps(self.steps, self.checkpoint, model):
            classifier = Classifier(network, model)
            how = f"{self.steps or model.config.num_blocks} denoising steps of one block each"
            if self.steps is None and trained_at_top(model):
                how = f"the product of {model.config.num_blocks} blocks"
        else:
            classifier = Classifier(network, None)
            how = "all layers once (trained end to end)"
        data, options = data_of(
            self.checkpoint, data=self.data, data_path=self.data_path, image_size=self.image_size
        )
        _, held_out = load_images(data, **options)
        known, largest = network.config.num_classes, int(held_out.labels.max())
        if largest >= known:
            raise ValueError(
                f"labels must be among the network's {known} classes, got {largest}; use --data as "
                "in training"
            )
        value = classifier.accuracy(held_out, self.steps, noise=self.noise, seed=self.seed)
        print(f"held-out accuracy {100 * value:.1f} % on {len(held_out):,} images, {how}")
