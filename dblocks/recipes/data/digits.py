"""The handwritten digits that ship with scikit-learn, which is imported when they are loaded."""

import torch

from dblocks.recipes.data.splits import Images, Part, split

NUM_CLASSES = 10
IMAGE_SIZE = 8
MAX_PIXEL = 16.0  # a pixel of scikit-learn's digits counts the black pixels of a 4x4 cell


def load_digits() -> Images:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, in their stored order.

    Raises:
        ImportError: scikit-learn is not installed; it comes with the extra `dblocks[eval]`.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "the digits need the package scikit-learn, which is not installed; "
            "`pip install 'dblocks[eval]'`"
        ) from error
    pixels, labels = load(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return Images(images * (2 / MAX_PIXEL) - 1, torch.from_numpy(labels).long())


def digits(part: Part = "final") -> tuple[Images, Images]:
    """Disjoint sets of digits for training and evaluation.

    Args:
        part: "final" trains on the whole training part (70 %) and evaluates on the held-out part
            (30 %); "selection" never sees the held-out part: it trains on 80 % of the training
            part and evaluates on the other 20 %, the validation part.
    """
    return split(load_digits(), part)
