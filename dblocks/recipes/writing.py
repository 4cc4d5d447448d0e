"""Common code of the language models' commands: generation and loading."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dblocks.blocks import DiffusionBlocks, trained_at_top
from dblocks.checkpoint import current, unchanged
from dblocks.checkpoint.networks import CONFIG_FILE
from dblocks.config import read_text
from dblocks.recipes.command import load_network
from dblocks.recipes.data.tokenizers import (
    LONGEST_TOKENIZER,
    TOKENIZER_FILE,
    Characters,
    tokenizer_from_json,
)
from dblocks.recipes.metrics.autoregressive import bits_per_character, bound_of
from dblocks.recipes.run import check_seed
from dblocks.sampling import stream

TOKENS = 100  # default number of tokens to generate after a prompt


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """Options of generation token by token."""

    prompt: str = "The "
    """The text to continue."""
    tokens: int | None = None
    """Number of tokens to generate after the prompt; by default 100, or as many as fit into the
    context."""
    temperature: float = 1.0
    """Divisor of the logits; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Sample only from this many most likely tokens."""
    top_p: float | None = None
    """Sample only from the smallest set of most likely tokens whose probabilities sum to at least
    this."""
    seed: int = 0
    """Seed of the noise and of the tokens."""

    def write(
        self, model: Any, tokenizer: Any, steps: int | None, *, product: bool = False
    ) -> None:
        """Prints the prompt and its continuation, by `steps` per token or the product of blocks."""
        check_seed(self.seed)
        prompt = prompt_tokens(self.prompt, tokenizer)
        network: Any = model.base_model if isinstance(model, DiffusionBlocks) else model
        fitting = max(1, network.config.context - len(prompt))
        written = stream(
            model,
            [prompt],
            max_new_tokens=min(TOKENS, fitting) if self.tokens is None else self.tokens,
            num_steps=steps,
            product=product,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=torch.Generator().manual_seed(self.seed),
        )
        print_stream(prompt, written, tokenizer)


def load_text_model(folder: Path, kind: type) -> tuple[Any, Any, Any]:
    """The model in a folder, its network and its tokenizer; see `load_network`.

    Raises:
        ValueError: the folder does not hold them.
    """
    return unchanged(folder, [CONFIG_FILE], lambda: _load_text_model(folder, kind))


def _load_text_model(folder: Path, kind: type) -> tuple[Any, Any, Any]:
    model, network = load_network(folder, kind)
    path = current(folder, TOKENIZER_FILE)
    if not path.exists():
        raise ValueError(f"{folder} must hold a {TOKENIZER_FILE} written by `dblocks train`")
    tokenizer = tokenizer_from_json(read_text(path, longest=LONGEST_TOKENIZER))
    if tokenizer.size != network.config.vocab_size:
        raise ValueError(
            f"{path} must have as many tokens as the model, {network.config.vocab_size}, "
            f"got {tokenizer.size}; it belongs to another model"
        )
    return model, network, tokenizer


def print_bits(model: Any, text: Any, context: int, windows: int) -> None:
    """Prints the bits per character of a text under a language model."""
    bits = bits_per_character(model, text, context, windows=windows)
    how = "trained end to end"
    several = isinstance(model, DiffusionBlocks) and model.config.num_blocks > 1
    if isinstance(model, DiffusionBlocks):
        how = "the first block alone" if several else "one call of the block"
    print(f"{bits:.3f} bits per character on {scored_part(text, windows)}, {how}")
    if not isinstance(model, DiffusionBlocks):
        return
    if several and trained_at_top(model):
        bits = bits_per_character(model, text, context, product=True, windows=windows)
        print(f"{bits:.3f} bits per character, the product of all blocks")
    bound = bound_of(model, text, context, windows=windows)
    print(
        f"{bound['bits']:.3f} bits per character, the denoising bound over all blocks "
        f"(standard error {bound['std_error']:.3f})"
    )


def scored_part(text: Any, windows: int) -> str:
    """A description of the scored part of a held-out text."""
    return f"up to {windows:,} windows of {text.characters:,} held-out characters"


def prompt_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of `--prompt`; ValueError if there are none.

    Says on stderr which characters the training text did not have.
    """
    tokens = tokenizer.encode(prompt)
    known = set(tokenizer.characters) if isinstance(tokenizer, Characters) else set(prompt)
    if unknown := sorted(set(prompt) - known):
        print(
            f"dblocks: {', '.join(map(repr, unknown))} of --prompt did not occur in the training "
            "text, so the network reads them as one unknown character",
            file=sys.stderr,
        )
    if not tokens:
        raise ValueError("--prompt must have at least one token; give some text")
    return tokens


def print_stream(prompt: list[int], steps: Iterable[Any], tokenizer: Any) -> None:
    """Prints a text while it is generated, token by token."""
    written, shown = [], tokenizer.decode(prompt)
    sys.stdout.write(shown)
    for token in steps:
        written.append(int(token))
        # Tokens may be parts of a character: print only complete text.
        text = tokenizer.decode([*prompt, *written])
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    print()
