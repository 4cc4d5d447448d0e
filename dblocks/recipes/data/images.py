"""Loads images and latents by name, from files and from packages.

Images have pixel values in [-1, 1]. Latents are multiplied by a given factor, such as .18215 for
Stable Diffusion's autoencoder, for a standard deviation of about 1. Optional packages are imported
when they are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dblocks.recipes.data.byte_images import ByteImages, is_idx, read_idx, read_parts
from dblocks.recipes.data.cifar import read_cifar
from dblocks.recipes.data.class_folders import read_class_folders
from dblocks.recipes.data.digits import digits
from dblocks.recipes.data.hub import hugging_face
from dblocks.recipes.data.image_columns import read_image_columns
from dblocks.recipes.data.image_files import array_file, check_size, image_folder, images_of
from dblocks.recipes.data.latents import read_latents
from dblocks.recipes.data.pictures import Size
from dblocks.recipes.data.splits import Images, Part, choose_part, split

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # folder of Debian's package


class Known(NamedTuple):
    """The expected contents of a named data set, whose files may have any format."""

    num_classes: int
    shape: tuple[int, int, int] | None = None
    """Channels, height and width; None allows any."""
    folders: tuple[str, ...] = ()
    """Names of the folders in its archives, inside the given one."""


KNOWN = {
    "fashion-mnist": Known(10, (1, 28, 28)),
    "cifar-10": Known(10, (3, 32, 32), ("cifar-10-batches-py", "cifar-10-batches-bin")),
    "cifar-100": Known(100, (3, 32, 32), ("cifar-100-python", "cifar-100-binary")),
    "tiny-imagenet": Known(200, (3, 64, 64), ("tiny-imagenet-200",)),
    "imagenet": Known(1000),
    "imagenet-latents": Known(1000),
}


def load_images(
    source: str,
    part: Part = "final",
    *,
    path: str | Path | None = None,
    size: Size | None = None,
    scale: float = 1.0,
) -> tuple[Images, Images]:
    """Loads the images for training and evaluation, by name or path.

    The held-out part is the data set's own test part, or else 30 % of each class.

    Args:
        source: "digits"; "fashion-mnist", installed by Debian's package dataset-fashion-mnist;
            "cifar-10", "cifar-100", "tiny-imagenet", "imagenet" or "imagenet-latents", whose files
            are in `path`; `hf:NAME` for a Hugging Face data set; or a path.
        part: see `digits.digits`.
        path: a folder of IDX files like MNIST's (train-images-idx3-ubyte and so on, also .gz), of
            CIFAR's binary or Python version, of image files in parts (see `class_folders`), of
            parquet or arrow files (see `image_columns`), of latents (see `latents`), or of image
            files (see `image_files.image_folder`); an IDX file of images next to its labels; or a
            .npy or .npz file.
        size: size of the images, for folders of image files; see `image_files.image_folder`.
        scale: factor for arrays and latents; see `array_file` and `hugging_face`.

    Raises:
        ValueError: `source` is none of these, cannot be read, or does not hold the named data set.
        ImportError: a package that it needs is not installed.
    """
    known = KNOWN.get(source)
    if path is not None and known is None:
        raise ValueError(
            f"a path can be given for {', '.join(KNOWN)}, got {path} with {source!r}; leave it "
            "out, or give the path as data"
        )
    if source == "fashion-mnist" and path is None:
        path = _fashion_mnist()
    if known is not None and path is None:
        raise ValueError(f"{source} needs its files: give the file or folder by --data-path")
    place = _place(Path(source if path is None else path), known)
    if path is not None and not place.exists():
        raise ValueError(f"{place} must be a file or folder of {source}, and does not exist")
    folder, array = place.is_dir(), place.suffix in (".npy", ".npz")
    if size is not None and not folder:
        raise ValueError(f"size is for image files, got {size} with {source!r}; leave it out")
    if scale != 1 and not (array or folder or source.startswith("hf:")):
        raise ValueError(
            f"scale is for arrays and latents, got {scale} with {source!r}; leave it out"
        )
    if source == "digits":
        return digits(part)
    if source.startswith("hf:"):
        return split(hugging_face(source.removeprefix("hf:"), scale=scale), part)
    if folder:
        channels = 3 if known is None or known.shape is None else known.shape[0]
        training, held_out = _of_folder(place, size, channels, scale)
    elif is_idx(place):
        training, held_out = _of_bytes(read_idx(place), str(place)), None
    elif array:
        training, held_out = array_file(place, scale=scale), None
    else:
        raise ValueError(
            f"data must be digits, {', '.join(KNOWN)}, hf:NAME, a folder of images, an IDX file of "
            "images (NAME-images-idx3-ubyte[.gz]), or a .npy or .npz file, "
            f"got {str(place)!r}"
        )
    for found in (training, held_out):
        if known is not None and found is not None:
            _check(found, known, size, f"{source} in {place}")
    return split(training, part) if held_out is None else choose_part(training, held_out, part)


def _fashion_mnist() -> Path:
    if not any(FASHION_MNIST.glob("*-ubyte*")):
        raise ValueError(
            f"fashion-mnist must be in {FASHION_MNIST}, and is not there; install Debian's package "
            "dataset-fashion-mnist, or give the folder of its IDX files by --data-path"
        )
    return FASHION_MNIST


def _place(path: Path, known: Known | None) -> Path:
    """The folder of an archive, if its parent folder was given."""
    names = () if known is None else known.folders
    return next((path / name for name in names if (path / name).is_dir()), path)


def _of_folder(
    folder: Path, size: Size | None, channels: int, scale: float
) -> tuple[Images, Images | None]:
    """Images of a folder in any format, and its own held-out images."""
    check_size(size, channels)
    if (of_bytes := read_parts(folder) or read_cifar(folder)) is not None:
        _check_left_out(folder, size, scale, "whose IDX or CIFAR files have one")
        training, held_out = (_of_bytes(found, str(folder)) for found in of_bytes)
        return training, held_out
    if (latents := read_latents(folder, scale)) is not None:
        _check_left_out(folder, size, 1.0, "whose latents have one")
        return latents
    _check_left_out(folder, None, scale, "")
    return (
        read_image_columns(folder, size, channels)
        or read_class_folders(folder, size, channels)
        or (image_folder(folder, size=size, channels=channels), None)
    )


def _check_left_out(folder: Path, size: Size | None, scale: float, why: str) -> None:
    if size is not None:
        raise ValueError(f"size is for image files, got {size} with {folder}, {why}; leave it out")
    if scale != 1:
        raise ValueError(
            f"scale is for arrays and latents, got {scale} with {folder}; leave it out"
        )


def _check(images: Images, known: Known, size: Size | None, of: str) -> None:
    """Raises ValueError if images do not match the named data set."""
    shape = tuple(images.images.shape[1:])
    if known.shape is not None and size is None and shape != known.shape:
        raise ValueError(f"images of {of} must be {list(known.shape)}, got {list(shape)}")
    if (largest := int(images.labels.max())) >= known.num_classes:
        raise ValueError(f"labels of {of} must be below {known.num_classes}, got {largest}")


def _of_bytes(found: ByteImages, of: str) -> Images:
    return images_of(found.pixels, found.labels, 1.0, of)
