"""`dblocks train dit`, `dblocks eval dit` and `dblocks sample dit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dblocks.recipes.commands.common import load_network, progress_bar, train_and_save
from dblocks.recipes.run import check_seed

DEFAULT_OUT = Path("runs/dit")
ACROSS = 10  # pictures in a row of a model without classes


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a 12-layer diffusion transformer to draw images, and save it.

    Block by block, the layers are split into equal runs ("blocks"). Each block learns to denoise
    the image within its own range of noise levels, so that a training step runs, and keeps in
    memory, one block only. Prints how far generated images are from held-out ones, by a small
    classifier, and what it cost; writes model.safetensors, config.json and run.json into --out.
    """

    data: str = "digits"
    """What to train on: digits, the 1,797 8x8 digits of scikit-learn, of which 30 % are held out;
    fashion-mnist, of Debian's package dataset-fashion-mnist; cifar10; hf:NAME of Hugging Face; a
    folder of images, with a sub-folder for each class, of IDX files (MNIST's format) or of CIFAR's
    binary version; or a .npy or .npz file of images or latents."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    scale: float = 1.0
    """Factor of the values of latents."""
    recipe: Literal["small", "gpu"] = "small"
    """Sizes and steps: small, for minutes on a CPU; gpu, width 384 on CIFAR-10 (the default data
    then)."""
    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    end_to_end: bool = False
    """Train all layers together instead, the usual way, to compare with."""
    steps: int | None = None
    """Training steps of one batch each; a step trains one block. By default the recipe's."""
    lr: float | None = None
    """Peak learning rate of AdamW: a short warm-up leads to it, a cosine from it to 0."""
    batch_size: int | None = None
    """Images in a batch."""
    samples: int | None = None
    """Images to generate and judge at the end."""
    seed: int = 0
    """Of weights, order of the data and noise; the held-out images are always the same."""
    out: Path = DEFAULT_OUT
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from benchmarks.study.dit import COLUMNS
        from dblocks.recipes.dit import GPU, DiTRun

        given = {
            name: value
            for name in ("steps", "lr", "batch_size", "samples")
            if (value := getattr(self, name)) is not None
        }
        gpu = self.recipe == "gpu"
        run = dataclasses.replace(
            GPU if gpu else DiTRun(),
            data=GPU.data if gpu and self.data == "digits" else self.data,
            image_size=self.image_size,
            scale=self.scale,
            blocks=self.blocks,
            end_to_end=self.end_to_end,
            seed=self.seed,
            **given,
        )
        train_and_save(run, self.out, COLUMNS)
        print("Draw images with")
        print(f"dblocks sample dit --checkpoint {self.out} --out samples.png")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the loss of a saved diffusion transformer on held-out images.

    The squared error of the network's output, over noise levels of equal probability: what training
    makes small. `dblocks train dit` also judges generated images.
    """

    data: str = "digits"
    """What to evaluate on: the held-out part of this data; see `dblocks train dit`."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    scale: float = 1.0
    """Factor of the values of latents."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train dit` wrote."""

    def __call__(self) -> None:
        """Load, and print the loss on the held-out part."""
        from dblocks.models import DiT
        from dblocks.recipes.data.images import load_images
        from dblocks.recipes.dit import held_out_loss

        model, _ = load_network(self.checkpoint, DiT, "dit")
        _, held_out = load_images(self.data, size=self.image_size, scale=self.scale)
        value = held_out_loss(model, held_out)
        print(f"held-out L2 loss {value:.4f} on {len(held_out):,} images")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Let a saved diffusion transformer draw images, a row of them for each class, as a PNG.

    Latents are written as they are: name a .npy file, an array [N, C, H, W].
    """

    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train dit` wrote."""
    out: Path = Path("samples.png")
    """The PNG to write, or a .npy file for the numbers themselves."""
    classes: tuple[int, ...] = ()
    """Classes to draw, such as 3 7; the first ten by default."""
    count: int = 5
    """Images of each class; of a model without classes, rows of 10."""
    steps: int | None = None
    """Denoising steps from noise to an image, one block each; 50 by default."""
    kind: Literal["equal_mass", "karras"] = "equal_mass"
    """Where the steps are: equal_mass calls each block about equally often, karras as in EDM."""
    guidance: float | None = None
    """How much the class counts: 1 is the plain model, 2, the default, exaggerates the class and
    costs two calls a step."""
    size: tuple[int, int] | None = None
    """Height and width, if not those of the training images."""
    seed: int = 0
    """Of the noise that denoising starts from."""

    def __call__(self) -> None:
        """Load, generate with a progress bar, write the grid, and print how often blocks ran."""
        import numpy
        import torch

        from dblocks import checkpoint
        from dblocks.models.dit import GUIDANCE_SCALE, NUM_STEPS, DiT, generate_images
        from dblocks.recipes import image_grid, plots
        from dblocks.sampling import sampling_cost

        check_seed(self.seed)
        for name in ("count", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be positive, got {value}")
        checkpoint.make_folder(self.out.parent)
        model, network = load_network(self.checkpoint, DiT, "dit")
        config = network.config
        as_array = self.out.suffix == ".npy"
        if not as_array and config.channels not in image_grid.SHOWN_CHANNELS:
            raise ValueError(
                f"images of {config.channels} channels are no picture; name a .npy file by --out"
            )
        labels, across = self._labels(config.num_classes)
        scale = self.guidance
        if scale is None:
            scale = GUIDANCE_SCALE if config.drops_labels else 1.0
        sigmas = model.config.noise_schedule.steps(self.steps or NUM_STEPS, self.kind)
        with progress_bar("drawing", len(sigmas)) as bar:
            images = generate_images(
                model,
                labels,
                size=self.size,
                sigmas=sigmas,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(self.seed),
                callback=lambda state: bar.update(),
            )
        if as_array:
            numpy.save(self.out, images.cpu().numpy())
        else:
            figure = image_grid.grid_figure({"": image_grid.to_bytes(images)}, across)
            plots.save_png(figure, self.out)
        cost = sampling_cost(model, sigmas, guidance_scale=scale)
        calls = ", ".join(f"block {b}: {n}" for b, n in enumerate(cost.calls))
        print(f"calls of each block's layers: {calls}")
        print(f"{cost.layer_evaluations:,} layer evaluations an image; wrote {self.out}")

    def _labels(self, num_classes: int) -> tuple[Any, int]:
        """The classes to draw, or the number of images; and the pictures in a row."""
        import torch

        if not num_classes:
            if self.classes:
                raise ValueError(
                    f"--classes needs a model with classes, got {list(self.classes)} for one "
                    "without; leave it out"
                )
            return self.count * ACROSS, ACROSS
        classes = self.classes or tuple(range(min(num_classes, 10)))
        return torch.tensor(classes).repeat_interleave(self.count), self.count
