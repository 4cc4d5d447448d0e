"""`dblocks train recurrent`, `dblocks eval recurrent` and `dblocks sample recurrent`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dblocks.recipes.commands.common import train_and_save
from dblocks.recipes.commands.text import SampleText, TrainText, load_text_model, print_bits

DEFAULT_OUT = Path("runs/recurrent")


@dataclass(frozen=True, kw_only=True)
class Train(TrainText):
    """Train a small language model that thinks by running its middle layers again and again.

    Its 4 middle layers, the core, are applied many times between 2 layers before and 2 after them.
    As a block, the core learns to denoise the next token's embedding at all noise levels: a
    training step runs it once, and writing applies it as often as one likes. End to end it is
    applied about 32 times in every training step, of which the last 8 are kept in memory. Prints
    the bits per character of held-out text and what it cost; writes model.safetensors, config.json,
    tokenizer.json and run.json into --out.
    """

    blocks: int = 1
    """Blocks that the core is split into: more blocks, less memory, shorter steps."""
    out: Path = DEFAULT_OUT
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from benchmarks.study.recurrent import BITS_COLUMNS
        from dblocks.recipes.recurrent import GPU, RecurrentRun
        from dblocks.recipes.report import COSTS

        run = self.changed(RecurrentRun(), GPU, blocks=self.blocks)
        train_and_save(run, self.out, (*BITS_COLUMNS, *COSTS))
        print("Write text with")
        print(f"dblocks sample recurrent --checkpoint {self.out} --prompt 'The ' --steps 8")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved recurrent model."""

    data: str = "pydoc"
    """What to evaluate on: the last tenth of this text; see `dblocks train recurrent`."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train recurrent` wrote."""
    steps: int | None = None
    """Of a network trained end to end, how often the core is applied; by default as in training."""
    windows: int = 1024
    """Windows of the text to score, spread evenly; all of them where there are fewer."""

    def __call__(self) -> None:
        """Load, score the held-out part, and print the bits per character."""
        from dblocks.blocks import DiffusionBlocks
        from dblocks.models import RecurrentLM
        from dblocks.recipes.autoregressive import bits_per_character
        from dblocks.recipes.data.text import load_corpus

        check_steps(self.steps)
        model, network, tokenizer = load_text_model(self.checkpoint, RecurrentLM, "recurrent")
        text = load_corpus(self.data, tokenizer=tokenizer).evaluated
        context = network.config.context
        if isinstance(model, DiffusionBlocks):
            if self.steps is not None:
                raise ValueError(
                    "--steps counts recurrences of a network trained end to end, and that in "
                    f"{self.checkpoint} was trained as a denoiser; leave --steps out"
                )
            print_bits(model, text, context, self.windows)
            return
        steps = self.steps or network.config.mean_recurrence
        bits = bits_per_character(model, text, context, num_steps=steps, windows=self.windows)
        how = f"{steps} recurrence{'s' * (steps > 1)}"
        print(f"{bits:.3f} bits a character on {text.characters:,} held-out characters, {how}")


@dataclass(frozen=True, kw_only=True)
class Sample(SampleText):
    """Let a saved recurrent model continue a text; characters appear as they are written."""

    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train recurrent` wrote."""
    steps: int | None = None
    """Denoising steps a token, by default one for each block; of a network trained end to end, how
    often its core is applied, by default as in training."""

    def __call__(self) -> None:
        """Load, and print the prompt and what follows."""
        from dblocks.models import RecurrentLM

        check_steps(self.steps)
        model, _, tokenizer = load_text_model(self.checkpoint, RecurrentLM, "recurrent")
        self.write(model, tokenizer, self.steps)


def check_steps(steps: int | None) -> None:
    """Raises ValueError for `--steps` that are not positive."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be positive, got {steps}")
