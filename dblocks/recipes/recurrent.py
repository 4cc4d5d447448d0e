"""The recurrent-depth language model: `dblocks train recurrent`, also `eval` and `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.blocks import DiffusionBlocks
from dblocks.models.recurrent import RecurrentConfig, RecurrentLM
from dblocks.nn import ConditioningKind
from dblocks.recipes import columns
from dblocks.recipes.autoregressive import (
    PUBLISHED,
    PUBLISHED_HELP,
    AutoregressiveOptions,
    AutoregressiveTrainer,
)
from dblocks.recipes.columns import STEPS_WINDOWS
from dblocks.recipes.command import Recipe, check_positive
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.text import Corpus, load_corpus
from dblocks.recipes.data.text_sources import Fold
from dblocks.recipes.evaluated import data_of
from dblocks.recipes.metrics.autoregressive import bits_per_character
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.run import Run
from dblocks.recipes.tables import COSTS
from dblocks.recipes.writing import SampleText, load_text_model, print_bits, scored_part

STEPS = (1, 2, 4, 8, 16, 32)  # numbers of Euler steps, or recurrences, that are evaluated
SAMPLE_STEPS = 8  # number of Euler steps of the main samples


@dataclass(frozen=True, kw_only=True)
class RecurrentRun(AutoregressiveOptions, Run):
    """Train a small language model that applies its middle layers repeatedly, and save it.

    Its 4 middle layers, the core, are applied repeatedly, with 2 layers before and 2 layers after
    them. As a block, the core learns to denoise the next token's embedding at all noise levels: a
    training step runs it once, and generation any number of times. In end-to-end training, every
    step applies it about 32 times and stores the last 8 applications for the backward. Prints the
    bits per character of held-out text and the cost; writes model.safetensors, config.json,
    tokenizer.json and run.json to --out.
    """

    blocks: int = 1
    """Number of blocks of the core; more blocks need less memory and less time per step."""
    steps: int = 600
    lr: float = 2e-3
    # Without AdaLN validation text has .045 bits more, and a step takes a fifth less time.
    conditioning: ConditioningKind = "dit"
    width: int = 96
    heads: int = 2
    prelude: int = 2
    """Number of layers before the core, for the clean tokens."""
    depth: int = 4
    """Number of layers of the core, which is applied repeatedly."""
    coda: int = 2
    """Number of layers between the core and the output head."""
    mean_recurrence: int = 32
    """Mean number of recurrences in end-to-end training."""
    backprop_depth: int = 8
    """Number of the last recurrences through which gradients flow."""
    # Measured with 300 to 400 steps: with 0, bits of the next token were .14 worse; with 2.5 they
    # were .03 better, but more Euler steps made samples worse, as too few training steps see little
    # noise.
    p_mean: float = 1.5
    """Mean of the logarithm of the noise levels. With 1.5, three in four levels are above 1, where
    a noisy embedding of norm 1 carries little information, so the core learns to predict from the
    text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()

    @property
    def sample_steps(self) -> int:
        """Number of Euler steps, or recurrences, of the main samples."""
        return self.mean_recurrence if self.end_to_end else max(SAMPLE_STEPS, self.blocks)

    @property
    def measured_steps(self) -> list[int]:
        """Numbers of Euler steps, or recurrences, to evaluate: 1, and any that run all blocks."""
        counts = sorted({*STEPS, self.sample_steps})
        return [n for n in counts if n == 1 or n >= self.num_blocks]

    def model_config(self, vocab_size: int) -> RecurrentConfig:
        """The network."""
        return RecurrentConfig(
            prelude=self.prelude,
            core=self.depth,
            coda=self.coda,
            mean_recurrence=self.mean_recurrence,
            backprop_depth=self.backprop_depth,
            **self.sizes(vocab_size, end_to_end=self.end_to_end),
        )

    def trainer(self) -> RecurrentTrainer:
        """The trainer of this run, with network and data."""
        return RecurrentTrainer(self, self.read_corpus(self.part))


# For a GPU with 80 GB: some 190 million parameters; with all recurrences, an end-to-end step
# applies 1.7 billion. Use a text of some 100 MB and a tokenizer file.
GPU = RecurrentRun(
    steps=100_000,
    batch_size=64,
    context=1024,
    width=1024,
    heads=16,
    lr=6e-4,
    device="cuda",
    bf16=True,
)

RECIPE = Recipe(
    run=RecurrentRun(),
    gpu=GPU,
    paper=EXPERIMENTS["recurrent"],
    out=Path("runs/recurrent"),
    columns=(*columns.RECURRENT, *COSTS),
    published=PUBLISHED,
    published_help=PUBLISHED_HELP,
    after="Write text with\ndblocks sample recurrent --checkpoint {out} --prompt 'The ' --steps 8",
)


class RecurrentTrainer(AutoregressiveTrainer):
    """Trains a `RecurrentLM` on text.

    Args:
        run: options of the run.
        corpus: the texts for training and evaluation.
    """

    def __init__(self, run: RecurrentRun, corpus: Corpus) -> None:
        self.recurrent = run
        super().__init__(
            run,
            run,
            corpus,
            lambda: RecurrentLM(run.model_config(corpus.tokenizer.size)),
            lambda lm, batch: lm.next_token_loss(batch, generator=self.generator),
        )

    def counted(self) -> list[nn.Module]:
        """The MLPs of prelude, core and coda."""
        network = self.network
        return [layer.mlp for layer in (*network.prelude, *network.layers, *network.coda)]

    def measured_loss(self, batch: Batch) -> Tensor:
        """The loss with `mean_recurrence` recurrences; in training, the number is drawn."""
        return self.network.next_token_loss(
            batch,
            num_recurrences=self.recurrent.mean_recurrence,
            generator=torch.Generator().manual_seed(0),
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the held-out text.

        For final runs also bits on a part of the text, and samples, for several numbers of steps,
        which takes minutes.
        """
        found = {
            "adaln": self.network.config.conditioning != "none",
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "sha256": self.corpus.sha256,
            "bits": self.bits(windows=self.options.windows),
        }
        return found | self._against_steps() if self.run.part == "final" else found

    def _against_steps(self) -> dict[str, Any]:
        counts = self.recurrent.measured_steps
        measured = counts if self.model is None else [1]
        return {
            "windows": STEPS_WINDOWS,
            "bits_by_steps": {
                str(n): self.bits(num_steps=n, windows=STEPS_WINDOWS) for n in measured
            },
            "bound": None if self.model is None else self.bound(STEPS_WINDOWS),
            "samples_written": {str(n): self.samples(num_steps=n) for n in counts},
        }


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved recurrent model."""

    data: str | None = None
    """Text to evaluate on; uses its held-out part. By default that of the training, by its
    run.json. See `dblocks train recurrent`."""
    data_path: str | None = None
    """See `dblocks train recurrent`."""
    fold: Fold | None = None
    """Reduce the text to letters and spaces, as in training."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train recurrent`."""
    steps: int | None = None
    """Number of recurrences of an end-to-end network; by default the mean in training."""
    windows: int = 1024
    """Number of windows to score, evenly spaced; at most all of them."""

    def __call__(self) -> None:
        """Print the bits per character of the held-out part."""
        check_positive(self.steps)
        model, network, tokenizer = load_text_model(self.checkpoint, RecurrentLM)
        data, options = data_of(
            self.checkpoint, data=self.data, data_path=self.data_path, fold=self.fold
        )
        text = load_corpus(data, tokenizer=tokenizer, **options).evaluated
        context = network.config.context
        if isinstance(model, DiffusionBlocks):
            if self.steps is not None:
                raise ValueError(
                    "--steps is the number of recurrences of an end-to-end network, and the one in "
                    f"{self.checkpoint} was trained as a denoiser; leave --steps out"
                )
            print_bits(model, text, context, self.windows)
            return
        steps = self.steps or network.config.mean_recurrence
        bits = bits_per_character(model, text, context, num_steps=steps, windows=self.windows)
        how = f"{steps} recurrence{'s' * (steps > 1)}"
        print(f"{bits:.3f} bits per character on {scored_part(text, self.windows)}, {how}")


@dataclass(frozen=True, kw_only=True)
class Sample(SampleText):
    """Continue a text with a saved recurrent model, printing it as it is generated."""

    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train recurrent`."""
    steps: int | None = None
    """Denoising steps per token, by default one for each block; for an end-to-end network, the
    number of recurrences, by default the mean in training."""

    def __call__(self) -> None:
        """Print the prompt and its continuation."""
        check_positive(self.steps)
        model, _, tokenizer = load_text_model(self.checkpoint, RecurrentLM)
        self.write(model, tokenizer, self.steps)
