"""Images and latents by name, from files and from packages that offer data sets.

Images have pixel values in [-1, 1]. Latents are multiplied by a factor that the caller states, such
as .18215 for those of Stable Diffusion's autoencoder, so that their standard deviation is about 1.
Packages are imported when something is loaded through them.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from dblocks.recipes.data.byte_images import ByteImages, is_idx, read_idx, read_parts
from dblocks.recipes.data.digits import digits
from dblocks.recipes.data.image_files import array_file, image_folder, images_of
from dblocks.recipes.data.pictures import Size, import_package
from dblocks.recipes.data.splits import Images, Part, choose_part, split

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
ROWS_AT_A_TIME = 1024  # of a Hugging Face data set


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
    datasets = import_package("torchvision.datasets", "torchvision", "CIFAR-10")
    found = datasets.CIFAR10(str(root), train=train, download=True)
    return images_of(found.data, found.targets, 1.0, "CIFAR-10")


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
        image: the column: pictures, uint8 [H, W, C], or floating point [C, H, W], of one size and
            one number of channels, see `image_files.array_file`; by default the one that there
            is of "image", "img", "latents" and "latent".
        label: the column of classes; where there is none, all are of class 0.
        scale: factor of floating-point values.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: a column is not there, or of another shape.
    """
    datasets = import_package("datasets", "datasets", "data sets of Hugging Face")
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
    try:
        arrays = numpy.concatenate([numpy.stack(list(batch[columns[0]])) for batch in batches])
    except ValueError as error:
        raise ValueError(
            f"{columns[0]} of {name} must be of one size and number of channels: {error}"
        ) from error
    labels = numpy.concatenate([batch[label] for batch in batches]) if labelled else None
    return images_of(arrays, labels, scale, name)


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
    return images_of(found.pixels, found.labels, 1.0, of)
