"""`dblocks sample dit`: writes images as a PNG, or as arrays for programs that compute metrics."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dblocks import checkpoint
from dblocks.checkpoint.networks import RECORD_FILE
from dblocks.config import read_json
from dblocks.models.dit import GUIDANCE_SCALE, NUM_STEPS, DiT, generate_images
from dblocks.recipes import image_grid
from dblocks.recipes.command import check_free, load_network
from dblocks.recipes.progress import progress_bar
from dblocks.recipes.run import check_device, check_seed
from dblocks.sampling import sampling_cost

OUT = Path("runs/dit")  # of training
SUFFIXES = (".png", ".npz", ".npy")
ACROSS = 10  # images in a row for a model without classes
SHOWN = 10  # largest number of classes in a PNG by default


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate images with a saved diffusion transformer, one row per class, as a PNG.

    Or as arrays: a .npz file holds `arr_0`, uint8 [N, H, W, 3], and `arr_1`, the classes, as read
    by programs that compute FID; a .npy file holds the values [N, C, H, W], also of latents. To
    decode latents into images, use --vae.
    """

    checkpoint: Path = OUT
    """Folder written by `dblocks train dit`."""
    out: Path = Path("samples.png")
    """The .png, .npz or .npy file to write."""
    overwrite: bool = False
    """Replace an existing file."""
    classes: tuple[int, ...] = ()
    """Classes to generate, such as 3 7; by default the first ten, or all for a .npz file."""
    count: int = 5
    """Number of images per class; for a model without classes, number of rows of 10."""
    steps: int | None = None
    """Number of denoising steps, each with one block; 50 by default."""
    spacing: Literal["equal_mass", "karras"] = "equal_mass"
    """Spacing of the steps: equal_mass calls each block about equally often, karras as in EDM."""
    guidance_scale: float | None = None
    """Guidance scale: 1 is the conditional model; 2, the default, amplifies the class and needs two
    calls per step."""
    image_size: int | tuple[int, int] | None = None
    """Height and width, or one number for both; by default those of the training images."""
    seed: int = 0
    """Seed of the initial noise."""
    batch_size: int = 500
    """Images generated at a time."""
    device: str = "cpu"
    """Device of the computation, as PyTorch names it."""
    bf16: bool = False
    """Compute the layers in bfloat16 (autocast)."""
    vae: Path | None = None
    """Folder of the latents' autoencoder, an AutoencoderKL of diffusers in safetensors."""

    def __call__(self) -> None:
        """Generate and write the images; print the number of calls of each block."""
        check_seed(self.seed)
        check_device(self.device)
        for name in ("count", "steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be positive, got {value}")
        if self.out.suffix not in SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {self.out}")
        check_free(self.out, [self.out], overwrite=self.overwrite)
        checkpoint.make_folder(self.out.parent)
        model, network = load_network(self.checkpoint, DiT)
        config = network.config
        decode = None if self.vae is None else _Decoder(self.vae, self.checkpoint, self.device)
        pictured = decode is not None or config.channels in image_grid.SHOWN_CHANNELS
        if self.out.suffix != ".npy" and not pictured:
            raise ValueError(
                f"images of {config.channels} channels cannot be written as pictures; use a .npy "
                "file as --out, or decode latents with --vae"
            )
        labels, across = self._labels(config.num_classes)
        scale = self.guidance_scale
        if scale is None:
            scale = GUIDANCE_SCALE if config.drops_labels else 1.0
        model.to(self.device)
        sigmas = model.config.noise_schedule.steps(self.steps or NUM_STEPS, self.spacing)
        drawn = self._drawn(model, labels, sigmas, scale)
        if self.out.suffix == ".npy":
            numpy = importlib.import_module("numpy")
            numpy.save(self.out, torch.cat(list(drawn)).numpy())
        else:
            bytes_ = (image_grid.to_bytes(decode(z) if decode else z) for z in drawn)
            pixels = _joined(bytes_, len(labels))
            if self.out.suffix == ".npz":
                _save_npz(self.out, pixels, labels if config.num_classes else None)
            else:
                image_grid.save_png(image_grid.grid_figure({"": pixels}, across), self.out)
        cost = sampling_cost(model, sigmas, guidance_scale=scale)
        calls = ", ".join(f"block {b}: {n}" for b, n in enumerate(cost.calls))
        print(f"calls of each block's layers: {calls}")
        print(f"{cost.layer_evaluations:,} layer evaluations per image; wrote {self.out}")

    def _drawn(self, model: Any, labels: Tensor, sigmas: Any, scale: float) -> Iterator[Tensor]:
        """Generates the images in batches, float32 on the CPU."""
        classes = model.base_model.config.num_classes
        generator = torch.Generator().manual_seed(self.seed)
        chunks = labels.split(self.batch_size)
        autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)
        with progress_bar("sampling", "drawing", len(sigmas) * len(chunks)) as bar:
            for chunk in chunks:
                with autocast:
                    images = generate_images(
                        model,
                        chunk.to(self.device) if classes else len(chunk),
                        image_size=self.image_size,
                        sigmas=sigmas,
                        guidance_scale=scale,
                        generator=generator,
                        callback=lambda state: bar.update(),
                    )
                yield images.cpu()

    def _labels(self, num_classes: int) -> tuple[Tensor, int]:
        """The classes to generate, zeros for a model without classes, and the images per row."""
        if not num_classes:
            if self.classes:
                raise ValueError(
                    f"--classes needs a model with classes, got {list(self.classes)} for one "
                    "without; leave it out"
                )
            return torch.zeros(self.count * ACROSS, dtype=torch.long), ACROSS
        most = num_classes if self.out.suffix == ".npz" else min(num_classes, SHOWN)
        classes = self.classes or tuple(range(most))
        return torch.tensor(classes).repeat_interleave(self.count), self.count


class _Decoder:
    """Decodes latents into images in [-1, 1] with an autoencoder in a local folder.

    Args:
        folder: folder of diffusers' AutoencoderKL.
        trained: folder of the network, whose record has the factor of the latents.
        device: device of the computation.
    """

    AT_ONCE = 16  # batch size for images of 256x256 pixels and more

    def __init__(self, folder: Path, trained: Path, device: str) -> None:
        if not folder.is_dir():
            raise ValueError(f"--vae must be a folder of an AutoencoderKL, got {folder}")
        try:
            diffusers: Any = importlib.import_module("diffusers")
        except ImportError as error:
            raise ImportError(
                "--vae needs the package diffusers, which is not installed; "
                "`pip install 'dblocks[hf]'`"
            ) from error
        try:
            self.vae = diffusers.AutoencoderKL.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            ).to(device)
        except OSError as error:
            raise ValueError(f"--vae {folder} cannot be loaded: {error}") from error
        self.device, self.scale = device, _scale_of(trained)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """float32 [N, 3, H, W] on the CPU."""
        chunks = (latents / self.scale).split(self.AT_ONCE)
        return torch.cat([self.vae.decode(z.to(self.device)).sample.float().cpu() for z in chunks])


def _scale_of(trained: Path) -> float:
    """The factor by which training multiplied the latents."""
    record: Any = read_json(checkpoint.current(trained, RECORD_FILE))
    run = record["merged"][0] if "merged" in record else record
    return float(run.get("run", {}).get("scale", 1.0))


def _joined(chunks: Iterator[Tensor], count: int) -> Tensor:
    """Collects uint8 [N, H, W, C] in one preallocated tensor."""
    first = next(chunks)
    pixels = first.new_empty(count, *first.shape[1:])
    pixels[: len(first)], done = first, len(first)
    for chunk in chunks:
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
    return pixels


def _save_npz(path: Path, pixels: Tensor, labels: Tensor | None) -> None:
    """Writes the format of guided-diffusion's evaluator; grey images get three channels."""
    numpy = importlib.import_module("numpy")
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(*pixels.shape[:-1], 3)
    arrays = [pixels.numpy()] + ([] if labels is None else [labels.numpy()])
    numpy.savez(path, *arrays)
