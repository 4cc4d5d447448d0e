"""`dblocks train vit` and `dblocks eval vit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dblocks.recipes.commands.common import check_steps, load_network, train_and_save
from dblocks.recipes.run import check_seed
from dblocks.recipes.vit import NOISE_SEED


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a 12-layer vision transformer, block by block or end to end, and save it.

    Block by block, the layers are split into equal runs ("blocks"). Each block learns to denoise
    the label's embedding within its own range of noise levels, so that a training step runs, and
    keeps in memory, one block only. Prints the accuracy on held-out data and what it cost; writes
    model.safetensors, config.json and run.json into --out.
    """

    data: str = "digits"
    """What to train on: digits, the 1,797 8x8 digits of scikit-learn, of which 30 % are held out;
    fashion-mnist, of Debian's package dataset-fashion-mnist; cifar10; hf:NAME of Hugging Face; a
    folder of images, with a sub-folder for each class, of IDX files (MNIST's format) or of CIFAR's
    binary version; or a .npz file of images and labels."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    patch_size: int | None = None
    """Side of a patch. By default the largest up to 7 that leaves at least 4 patches along each
    side: 2 for digits, 7 for 28x28 images, 4 for 32x32."""
    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    end_to_end: bool = False
    """Train all layers together instead, the usual way, to compare with."""
    published: bool = False
    """As in the paper: a learned head, the noisy label as it is, and each block's draws in its own
    range of noise only."""
    steps: int = 4500
    """Training steps of one batch each; a step trains one block, drawn at random."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: a short warm-up leads to it, a cosine from it to 0."""
    batch_size: int = 128
    """Images in a batch."""
    seed: int = 0
    """Of weights, order of the data and noise; the held-out images are always the same."""
    out: Path = Path("runs/vit")
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from benchmarks.study.vit import COLUMNS
        from dblocks.recipes.vit import PUBLISHED, ViTRun

        run = ViTRun(
            data=self.data,
            image_size=self.image_size,
            patch_size=self.patch_size,
            blocks=self.blocks,
            end_to_end=self.end_to_end,
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            seed=self.seed,
            **(PUBLISHED if self.published else {}),
        )
        train_and_save(run, self.out, COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the accuracy of a saved vision transformer on held-out data."""

    data: str = "digits"
    """What to evaluate on: the held-out part of this data; see `dblocks train vit`."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    checkpoint: Path = Path("runs/vit")
    """Folder that `dblocks train vit` wrote."""
    steps: int | None = None
    """Denoising steps to a label, one block each. By default the product of all blocks' predictions
    or, of blocks trained as published, one step for each block."""
    noise: Literal["none", "paper"] = "none"
    """What steps start from: none, the mean of the noise, or noise, as in the paper."""
    seed: int = NOISE_SEED
    """Of the noise; by default that of training's own measurement."""

    def __call__(self) -> None:
        """Load, classify the held-out part, and print the accuracy."""
        from dblocks.blocks import trained_at_top
        from dblocks.models import ViT
        from dblocks.recipes.data.images import load_images
        from dblocks.recipes.vit import Classifier

        check_seed(self.seed)
        model, network = load_network(self.checkpoint, ViT, "vit")
        if check_steps(self.steps, self.checkpoint, model):
            classifier = Classifier(network, model)
            how = f"{self.steps or model.config.num_blocks} denoising steps of one block each"
            if self.steps is None and trained_at_top(model):
                how = f"the product of {model.config.num_blocks} blocks"
        else:
            classifier = Classifier(network, None)
            how = "all layers once (trained end to end)"
        _, held_out = load_images(self.data, size=self.image_size)
        known, largest = network.config.num_classes, int(held_out.labels.max())
        if largest >= known:
            raise ValueError(
                f"labels must be among the {known} classes that the network knows, got {largest}; "
                "give --data as in training"
            )
        value = classifier.accuracy(held_out, self.steps, noise=self.noise, seed=self.seed)
        print(f"held-out accuracy {100 * value:.1f} % on {len(held_out):,} images, {how}")
