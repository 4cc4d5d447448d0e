"""`dblocks train causal-lm`, `dblocks eval causal-lm` and `dblocks sample causal-lm`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dblocks.recipes._base import check_seed

DEFAULT_OUT = Path("runs/causal-lm")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a 12-layer language model on text, block by block or end to end, and save it.

    Block by block, the layers are split into equal runs ("blocks"). Each block learns to denoise
    the next token's embedding within its own range of noise levels, beside the clean text before
    it, so that a training step runs, and keeps in memory, one block only. Prints the bits per
    character of held-out text and what it cost; writes model.safetensors, config.json,
    tokenizer.json and run.json into --out.
    """

    data: str = "pydoc"
    """What to train on: pydoc, the documentation that ships with Python, or a text file."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; by default every character is a token."""
    recipe: Literal["small", "gpu"] = "small"
    """Sizes and steps: small, for ten minutes on 2 cores; gpu, 12 layers of width 768."""
    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    end_to_end: bool = False
    """Train all layers together instead, the usual way, to compare with."""
    steps: int | None = None
    """Training steps of one batch each; a step trains one block. By default the recipe's."""
    lr: float | None = None
    """Peak learning rate of AdamW: a short warm-up leads to it, a cosine from it to 0."""
    batch_size: int | None = None
    """Windows of text in a batch."""
    context: int | None = None
    """Tokens in a window: the longest text that the model sees."""
    seed: int = 0
    """Of weights, order of the data and noise; the held-out text is always the same."""
    out: Path = DEFAULT_OUT
    """Folder to write to; it is made if it is not there."""

    def __call__(self) -> None:
        """Train, save, and print the table of what it cost and reached."""
        from dblocks import checkpoint, records
        from dblocks.experiments.causal_lm import BITS_COLUMNS
        from dblocks.recipes.causal_lm import GPU, TextRun
        from dblocks.report import COSTS, text_table

        given = {
            name: value
            for name in ("steps", "lr", "batch_size", "context")
            if (value := getattr(self, name)) is not None
        }
        run = dataclasses.replace(
            GPU if self.recipe == "gpu" else TextRun(),
            data=self.data,
            tokenizer=None if self.tokenizer is None else str(self.tokenizer),
            blocks=self.blocks,
            end_to_end=self.end_to_end,
            seed=self.seed,
            **given,
        )
        checkpoint.prepare(self.out)
        if run.device == "cpu":
            records.use_one_thread()
        trained = records.train(run, progress=True)
        checkpoint.save_model(self.out, trained.learner.trained)
        trained.learner.save_beside(self.out)
        records.write_record(self.out / "run.json", trained.record)
        print(text_table({run.name: [trained.record]}, (*BITS_COLUMNS, *COSTS)))
        print(f"\nSaved model, tokenizer and run.json in {self.out}; write text with")
        print(f"dblocks sample causal-lm --checkpoint {self.out} --prompt 'The '")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved language model."""

    data: str = "pydoc"
    """What to evaluate on: the last tenth of this text; see `dblocks train causal-lm`."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train causal-lm` wrote."""
    steps: int | None = None
    """Denoising steps from noise to a token. By default 1, the first block's next-token guess."""

    def __call__(self) -> None:
        """Load, score the held-out part, and print the bits per character."""
        from dblocks import blocks
        from dblocks.recipes.causal_lm import bits_per_character
        from dblocks.text import load_corpus

        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be positive, got {self.steps}")
        model, network, tokenizer = load(self.checkpoint)
        in_blocks = isinstance(model, blocks.DiffusionBlocks)
        if self.steps is not None and not in_blocks:
            raise ValueError(
                f"--steps counts denoising steps, and the network in {self.checkpoint} was trained "
                "end to end: it runs all its layers once; leave --steps out"
            )
        text = load_corpus(self.data, tokenizer=tokenizer).evaluated
        steps = self.steps or 1
        bits = bits_per_character(model, text, network.config.context, num_steps=steps)
        how = f"{steps} denoising step{'s' * (steps > 1)}" if in_blocks else "trained end to end"
        print(f"{bits:.3f} bits a character on {text.characters:,} held-out characters, {how}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Let a saved language model continue a text; characters appear as they are written."""

    model: Literal["causal-lm"]
    """Which network to sample from: causal-lm, a language model."""
    prompt: str = "The "
    """The text to continue."""
    checkpoint: Path = DEFAULT_OUT
    """Folder that `dblocks train causal-lm` wrote."""
    tokens: int = 100
    """Tokens to write; with those of the prompt they must fit into the model's context."""
    steps: int | None = None
    """Denoising steps a token; by default one for each block. 1 runs the first block alone."""
    temperature: float = 1.0
    """What logits are divided by; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among so many most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens that have this probability together."""
    seed: int = 0
    """Of noise and choices."""

    def __call__(self) -> None:
        """Load, and print the prompt and what follows."""
        import torch

        from dblocks.generate import stream

        check_seed(self.seed)
        model, _, tokenizer = load(self.checkpoint)
        prompt = tokenizer.encode(self.prompt)
        if not prompt:
            raise ValueError("--prompt must have at least one token; give some text")
        steps = stream(
            model,
            [prompt],
            max_new_tokens=self.tokens,
            num_steps=self.steps,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=torch.Generator().manual_seed(self.seed),
        )
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


def load(folder: Path) -> tuple[Any, Any, Any]:
    """The model of a folder, its `CausalLM`, and its tokenizer.

    Raises:
        ValueError: the folder does not hold both.
    """
    from dblocks import blocks, checkpoint
    from dblocks.models.causal_lm import CausalLM
    from dblocks.text import TOKENIZER_FILE, tokenizer_from_json

    model = checkpoint.load_model(folder)
    network = model.base_model if isinstance(model, blocks.DiffusionBlocks) else model
    if not isinstance(network, CausalLM):
        raise ValueError(
            f"{folder} must hold a CausalLM, got a {type(network).__name__}; "
            "see `dblocks train causal-lm --help`"
        )
    try:
        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} must hold a {TOKENIZER_FILE}: {error}") from error
    return model, network, tokenizer_from_json(text)
