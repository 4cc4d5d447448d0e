"""What the runs of language models on text share: the text, its batches, places to continue."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks.recipes.data.text import (
    TOKENIZER_FILE,
    Corpus,
    Text,
    Tokenizer,
    load_corpus,
    random_windows,
    tokenizer_from_json,
)
from dblocks.recipes.run import Batch, Learner, Run

NOISE_SEED = 7  # of the noise that evaluation and samples start from
SAMPLES = 32
PROMPT = 16  # tokens of held-out text that a sample continues


@dataclass(frozen=True, kw_only=True)
class TextRun(Run, ABC):
    """Everything that decides the outcome of a run on text; see `load_corpus`."""

    data: str = "pydoc"
    """The text: pydoc, gcide, or the path of a file in UTF-8; see `read_text`."""
    tokenizer: str | None = None
    """Path of a Hugging Face tokenizer.json; characters by default."""
    context: int = 128
    """Tokens in a window; `batch_size` counts windows."""
    width: int = 192
    """Width of the rows."""
    heads: int = 3
    """Attention heads."""
    windows: int = 1024
    """Windows of the held-out text, spread evenly, that results are measured on; all of them where
    there are fewer, as of pydoc."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context <= PROMPT:
            raise ValueError(
                f"context must be more than the {PROMPT} tokens that samples continue, "
                f"got {self.context}"
            )

    def corpus(self) -> Corpus:
        """The text, tokenized and split.

        Raises:
            ValueError: the text or the tokenizer cannot be read.
            ImportError: the tokenizer needs a package that is not installed.
        """
        return load_corpus(self.data, part=self.part, tokenizer=self._tokenizer())

    def _tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        try:
            text = Path(self.tokenizer).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer must be a readable JSON file: {error}") from error
        return tokenizer_from_json(text)


class TextLearner(Learner, ABC):
    """A language model in training on text.

    Args:
        run: what to train.
        corpus: what to train on and what to evaluate on.
        *how: as of `Learner`, from `make` on.
    """

    def __init__(self, run: TextRun, corpus: Corpus, *how: Any) -> None:
        for name, text in (("training", corpus.training), ("held-out", corpus.evaluated)):
            if len(text.tokens) < run.context:
                raise ValueError(
                    f"the {name} text must have at least a window of {run.context} tokens, "
                    f"got {len(text.tokens)}; choose a shorter context or a longer text"
                )
        super().__init__(run, *how)
        self.text, self.corpus = run, corpus

    def host_batch(self, step: int) -> Batch:
        """Batch number `step`, on the CPU."""
        run = self.text
        tokens = self.corpus.training.tokens
        return {
            "tokens": random_windows(tokens, run.context, run.batch_size, seed=run.seed, step=step)
        }

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer."""
        (folder / TOKENIZER_FILE).write_text(self.corpus.tokenizer.to_json(), encoding="utf-8")

    def progress(self, point: dict[str, Any]) -> str:
        """The bits per character."""
        return f"{point['bits']:.3f} bits a character"


def continuations(text: Text, context: int) -> tuple[Tensor, Tensor]:
    """Prompts spread evenly over a text, and how the text itself goes on, up to `context` tokens.

    Returns:
        int64 [SAMPLES, PROMPT] and [SAMPLES, context - PROMPT].
    """
    starts = torch.linspace(0, len(text.tokens) - context, SAMPLES, dtype=torch.float64).long()
    windows = text.tokens[starts[:, None] + torch.arange(context)]
    return windows[:, :PROMPT], windows[:, PROMPT:]
