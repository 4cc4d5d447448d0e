"""Images and latents from files and from packages that offer data sets.

Images have pixel values in [-1, 1]. Latents are multiplied by a factor that the caller states, such
as .18215 for those of Stable Diffusion's autoencoder, so that their deviation is about 1. Packages
are imported when something is loaded through them.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks.recipes.data.byte_images import ByteImages, is_idx, read_idx, read_parts
from dblocks.recipes.data.digits import Images, Part, choose_part, digits, split

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MAX_BYTE = 255.0
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ROWS_AT_A_TIME = 1024  # of a Hugging Face data set

Size = int | tuple[int, int]


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, C] or [N, H, W] as float32 [N, C, H, W] in [-1, 1]."""
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            "pixels must be uint8 [N, H, W, C] or [N, H, W], "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return pixels.permute(0, 3, 1, 2).float().mul_(2 / MAX_BYTE).sub_(1).contiguous()


def load_images(
    source: str, part: Part = "final", *, size: Size | None = None, scale: float = 1.0
) -> tuple[Images, Images]:
    """What to train on and what to evaluate on, from what a name or a path stands for.

    Args:
        source: "digits"; "fashion-mnist", which Debian's package dataset-fashion-mnist installs;
            "cifar10"; `hf:NAME` for a data set of Hugging Face; a folder of images, of IDX files
            (train-images-idx3-ubyte and so on, as of MNIST, also .gz) or of the binary version of
            CIFAR; an IDX file of images with its labels beside it; or a .npy or .npz file.
        part: see `digits.digits`; Fashion-MNIST, CIFAR and folders of IDX files hold out their own
            test images.
        size: see `image_folder`, the only source that takes it.
        scale: see `array_file` and `hugging_face`, the sources that take it.

    Raises:
        ValueError: `source` is none of these, or cannot be read.
        ImportError: a package that it needs is not installed.
    """
    path = Path(source)
    folder, array = path.is_dir(), path.suffix in (".npy", ".npz")
    if size is not None and not folder:
        raise ValueError(f"size is for a folder of images, got {size} with {source!r}; leave it")
    if scale != 1 and not (array or source.startswith("hf:")):
        raise ValueError(f"scale is for arrays and latents, got {scale} with {source!r}; leave it")
    if source == "digits":
        return digits(part)
    if source == "fashion-mnist":
        return choose_part(*fashion_mnist(), part)
    if source == "cifar10":
        return choose_part(cifar10(train=True), cifar10(train=False), part)
    if source.startswith("hf:"):
        return split(hugging_face(source.removeprefix("hf:"), scale=scale), part)
    if folder:
        return _of_folder(path, part, size)
    if is_idx(path):
        return split(_of_bytes(read_idx(path), source), part)
    if array:
        return split(array_file(path, scale=scale), part)
    raise ValueError(
        "data must be digits, fashion-mnist, cifar10, hf:NAME, a folder of images, of IDX files or "
        "of CIFAR's binary version, an IDX file of images (NAME-images-idx3-ubyte[.gz]), or a .npy "
        f"or .npz file, got {source!r}"
    )


def image_folder(folder: str | Path, *, size: Size | None = None, channels: int = 3) -> Images:
    """Images of a folder, whose sub-folders are the classes, in the order of their names.

    Without sub-folders that hold images, all are of class 0. Files are read by Pillow, which turns
    any kind of image into RGB, or grey for one channel.

    Args:
        folder: what to read.
        size: height and width to give to every image, one number for a square: scaled so that it
            just covers them, then cropped at its centre. By default all must be of one size.
        channels: 3 or 1.

    Raises:
        ValueError: there are no images, one cannot be read, or their sizes differ.
        ImportError: Pillow is not installed.
    """
    pillow = _import("PIL.Image", "Pillow", "folders of images")
    ops = importlib.import_module("PIL.ImageOps")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    files, labels = _files_of(Path(folder))
    pixels: list[Tensor] = []
    for path in files:
        try:
            with pillow.open(path) as image:
                image = image.convert("RGB" if channels == 3 else "L")
        except OSError as error:
            raise ValueError(f"{path} must be an image: {error}") from error
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ops.fit(image, (width, height), pillow.Resampling.LANCZOS)
        array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        array = array.view(image.height, image.width, channels)
        if pixels and array.shape != pixels[0].shape:
            raise ValueError(
                f"images of {folder} must be of one size, got {list(pixels[0].shape[:2])} and for "
                f"{path.name} {list(array.shape[:2])}; give a size to scale and crop them to"
            )
        pixels.append(array)
    return Images(from_bytes(torch.stack(pixels)), torch.tensor(labels))


def array_file(path: str | Path, *, scale: float = 1.0) -> Images:
    """Images or latents of a .npy or .npz file.

    A .npy file is one array, a .npz file has it as "images" or "latents" beside "labels" [N],
    without which all are of class 0. It is uint8 [N, H, W, C], pixels, or floating point
    [N, C, H, W], taken as it is but for the factor; a .npy file with factor 1 is mapped into
    memory, not read, and float16 stays float16.

    Args:
        path: the file.
        scale: factor of floating-point values.

    Raises:
        ValueError: the file cannot be read, or holds other arrays.
    """
    numpy = importlib.import_module("numpy")
    path = Path(path)
    try:
        if path.suffix == ".npy":
            arrays = {"images": numpy.lib.format.open_memmap(path, mode="c")}
        else:
            # numpy leaves a file open that it opened itself and found broken.
            with path.open("rb") as file, numpy.load(file) as loaded:
                arrays = dict(loaded)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    found = [name for name in ("images", "latents") if name in arrays]
    if len(found) != 1:
        raise ValueError(
            f"{path} must hold one of the arrays 'images' and 'latents', got {sorted(arrays)}"
        )
    return _images_of(arrays[found[0]], arrays.get("labels"), scale, str(path))


def fashion_mnist() -> tuple[Images, Images]:
    """Fashion-MNIST's 60,000 training and 10,000 test images of 28x28, from Debian's package.

    Raises:
        ValueError: the package dataset-fashion-mnist is not installed, or a file is damaged.
    """
    parts = read_parts(FASHION_MNIST)
    if parts is None:
        raise ValueError(
            f"fashion-mnist must be in {FASHION_MNIST}, and is not; install Debian's package "
            "dataset-fashion-mnist, or give the folder of its IDX files instead of the name"
        )
    training, held_out = (_of_bytes(found, "fashion-mnist") for found in parts)
    return training, held_out


def cifar10(root: str | Path = "data", *, train: bool = True) -> Images:
    """CIFAR-10 through torchvision, which downloads it into `root` where it is not there.

    Raises:
        ImportError: torchvision is not installed.
    """
    datasets = _import("torchvision.datasets", "torchvision", "CIFAR-10")
    found = datasets.CIFAR10(str(root), train=train, download=True)
    return _images_of(found.data, found.targets, 1.0, "CIFAR-10")


def hugging_face(
    name: str,
    *,
    split: str = "train",
    image: str | None = None,
    label: str = "label",
    scale: float = 1.0,
) -> Images:
    """Images or latents of a Hugging Face data set, such as latents of ImageNet.

    Args:
        name: what `datasets.load_dataset` takes, a name or a folder.
        split: of the data set.
        image: the column: pictures, uint8 [H, W, C], or floating point [C, H, W]; by default the
            one that there is of "image", "img", "latents" and "latent".
        label: the column of classes; where there is none, all are of class 0.
        scale: factor of floating-point values.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: a column is not there, or of another shape.
    """
    datasets = _import("datasets", "datasets", "data sets of Hugging Face")
    found = datasets.load_dataset(name, split=split)
    known = ("image", "img", "latents", "latent") if image is None else (image,)
    columns = [column for column in known if column in found.column_names]
    if len(columns) != 1:
        raise ValueError(
            f"{name} must have one column of {known}, got {found.column_names}; name it by image="
        )
    labelled = label in found.column_names
    found = found.select_columns([*columns, *([label] if labelled else [])]).with_format("numpy")
    batches = list(found.iter(batch_size=ROWS_AT_A_TIME))
    numpy = importlib.import_module("numpy")
    arrays = numpy.concatenate([numpy.stack(list(batch[columns[0]])) for batch in batches])
    labels = numpy.concatenate([batch[label] for batch in batches]) if labelled else None
    return _images_of(arrays, labels, scale, name)


def _of_folder(folder: Path, part: Part, size: Size | None) -> tuple[Images, Images]:
    parts = read_parts(folder)
    if parts is None:
        return split(image_folder(folder, size=size), part)
    if size is not None:
        raise ValueError(
            f"size is for a folder of images, got {size} with {folder}, whose IDX or CIFAR files "
            "have one; leave it"
        )
    training, held_out = (_of_bytes(found, str(folder)) for found in parts)
    return choose_part(training, held_out, part)


def _of_bytes(found: ByteImages, of: str) -> Images:
    return _images_of(found.pixels, found.labels, 1.0, of)


def _images_of(array: Any, labels: Any, scale: float, of: str) -> Images:
    try:
        images = torch.as_tensor(array)
    except TypeError as error:
        raise ValueError(f"{of} must hold one array of numbers: {error}") from error
    if images.dtype == torch.uint8:
        if scale != 1:
            raise ValueError(f"scale is for floating-point values, got {scale} with bytes in {of}")
        images = from_bytes(images)
    elif not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            f"{of} must hold uint8 [N, H, W, C] or floating point [N, C, H, W], "
            f"got {images.dtype} {list(images.shape)}"
        )
    elif scale != 1:
        images = images * scale
    if labels is None:
        return Images(images, torch.zeros(len(images), dtype=torch.int64))
    classes = torch.as_tensor(labels)
    if classes.is_floating_point() or classes.shape != images.shape[:1]:
        raise ValueError(
            f"{of} must hold a label, an integer, for each of {len(images)} images, "
            f"got {classes.dtype} {list(classes.shape)}"
        )
    if len(classes) and classes.min() < 0:
        raise ValueError(f"labels of {of} must not be negative, got {int(classes.min())}")
    return Images(images, classes.long())


def _files_of(folder: Path) -> tuple[list[Path], list[int]]:
    """The images of a folder and their classes."""
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of images, and is none")
    kinds = [_images_in(child.rglob("*")) for child in sorted(folder.iterdir()) if child.is_dir()]
    kinds = [files for files in kinds if files]
    loose = _images_in(folder.iterdir())
    if kinds and loose:
        raise ValueError(
            f"{folder} must hold images or sub-folders of them, got both; "
            f"move {loose[0].name} into the folder of its class"
        )
    kinds = kinds or [loose]
    if not kinds[0]:
        raise ValueError(f"{folder} must hold images ({', '.join(SUFFIXES)}), got none")
    return [f for files in kinds for f in files], [
        c for c, files in enumerate(kinds) for _ in files
    ]


def _images_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


def _import(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} need the package {package}, which is not installed; "
            f"`pip install {package.lower()}`"
        ) from error
