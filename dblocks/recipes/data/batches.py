"""Batches of images or text, which are functions of seed and step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dblocks.recipes.data.augment import Augment
from dblocks.recipes.data.splits import Images, batch_indices, sha256_of, values
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.data.tokenizers import TOKENIZER_FILE
from dblocks.recipes.data.windows import random_windows

Batch = dict[str, Tensor]


class Data(Protocol):
    """The training data of a network."""

    def batch(self, step: int) -> Batch:
        """Batch number `step`, on the CPU or the training device."""
        ...

    def texts(self) -> dict[str, str]:
        """Contents of files that a network needs in addition to its weights, by name."""
        ...

    def digest(self) -> str:
        """A SHA-256 of the training data."""
        ...


class ImageData:
    """Batches of images and their labels.

    Args:
        images: the training images.
        batch_size: images per batch.
        seed: seed of the order and of the augmentation.
        augment: the augmentation.
        device: device of the augmentation.

    Raises:
        ValueError: there are fewer images than `batch_size`, or they cannot be augmented.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        device: str = "cpu",
    ) -> None:
        if batch_size > len(images):
            raise ValueError(
                f"batch_size must be at most the number of training images {len(images)}, "
                f"got {batch_size}"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.device = augment or Augment(), device
        self.augment.check(images)

    def batch(self, step: int) -> Batch:
        """Images [N, C, H, W] and labels [N]."""
        size = len(self.images)
        chosen = self.images[batch_indices(size, self.batch_size, seed=self.seed, step=step)]
        images = values(chosen.images.to(self.device))
        images = self.augment(images, seed=self.seed, step=step)
        return {"images": images, "labels": chosen.labels}

    def texts(self) -> dict[str, str]:
        """No files are needed for images."""
        return {}

    def digest(self) -> str:
        """The digest of the training images and their labels."""
        return self.images.digest()


class TextData:
    """Batches of windows of a text.

    Args:
        corpus: the texts for training and evaluation.
        context: tokens per window.
        batch_size: windows per batch.
        seed: seed of their positions.

    Raises:
        ValueError: a part of the text is shorter than a window.
    """

    def __init__(self, corpus: Corpus, context: int, batch_size: int, seed: int) -> None:
        for name, text in (("training", corpus.training), ("held-out", corpus.evaluated)):
            if len(text.tokens) < context:
                raise ValueError(
                    f"the {name} text must have at least {context} tokens, one window, "
                    f"got {len(text.tokens)}; choose a shorter context or a longer text"
                )
        self.corpus, self.context = corpus, context
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> Batch:
        """Tokens [N, context]."""
        tokens = self.corpus.training.tokens
        windows = random_windows(tokens, self.context, self.batch_size, seed=self.seed, step=step)
        return {"tokens": windows}

    def texts(self) -> dict[str, str]:
        """The tokenizer."""
        return {TOKENIZER_FILE: self.corpus.tokenizer.to_json()}

    def digest(self) -> str:
        """The digest of the tokens of the training text."""
        return sha256_of(self.corpus.training.tokens)
