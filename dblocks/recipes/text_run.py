"""Common options of runs on text, and the prompts of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dblocks.recipes.columns import SAMPLES
from dblocks.recipes.data.splits import Part
from dblocks.recipes.data.text import Corpus, Text, load_corpus
from dblocks.recipes.data.text_sources import Fold
from dblocks.recipes.data.tokenizers import read_tokenizer

PROMPT = 16  # tokens of the held-out text in a sample's prompt


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options of a run on text, in addition to those of every run."""

    data: str = "pydoc"
    """Text to train on: pydoc, the documentation that ships with Python; gcide, 20 million
    characters of the dictionary of Debian's package dict-gcide; wordnet, the glosses of Debian's
    package wordnet-base; text8, lm1b or openwebtext, which --data-path names; or a text file, or a
    folder of text, parquet or arrow files."""
    data_path: str | None = None
    """The file or folder of text8, lm1b or openwebtext."""
    fold: Fold | None = None
    """Reduce the text to the letters a to z and single spaces, as in text8."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json; by default every character is a token."""
    context: int = 128
    """Number of tokens in a window, the longest text that the model sees."""
    width: int = 192
    """Width of the rows."""
    heads: int = 3
    """Attention heads."""
    windows: int = 1024
    """Number of windows of held-out text for the result, spread evenly; at most all of them, as for
    pydoc."""

    def check_context(self) -> None:
        """Raises ValueError if the context leaves no room for samples after the prompt."""
        if self.context <= PROMPT:
            raise ValueError(
                f"context must be more than the {PROMPT} tokens that samples continue, "
                f"got {self.context}"
            )

    def read_corpus(self, part: Part) -> Corpus:
        """The text, tokenized and split.

        Raises:
            ValueError: the text or the tokenizer cannot be read.
            ImportError: the tokenizer needs a package that is not installed.
        """
        return load_corpus(
            self.data,
            path=self.data_path,
            fold=self.fold,
            part=part,
            tokenizer=read_tokenizer(self.tokenizer),
        )


def continuations(text: Text, context: int) -> tuple[Tensor, Tensor]:
    """Prompts spread evenly over a text, and their true continuations, up to `context` tokens.

    Returns:
        int64 [SAMPLES, PROMPT] and [SAMPLES, context - PROMPT].
    """
    starts = torch.linspace(0, len(text.tokens) - context, SAMPLES, dtype=torch.float64).long()
    windows = text.tokens[starts[:, None] + torch.arange(context)].long()
    return windows[:, :PROMPT], windows[:, PROMPT:]
