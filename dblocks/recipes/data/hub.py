"""Images of Hugging Face data sets, downloaded by the package datasets."""

from __future__ import annotations

import importlib

from dblocks.recipes.data.image_files import images_of
from dblocks.recipes.data.pictures import import_package
from dblocks.recipes.data.splits import Images

ROWS_AT_A_TIME = 1024


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
        name: argument of `datasets.load_dataset`, a name or a folder.
        split: split of the data set.
        image: column of images: pictures, uint8 [H, W, C] or floating point [C, H, W], of one size
            and number of channels, see `image_files.array_file`; by default "image", "img",
            "latents" or "latent".
        label: column of classes; if it does not exist, all images have class 0.
        scale: factor of floating-point values.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: a column is missing, or has another shape.
    """
    datasets = import_package("datasets", "datasets", "data sets of Hugging Face")
    found = datasets.load_dataset(name, split=split)
    known = ("image", "img", "latents", "latent") if image is None else (image,)
    columns = [column for column in known if column in found.column_names]
    if len(columns) != 1:
        raise ValueError(
            f"{name} must have one of the columns {known}, got {found.column_names}; give its name "
            "as image="
        )
    labelled = label in found.column_names
    found = found.select_columns([*columns, *([label] if labelled else [])]).with_format("numpy")
    batches = list(found.iter(batch_size=ROWS_AT_A_TIME))
    numpy = importlib.import_module("numpy")
    try:
        arrays = numpy.concatenate([numpy.stack(list(batch[columns[0]])) for batch in batches])
    except ValueError as error:
        raise ValueError(
            f"{columns[0]} of {name} must have one size and number of channels: {error}"
        ) from error
    labels = numpy.concatenate([batch[label] for batch in batches]) if labelled else None
    return images_of(arrays, labels, scale, name)
