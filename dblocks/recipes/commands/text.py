"""What the commands of language models share."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dblocks.recipes.commands.common import load_network
from dblocks.recipes.run import check_seed

if TYPE_CHECKING:
    from dblocks.recipes.text_run import TextRun


@dataclass(frozen=True, kw_only=True)
class TrainText:
    """Options of training a language model."""

    data: str = "pydoc"
    """What to train on: pydoc, the documentation that ships with Python; gcide, 20 million
    characters of the dictionary of Debian's package dict-gcide; or a text file."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; by default every character is a token."""
    recipe: Literal["small", "gpu"] = "small"
    """Sizes and steps: small, for ten minutes on 2 cores; gpu, 100 to 200 million parameters."""
    end_to_end: bool = False
    """Train the usual way instead, to compare with."""
    steps: int | None = None
    """Training steps of one batch each; a step trains one block. By default the recipe's."""
    lr: float | None = None
    """Peak learning rate of AdamW: a short warm-up leads to it, a cosine from it to 0."""
    batch_size: int | None = None
    """Windows of text in a batch."""
    context: int | None = None
    """Tokens in a window: the longest text that the model sees."""
    windows: int | None = None
    """Windows of held-out text that the result is measured on, spread evenly; 1024 by default."""
    seed: int = 0
    """Of weights, order of the data and noise; the held-out text is always the same."""

    def changed(self, small: TextRun, gpu: TextRun, **more: Any) -> Any:
        """The recipe with the options that were given, and `more` fields of it."""
        given = {
            name: value
            for name in ("steps", "lr", "batch_size", "context", "windows")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            gpu if self.recipe == "gpu" else small,
            data=self.data,
            tokenizer=None if self.tokenizer is None else str(self.tokenizer),
            end_to_end=self.end_to_end,
            seed=self.seed,
            **given,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """Options of writing token by token."""

    prompt: str = "The "
    """The text to continue."""
    tokens: int = 100
    """Tokens to write; with those of the prompt they must fit into the model's context."""
    temperature: float = 1.0
    """What logits are divided by; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among so many most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens that have this probability together."""
    seed: int = 0
    """Of noise and choices."""

    def write(
        self, model: Any, tokenizer: Any, steps: int | None, *, product: bool = False
    ) -> None:
        """Prints the prompt and what follows, with so many steps for each token or the product."""
        import torch

        from dblocks.sampling import stream

        check_seed(self.seed)
        prompt = prompt_tokens(self.prompt, tokenizer)
        written = stream(
            model,
            [prompt],
            max_new_tokens=self.tokens,
            num_steps=steps,
            product=product,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=torch.Generator().manual_seed(self.seed),
        )
        print_stream(prompt, written, tokenizer)


def load_text_model(folder: Path, kind: type, command: str) -> tuple[Any, Any, Any]:
    """The model of a folder, its network, and its tokenizer; see `load_network`.

    Raises:
        ValueError: the folder does not hold them.
    """
    from dblocks.recipes.data.text import TOKENIZER_FILE, tokenizer_from_json

    model, network = load_network(folder, kind, command)
    try:
        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} must hold a {TOKENIZER_FILE}: {error}") from error
    return model, network, tokenizer_from_json(text)


def print_bits(model: Any, text: Any, context: int, windows: int) -> None:
    """Prints what is known of the bits per character of a text under a language model."""
    from dblocks.blocks import DiffusionBlocks, trained_at_top
    from dblocks.recipes.autoregressive import bits_per_character, bound_of

    bits = bits_per_character(model, text, context, windows=windows)
    in_blocks = isinstance(model, DiffusionBlocks)
    how = "the first block alone" if in_blocks else "trained end to end"
    print(f"{bits:.3f} bits a character on {text.characters:,} held-out characters, {how}")
    if not isinstance(model, DiffusionBlocks):
        return
    if trained_at_top(model):
        bits = bits_per_character(model, text, context, product=True, windows=windows)
        print(f"{bits:.3f} bits a character, the product of all blocks")
    bound = bound_of(model, text, context, windows=windows)
    print(
        f"{bound['bits']:.3f} bits a character, a bound of denoising by all blocks "
        f"(standard error {bound['std_error']:.3f})"
    )


def prompt_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of `--prompt`, at least one."""
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("--prompt must have at least one token; give some text")
    return tokens


def print_stream(prompt: list[int], steps: Iterable[Any], tokenizer: Any) -> None:
    """Prints a text while it is written, token by token."""
    written, shown = [], tokenizer.decode(prompt)
    sys.stdout.write(shown)
    for token in steps:
        written.append(int(token))
        # Tokens of a file may stand for parts of a character: only whole text grows.
        text = tokenizer.decode([*prompt, *written])
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    print()
