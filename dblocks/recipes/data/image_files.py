"""Images and latents from a folder of image files, or from a .npy or .npz file."""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks.recipes.data.gather import gather
from dblocks.recipes.data.pictures import Size, read_picture
from dblocks.recipes.data.splits import Images, from_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MOST_CHANNELS = 4  # for arrays of bytes, such as RGBA
NO_IMAGES = "__MACOSX"  # folder that macOS adds to archives


def image_folder(folder: str | Path, *, size: Size | None = None, channels: int = 3) -> Images:
    """Images of a folder, whose sub-folders are the classes, in the order of their names.

    Without sub-folders that hold images, all images have class 0. Files are read by `read_picture`:
    rotated upright, transparent pixels over white, converted to RGB, or to grey for one channel.
    Files with other endings, hidden files and folders, and `__MACOSX` are ignored.

    Args:
        folder: the folder.
        size: height and width of all images, or one number for a square: images are resized to
            cover this size, then cropped at the centre. By default all must have one size.
        channels: 3 or 1.

    Raises:
        ValueError: there are no images, one cannot be read, or their sizes differ.
        ImportError: Pillow is not installed.
    """
    check_size(size, channels)
    files, labels = files_of(Path(folder))
    return read_pictures(files, labels, Path(folder), size, channels)


def check_size(size: Size | None, channels: int) -> None:
    """Raises ValueError unless `size` and `channels` are valid."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise ValueError(f"size must be positive, got {size}")


def read_pictures(
    files: Sequence[Path], labels: Sequence[int], folder: Path, size: Size | None, channels: int
) -> Images:
    """Images of the files of a folder, with these labels."""

    def pictures() -> Iterator[Tensor]:
        first = None
        for path in files:
            picture = read_picture(path, channels, size)
            first = picture.shape if first is None else first
            if picture.shape != first:
                raise ValueError(
                    f"images of {folder} must have one size, got {list(first[:2])} and for "
                    f"{path.name} {list(picture.shape[:2])}; give a size to resize and crop them to"
                )
            yield picture

    images = gather(pictures, len(files), files, size=size, channels=channels)
    return Images(images, torch.tensor(labels))


def array_file(path: str | Path, *, scale: float = 1.0) -> Images:
    """Images or latents from a .npy or .npz file.

    A .npy file holds one array; a .npz file holds it as "images" or "latents", and optional
    "labels" [N]; without labels, all images have class 0. The array is uint8 [N, H, W, C],
    [N, C, H, W] or [N, H, W] with at most 4 channels; or floating point [N, C, H, W], which is only
    multiplied by `scale`. With scale 1, a .npy file is memory-mapped, and float16 stays float16.

    Args:
        path: the file.
        scale: factor of floating-point values.

    Raises:
        ValueError: the file cannot be read, or holds other arrays.
    """
    arrays = read_arrays(Path(path))
    return images_of(arrays[image_name(arrays, path)], arrays.get("labels"), scale, str(path))


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a .npz file by name, or the memory-mapped array of a .npy file as "images".

    Raises:
        ValueError: the file cannot be read, or holds Python objects.
    """
    numpy = importlib.import_module("numpy")
    try:
        if path.suffix == ".npy":
            return {"images": numpy.lib.format.open_memmap(path, mode="c")}
        # numpy does not close a damaged file that it opened itself.
        with path.open("rb") as file, numpy.load(file) as loaded:
            return dict(loaded)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error


def image_name(arrays: dict[str, Any], path: str | Path) -> str:
    """The name of the array of images or latents; ValueError unless there is exactly one."""
    found = [name for name in ("images", "latents") if name in arrays]
    if len(found) != 1:
        raise ValueError(
            f"{path} must hold one of the arrays 'images' and 'latents', got {sorted(arrays)}"
        )
    return found[0]


def images_of(array: Any, labels: Any, scale: float, of: str) -> Images:
    try:
        images = torch.as_tensor(array)
    except TypeError as error:
        raise ValueError(f"{of} must hold one array of numbers: {error}") from error
    if images.dtype == torch.uint8:
        if scale != 1:
            raise ValueError(f"scale needs floating-point values, got {scale} with bytes in {of}")
        images = from_bytes(_channels_last(images, of))
    elif not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            f"{of} must hold uint8 [N, H, W, C] or floating point [N, C, H, W], "
            f"got {images.dtype} {list(images.shape)}"
        )
    else:
        _check_channels_first(images, of)
        if images.numel() and not torch.stack(images.aminmax()).isfinite().all():
            raise ValueError(f"{of} must hold finite numbers, got NaN or infinite ones")
        images = images if scale == 1 else images * scale
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


def _channels_last(pixels: Tensor, of: str) -> Tensor:
    """Moves the channels, of which there are few, last in uint8 pixels; keeps [N, H, W]."""
    if pixels.ndim != 4 or pixels.shape[-1] <= MOST_CHANNELS:
        return pixels
    if pixels.shape[1] <= MOST_CHANNELS:
        return pixels.permute(0, 2, 3, 1)
    raise ValueError(
        f"bytes of {of} must be [N, H, W, C] or [N, C, H, W] with at most {MOST_CHANNELS} "
        f"channels, got {list(pixels.shape)}; convert more channels to floating point [N, C, H, W]"
    )


def _check_channels_first(images: Tensor, of: str) -> None:
    """Raises ValueError for arrays that look like [N, H, W, C], with at most 4 columns."""
    H, W, C = images.shape[1:]
    if C <= MOST_CHANNELS < min(H, W):
        raise ValueError(
            f"floating point of {of} must be [N, C, H, W], got {list(images.shape)}, which looks "
            "like [N, H, W, C]; permute(0, 3, 1, 2) puts the channels first"
        )


def files_of(folder: Path) -> tuple[list[Path], list[int]]:
    """The image files of a folder and their classes, the sub-folders in order of name."""
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of images, and is not a folder")
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    kinds = [_images_in(child.rglob("*"), folder) for child in children]
    kinds = [files for files in kinds if files]
    loose = _images_in(folder.iterdir(), folder)
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


def _images_in(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The image files among paths in a folder, without hidden files and `__MACOSX`."""

    def is_image(path: Path) -> bool:
        inside = path.relative_to(folder).parts
        left_out = any(name.startswith(".") or name == NO_IMAGES for name in inside)
        return path.suffix.lower() in SUFFIXES and not left_out and path.is_file()

    return sorted(path for path in paths if is_image(path))
