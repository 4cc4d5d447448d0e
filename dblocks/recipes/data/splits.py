"""Images in memory, stratified splits, and batches that are functions of (seed, step)."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

Part = Literal["final", "selection"]

HELD_OUT = 0.3  # held-out fraction of images, the same ones for every seed
VALIDATION = 0.2  # validation fraction of the training part
SPLIT_SEED = 20260  # seed of both splits
MAX_BYTE = 255.0


@dataclass(frozen=True)
class Images:
    """Images and labels."""

    images: Tensor
    """Floating point [N, C, H, W], pixel values in [-1, 1] or latents; or, for large sets, uint8
    [N, C, H, W]. `values` converts all to float32."""
    labels: Tensor
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """A SHA-256 of images and labels."""
        return sha256_of(self.images, self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])


def sha256_of(*tensors: Tensor) -> str:
    """A SHA-256 of dtypes, shapes and elements."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        numbers = tensor.detach().cpu().contiguous().view(torch.uint8)
        digest.update(cast(Any, numbers.numpy()))
    return digest.hexdigest()


def values(images: Tensor) -> Tensor:
    """`Images.images`, or a part of them, as float32; uint8 becomes values in [-1, 1]."""
    if images.dtype == torch.uint8:
        return images.float().mul_(2 / MAX_BYTE).sub_(1)
    return images.float()


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, C] or [N, H, W] as float32 [N, C, H, W] in [-1, 1]."""
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            "pixels must be uint8 [N, H, W, C] or [N, H, W], "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return values(pixels.permute(0, 3, 1, 2)).contiguous()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices into (kept, taken), with a random `fraction` of every class taken.

    The numbers are exact to one sample.

    Samples are shuffled and sorted by class, and every (1/fraction)-th is taken.

    Args:
        labels: the classes, integers [N].
        fraction: the fraction to take, in (0, 1).
        seed: the same seed gives the same split.

    Returns:
        Two sorted int64 index vectors; together they hold every sample once.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    count = (torch.arange(len(labels) + 1, dtype=torch.float64) * fraction).floor()
    taken = count.diff() > 0
    return order[~taken].sort().values, order[taken].sort().values


def split(everything: Images, part: Part = "final") -> tuple[Images, Images]:
    """Splits images into training and evaluation sets; for `part` see `digits`."""
    kept, taken = stratified_split(everything.labels, HELD_OUT, SPLIT_SEED)
    return choose_part(everything[kept], everything[taken], part)


def choose_part(training: Images, held_out: Images, part: Part) -> tuple[Images, Images]:
    """Training and evaluation sets, given the held-out part."""
    if part == "final":
        return training, held_out
    fit, validation = stratified_split(training.labels, VALIDATION, SPLIT_SEED)
    return training[fit], training[validation]


def batch_indices(num_samples: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Indices of the samples of batch number `step`, in epochs of shuffled, full batches.

    Args:
        num_samples: size of the data set; each epoch omits the last `num_samples % batch_size`
            samples of its order.
        batch_size: samples per batch.
        seed: seed of the order.
        step: index of the batch, from 0.

    Returns:
        int64 [batch_size], without repetition.
    """
    if not 0 < batch_size <= num_samples:
        raise ValueError(
            f"batch_size must lie between 1 and the number of samples {num_samples}, "
            f"got {batch_size}"
        )
    epoch, batch = divmod(step, num_samples // batch_size)
    order = torch.randperm(num_samples, generator=generator_of(seed, epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]


def generator_of(seed: int, number: int) -> torch.Generator:
    """A CPU generator for step or epoch `number` of a run."""
    # The CPU generator uses 32 bits of its seed, so seeds and numbers are mixed into these.
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32)
