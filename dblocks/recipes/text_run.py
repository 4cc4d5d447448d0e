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

PROMPT = 16  # number of held-out tokens in the prompt of a sample


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of runs on text, in addition to those of every run."""

    data: str = "pydoc"
    """Training text: pydoc, the documentation that ships with Python; gcide, 20 million characters
    of a dictionary from Debian's package dict-gcide; wordnet, the glosses from Debian's package
    wordnet-base; text8, lm1b or openwebtext, with --data-path; or the path of a text file, or of a
    folder of text, parquet or arrow files."""
    data_path: str | None = None
    """File or folder of text8, lm1b or openwebtext."""
    fold: Fold | None = None
    """Reduce the text to the letters a to z and single spaces, as in text8."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json; by default every character is a token."""
    context: int = 128
    """Number of tokens per window, the longest text that the model supports."""
    width: int = 192
    """Width of the rows."""
    heads: int = 3
    """Attention heads."""
    windows: int = 1024
    """Number of held-out windows for the result, evenly spaced; at most all of them, as for
    pydoc."""

    def check_context(self) -> None:
        """Raises ValueError if the context has no room for samples after the prompt."""
        if self.context <= PROMPT:
            raise ValueError(
                f"context must be more than the {PROMPT} tokens of a sample's prompt, "
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
    """Evenly spaced prompts from a text and their true continuations, up to `context` tokens.

    Returns:
        int64 [SAMPLES, PROMPT] and [SAMPLES, context - PROMPT].
    """
    starts = torch.linspace(0, len(text.tokens) - context, SAMPLES, dtype=torch.float64).long()
    windows = text.tokens[starts[:, None] + torch.arange(context)].long()
    return windows[:, :PROMPT], windows[:, PROMPT:]
