"""Image folders with train/ and val/ or test/, and Tiny-ImageNet's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dblocks.recipes.data.image_files import SUFFIXES, check_size, files_of, read_pictures
from dblocks.recipes.data.pictures import Size
from dblocks.recipes.data.splits import Images

HELD_OUT = ("test", "val", "valid", "validation")
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's list of the images of val/
Parts = tuple[Images, Images]


def read_class_folders(folder: Path, size: Size | None, channels: int) -> Parts | None:
    """Training and held-out images; None for folders of another layout.

    It holds `train/CLASS/...`, and either Tiny-ImageNet's `val/images` with `val_annotations.txt`,
    or `test/CLASS/...`, `val/CLASS/...` or the like. Classes are numbered in the order of their
    names in train.

    Args:
        folder: the folder.
        size: see `image_files.image_folder`.
        channels: 3 or 1.

    Raises:
        ValueError: an image cannot be read or has no class, or a class is not in train.
    """
    check_size(size, channels)
    training = folder / "train"
    names = [path.name for path in _folders(training)]
    if not names:
        return None
    if (folder / "val" / ANNOTATIONS).is_file():
        held_out = _annotated(folder / "val", names)
    elif (found := _held_out(folder)) is not None:
        held_out = _by_class(found, names)
    else:
        return None
    parts = (_by_class(training, names), held_out)
    first, second = (read_pictures(*part, folder, size, channels) for part in parts)
    if first.images.shape[1:] != second.images.shape[1:]:
        raise ValueError(
            f"images of {folder} must have one size, got {list(first.images.shape[2:])} and held "
            f"out {list(second.images.shape[2:])}; give a size to resize and crop them to"
        )
    return first, second


def _held_out(folder: Path) -> Path | None:
    """The first held-out part with classes; ValueError if images are not in class folders."""
    found = [folder / name for name in HELD_OUT if (folder / name).is_dir()]
    for part in found:
        if _folders(part):
            return part
    loose = [part for part in found if any(p.suffix.lower() in SUFFIXES for p in part.iterdir())]
    if loose:
        raise ValueError(
            f"{loose[0]} must hold a sub-folder for each class, as train does, got images without "
            "classes; move them into the folders of their classes"
        )
    return None


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _by_class(part: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images of a part and their classes, which are its sub-folders."""
    files: list[Path] = []
    labels: list[int] = []
    for child in _folders(part):
        if child.name not in names:
            raise ValueError(f"{child} must be a class of train, and is not")
        # Tiny-ImageNet stores images one level deeper.
        inner = child / "images" if (child / "images").is_dir() else child
        found, _ = files_of(inner)
        files += found
        labels += [names.index(child.name)] * len(found)
    return files, labels


def _annotated(part: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images in Tiny-ImageNet's list, which must be those in the folder."""
    path = part / ANNOTATIONS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    classes: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        kind = rest.partition("\t")[0]
        if kind not in names or Path(name).name != name or name in classes:
            raise ValueError(
                f"line {number} of {path} must be an image of val/images and a class of train, "
                f"got {line[:80]!r}"
            )
        classes[name] = names.index(kind)
    files, _ = files_of(part / "images")
    differ = {file.name for file in files} ^ classes.keys()
    if differ:
        raise ValueError(
            f"{path} must list exactly the images of {part / 'images'}; "
            f"{min(differ)} is in one of them only"
        )
    return files, [classes[file.name] for file in files]
