"""Reads an image file as uint8 pixels, as an image viewer shows it.

Pillow is imported when an image is read.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Size = int | tuple[int, int]

WHITE = 255
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
LARGEST_16 = 2**16 - 1
TO_BYTE = 257  # (2^16 - 1)/(2^8 - 1)


def read_picture(
    path: str | Path, channels: int, size: Size | None = None, *, file: BinaryIO | None = None
) -> Tensor:
    """The image of a file, rotated upright by its EXIF orientation; uint8 [H, W, C].

    16-bit pixels are scaled to 8 bits, transparent pixels are composited over white, and palettes,
    CMYK and black-and-white images are converted to RGB or grey. Colour profiles are not applied.
    From a camera's multi-picture file, the first picture is read.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey.
        size: height and width, see `image_files.image_folder`.
        file: an open file to read instead; `path` is then its name in errors.

    Raises:
        ValueError: the file cannot be read, is cut off or animated, or has an unsupported pixel
            format; the message names it.
        ImportError: Pillow is not installed.
    """
    pillow = import_package("PIL.Image", "Pillow", "folders of images")
    ops = importlib.import_module("PIL.ImageOps")
    broken = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)
    try:
        with pillow.open(path if file is None else file) as image:
            _check_one(image)
            image.load()
            image = _composed(ops.exif_transpose(image), pillow)
            image = image.convert("RGB" if channels == 3 else "L")
    except (*broken, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} must be an image: {error}") from error
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ops.fit(image, (width, height), pillow.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels)


def _check_one(image: Any) -> None:
    # A phone's .jpg may be an MPO: the picture, followed by depths or a second view.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(
            f"it must hold one picture, got an animation of {frames}; save a single frame"
        )


def _composed(image: Any, pillow: Any) -> Any:
    """The image without transparency, in a mode that Pillow converts correctly."""
    clear = image.info.get("transparency")
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return _of_16_bits(image, clear, pillow)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels must have 8 or 16 bits, got mode {image.mode!r}, whose range is unknown; "
            "convert it, or use a .npy file of floating point"
        )
    if isinstance(clear, tuple) and max(clear) > WHITE:
        raise ValueError("a transparent colour must have 8 bits, got 16; use an alpha")
    if clear is None and image.mode not in WITH_ALPHA:
        return image
    image = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", image.size, (WHITE,) * 4), image)


def _of_16_bits(image: Any, clear: int | None, pillow: Any) -> Any:
    """Converts 16-bit grey to 8-bit grey; pixels of the value `clear` become white."""
    values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    if clear is not None:
        values = values.masked_fill(values == clear, LARGEST_16)
    grey = (values + TO_BYTE // 2).div(TO_BYTE, rounding_mode="floor").to(torch.uint8)
    return pillow.frombytes("L", image.size, bytes(grey.tolist()))


def import_package(module: str, package: str, purpose: str) -> Any:
    """Imports a module of an optional package; an ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} need the package {package}, which is not installed; "
            f"`pip install {package.lower()}`"
        ) from error
