"""`dblocks train causal-lm`, `dblocks eval causal-lm` and `dblocks sample causal-lm`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dblocks.recipes.commands.common import check_steps, train_and_save
from dblocks.recipes.commands.text import SampleText, TrainText, load_text_model, print_bits

DEFAULT_OUT = Path("runs/causal-lm")


@dataclass(frozen=True, kw_only=True)
class Train(TrainText):
    """Train a 12-layer language model on text, block by block or end to end, and save it.

    Block by block, the layers are split into equal runs ("blocks"). Each block learns to denoise
    the next token's embedding within its own range of noise levels, from the text before it, so
    that a training step runs, and keeps in memory, one block only. Prints the bits per character of
    held-out text and what it cost; writes model.safetensors, config.json, tokenizer.json and
    run.json into --out.
    """

    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    published: bool = False
    """As in the paper: clean and noisy rows side by side, a learned head, AdaLN, and each block's
    draws in its own range of noise only."""
    tokens_per_block: int = 1
    """Tokens that are predicted, and written, at once."""
    out: Path = DEFAULT_OUT
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from benchmarks.study.causal_lm import BITS_COLUMNS
        from dblocks.recipes.causal_lm import GPU, PUBLISHED, CausalLMRun
        from dblocks.recipes.report import COSTS

        published = PUBLISHED if self.published else {}
        run = self.changed(
            CausalLMRun(), GPU,
            blocks=self.blocks, tokens_per_block=self.tokens_per_block, **published,
        )  # fmt: skip
        train_and_save(run, self.out, (*BITS_COLUMNS, *COSTS))
        print("Write text with")
        print(f"dblocks sample causal-lm --checkpoint {self.out} --prompt 'The '")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved language model."""

    data: str = "pydoc"
    """What to evaluate on: the last tenth of this text; see `dblocks train causal-lm`."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train causal-lm` wrote."""
    windows: int = 1024
    """Windows of it to score, spread evenly; all of them where there are fewer."""

    def __call__(self) -> None:
        """Load, score the held-out part, and print the bits per character."""
        from dblocks.models import CausalLM
        from dblocks.recipes.data.text import load_corpus

        model, network, tokenizer = load_text_model(self.checkpoint, CausalLM, "causal-lm")
        text = load_corpus(self.data, tokenizer=tokenizer).evaluated
        print_bits(model, text, network.config.context, self.windows)


@dataclass(frozen=True, kw_only=True)
class Sample(SampleText):
    """Let a saved language model continue a text; characters appear as they are written."""

    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train causal-lm` wrote."""
    steps: int | None = None
    """Denoising steps a token; 1 runs the first block alone. By default tokens are drawn from the
    product of all blocks' predictions or, where blocks were trained as published, by one step for
    each block."""

    def __call__(self) -> None:
        """Load, and print the prompt and what follows."""
        from dblocks.blocks import trained_at_top
        from dblocks.models import CausalLM

        model, _, tokenizer = load_text_model(self.checkpoint, CausalLM, "causal-lm")
        in_blocks = check_steps(self.steps, self.checkpoint, model)
        product = in_blocks and self.steps is None and trained_at_top(model)
        self.write(model, tokenizer, self.steps, product=product)
