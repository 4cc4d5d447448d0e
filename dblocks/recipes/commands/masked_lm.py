"""`dblocks train masked-lm`, `dblocks eval masked-lm` and `dblocks sample masked-lm`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dblocks.recipes.commands.common import progress_bar, train_and_save
from dblocks.recipes.commands.text import TrainText, load_text_model, prompt_tokens
from dblocks.recipes.run import check_seed

DEFAULT_OUT = Path("runs/masked-lm")
TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class Train(TrainText):
    """Train a 12-layer model that fills in the masked tokens of a text, and save it.

    In training a random share of the tokens is masked, and the model guesses them from those on
    both sides. Block by block, the layers are split into equal runs ("blocks"), each for its own
    range of that share, so that a training step runs, and keeps in memory, one block only. Prints
    the bits per character of held-out text and what it cost; writes model.safetensors, config.json,
    tokenizer.json and run.json into --out.
    """

    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    schedule: Literal["linear", "cosine", "poly2"] = "linear"
    """The masked share as a function of time: it names the levels, and with --draw t decides which
    shares are seen how often."""
    draw: Literal["alpha", "t"] = "alpha"
    """What training draws evenly: alpha, the share that is not masked, or the time t."""
    out: Path = DEFAULT_OUT
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from benchmarks.study.masked_lm import BITS_COLUMNS
        from dblocks.recipes.masked_lm import GPU, MaskedLMRun
        from dblocks.recipes.report import COSTS

        run = self.changed(
            MaskedLMRun(), GPU, blocks=self.blocks, schedule=self.schedule, draw=self.draw
        )
        train_and_save(run, self.out, (*BITS_COLUMNS, *COSTS))
        print("Write text, or fill the gaps of one, with")
        print(f"dblocks sample masked-lm --checkpoint {self.out} --prompt 'The '")
        print(f"dblocks sample masked-lm --checkpoint {self.out} --infill 'The ______ is a string'")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved masked model.

    An upper bound of them: the expected cost of filling in the text in random order.
    """

    data: str = "pydoc"
    """What to evaluate on: the last tenth of this text; see `dblocks train masked-lm`."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train masked-lm` wrote."""
    points: int | None = None
    """Masked shares to measure at, evenly spaced; a multiple of the number of blocks. 12 or a few
    more by default."""
    seed: int = 0
    """Of the masks."""

    def __call__(self) -> None:
        """Load, score the held-out part, and print the bits per character."""
        from dblocks.models import MaskedLM
        from dblocks.recipes.data.text import load_corpus
        from dblocks.recipes.metrics.masked import bits_per_character
        from dblocks.sampling import points_for

        check_seed(self.seed)
        model, network, tokenizer = load_text_model(self.checkpoint, MaskedLM, "masked-lm")
        text = load_corpus(self.data, tokenizer=tokenizer).evaluated
        points = points_for(model.config.num_blocks) if self.points is None else self.points
        found = bits_per_character(
            model, text, network.config.context, points=points, seed=self.seed
        )
        print(
            f"{found.bits:.3f} bits a character (bound, standard error {found.error:.3f}) on "
            f"{text.characters:,} held-out characters"
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Let a saved masked model continue a text, or fill the gaps of one.

    All tokens are written together, a few in each step, in random order.
    """

    prompt: str = "The "
    """The text to continue."""
    infill: str | None = None
    """A text with gaps instead: each _ stands for one token to fill in."""
    gap: str = "_"
    """The character that stands for a token to fill in."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train masked-lm` wrote."""
    tokens: int | None = None
    """Tokens to write after the prompt: by default 100, or as many as fit into the context."""
    steps: int | None = None
    """Steps; by default as many as tokens in all. Steps that fill in nothing cost nothing."""
    temperature: float = 1.0
    """What logits are divided by; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among so many most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens that have this probability together."""
    seed: int = 0
    """Of the order and the choices."""

    def __call__(self) -> None:
        """Load, write with a progress bar, and print the text and how often each block ran."""
        import torch

        from dblocks.models import MaskedLM
        from dblocks.sampling import unmask

        check_seed(self.seed)
        model, network, tokenizer = load_text_model(self.checkpoint, MaskedLM, "masked-lm")
        sequence = torch.tensor([self._sequence(tokenizer, network.config.context)])
        with progress_bar("writing") as bar:

            def show(state: dict[str, Any]) -> None:
                bar.total = state["num_steps"]
                bar.update()

            written = unmask(
                model,
                sequence,
                num_steps=self.steps,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=torch.Generator().manual_seed(self.seed),
                callback=show,
            )
        print(tokenizer.decode(written.tokens[0].tolist()))
        calls = ", ".join(f"block {b}: {n}" for b, n in enumerate(written.calls))
        print(f"calls of each block's layers: {calls}")

    def _sequence(self, tokenizer: Any, context: int) -> list[int]:
        """The tokens, with masks where to write.

        Raises:
            ValueError: there is nothing to write, or no text.
        """
        from dblocks.schedules import MASKED

        if self.infill is None:
            prompt = prompt_tokens(self.prompt, tokenizer)
            tokens = min(TOKENS, context - len(prompt)) if self.tokens is None else self.tokens
            if tokens < 1 or len(prompt) + tokens > context:
                raise ValueError(
                    f"--tokens must be at least 1 and fit with the prompt's {len(prompt)} tokens "
                    f"into the context of {context}, got {tokens}"
                )
            return [*prompt, *[MASKED] * tokens]
        if len(self.gap) != 1 or self.gap not in self.infill:
            raise ValueError(
                "--infill must have a gap, the one character of --gap for each token to write, "
                f"got {self.infill!r} and {self.gap!r}"
            )
        first, *others = self.infill.split(self.gap)
        sequence = list(tokenizer.encode(first))
        for part in others:
            sequence += [MASKED, *tokenizer.encode(part)]
        return sequence
