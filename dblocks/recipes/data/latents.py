"""Latents of images: folders of arrays with labels, such as latents of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dblocks.recipes.data.image_files import array_file, image_name, images_of, read_arrays
from dblocks.recipes.data.splits import Images

SUFFIXES = (".npz", ".safetensors", ".npy")
LABELS = "labels"
HELD_OUT = ("test", "val", "validation")


def read_latents(folder: Path, scale: float) -> tuple[Images, Images | None] | None:
    """Training and held-out latents; None if the folder holds no arrays.

    A folder holds `*.npz` or `*.safetensors` files, each with `latents` (or `images`) [n, C, H, W]
    and `labels` [n]; or `NAME.npy` [n, C, H, W] and `NAME-labels.npy` [n], or `latents.npy` and
    `labels.npy`. Files are concatenated in the order of their names. Held-out latents are in a
    sub-folder test, val or validation next to one named train.

    A single .npy file of latents is memory-mapped; use this form for large data.

    Raises:
        ValueError: a file is damaged, lacks labels, or does not fit the others.
        ImportError: safetensors is not installed.
    """
    if not (training := folder / "train").is_dir():
        files = _files_of(folder)
        return (_read(files, scale), None) if files else None
    if not (files := _files_of(training)):
        return None
    others = (_files_of(folder / name) for name in HELD_OUT)
    held_out = next((files for files in others if files), None)
    return _read(files, scale), _read(held_out, scale) if held_out else None


def _files_of(folder: Path) -> list[Path]:
    found = [p for p in sorted(folder.glob("*")) if p.suffix in SUFFIXES and p.is_file()]
    return [p for p in found if not p.name.startswith(".") and not _is_labels(p)]


def _is_labels(path: Path) -> bool:
    return path.suffix == ".npy" and (path.stem == LABELS or path.stem.endswith(f"-{LABELS}"))


def _read(files: Sequence[Path], scale: float) -> Images:
    parts = [_read_one(path, scale) for path in files]
    shapes = [(list(part.images.shape[1:]), part.images.dtype) for part in parts]
    for path, shape in zip(files, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"latents of {path.parent} must have one shape and dtype, got {shapes[0]} and for "
                f"{path.name} {shape}"
            )
    if len(parts) == 1:
        return parts[0]
    return Images(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def _read_one(path: Path, scale: float) -> Images:
    if path.suffix == ".npy":
        return _with_labels(path, scale)
    arrays = _read_safetensors(path) if path.suffix == ".safetensors" else read_arrays(path)
    if LABELS not in arrays:
        raise ValueError(f"{path} must also hold labels [n], got {sorted(arrays)}")
    return images_of(arrays[image_name(arrays, path)], arrays[LABELS], scale, str(path))


def _with_labels(path: Path, scale: float) -> Images:
    named = path.with_name(f"{path.stem}-{LABELS}.npy")
    labels = path.with_name(f"{LABELS}.npy") if path.stem == "latents" else named
    if not labels.is_file():
        raise ValueError(f"{path} needs its labels in the same folder, in {labels.name}")
    latents = array_file(path, scale=scale)
    return images_of(latents.images, read_arrays(labels)["images"], 1.0, str(path))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "latents in safetensors files need the package safetensors, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
