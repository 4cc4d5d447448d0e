"""Base of the runs of next-token models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.nn import ConditioningKind
from dblocks.recipes.data.batches import Batch, TextData
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.autoregressive import bits_per_character, bound_of
from dblocks.recipes.run import Run
from dblocks.recipes.text_run import PROMPT, TextOptions, continuations
from dblocks.recipes.trainer import Trainer
from dblocks.sampling import generate
from dblocks.schedules import NoiseSchedule

# What --published changes: the blocks of the paper.
PUBLISHED: dict[str, Any] = {
    "rows": "doubled", "head": "learned", "conditioning": "dit", "top_share": 0.0
}  # fmt: skip
PUBLISHED_HELP = (
    "As in the paper: clean and noisy rows side by side, a learned head, AdaLN, and noise levels "
    "drawn only from each block's own range."
)
POINT_WINDOWS = 32  # windows of held-out text, evenly spaced, for a point of the curve


@dataclass(frozen=True, kw_only=True)
class AutoregressiveOptions(TextOptions):
    """Options of runs of next-token models, in addition to those of every run."""

    batch_size: int = 4
    """Windows of text per batch."""
    kv_heads: int | None = None
    """Number of key/value heads; by default that of --heads."""
    rows: Literal["single", "doubled"] = "single"
    """How noisy embeddings enter the blocks: single, added to the rows of the previous tokens;
    doubled, as published, in separate rows next to clean ones."""
    head: Literal["posterior", "learned"] = "posterior"
    """How blocks compute logits: posterior, as a prediction from the text plus the log-likelihood
    of the noisy embedding; learned, by an output head, as published."""
    top_share: float = 0.6
    """Fraction of every block's draws at sigma_max."""
    conditioning: ConditioningKind = "none"
    """AdaLN of the blocks: none, a plain norm; dit, that of DiT;
    official, that of the published code, which also applies SiLU to shifts, scales and gates.
    End-to-end networks have a plain norm."""
    gate_init: float = 1.0
    """Initial gates of AdaLN; with 1, layers start like those of the end-to-end network."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    weighting: Weighting = "none"
    p_mean: float
    """Mean of the logarithm of the noise levels."""
    p_std: float = 2.0
    """Std of the logarithm of the noise levels."""
    sigma_data: float = 0.5
    """Std of the data assumed by the preconditioning; the elements of an embedding have a std of
    embed_scale/sqrt(width)."""
    overlap: float = 0.1
    """Overlap of the blocks' noise ranges."""

    def sizes(self, vocab_size: int, *, end_to_end: bool) -> dict[str, Any]:
        """The common options of the models' configs; end-to-end models have no noise levels."""
        return {
            "vocab_size": vocab_size,
            "context": self.context,
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "conditioning": "none" if end_to_end else self.conditioning,
            "gate_init": 0.0 if end_to_end or self.conditioning == "none" else self.gate_init,
            "embed_scale": self.embed_scale,
            "rows": "doubled" if end_to_end else self.rows,
            "head": "learned" if end_to_end else self.head,
        }

    def blocks_config(self, num_blocks: int) -> BlocksConfig:
        """The configuration of blocks and noise levels."""
        return BlocksConfig(
            num_blocks=num_blocks,
            schedule=NoiseSchedule(
                p_mean=self.p_mean, p_std=self.p_std, sigma_data=self.sigma_data
            ),
            overlap=self.overlap,
            top_share=self.top_share,
            weighting=self.weighting,
        )


class AutoregressiveTrainer(Trainer):
    """Trains a next-token model.

    Args:
        run: options of the run.
        options: the same run, typed with the options of next-token models.
        corpus: the texts for training and evaluation.
        make: see `Trainer`.
        end_to_end_loss: see `Trainer`.
    """

    def __init__(
        self,
        run: Run,
        options: AutoregressiveOptions,
        corpus: Corpus,
        make: Callable[[], nn.Module],
        end_to_end_loss: Callable[[Any, Batch], Tensor],
    ) -> None:
        data = TextData(corpus, options.context, run.batch_size, run.seed)
        super().__init__(
            run, data, make, lambda: options.blocks_config(run.blocks), end_to_end_loss
        )
        self.options, self.corpus = options, corpus

    @abstractmethod
    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Results of the trained network as JSON values; `last` is its last measurement."""

    def counted(self) -> list[nn.Module]:
        """The MLPs; a layer calls its MLP once for clean rows and once for noisy rows."""
        return [layer.mlp for layer in self.network.layers]

    def measure(self) -> dict[str, Any]:
        """Bits per character of a part of the held-out text; in blocks, by the first block."""
        return {"bits": self.bits(windows=POINT_WINDOWS), "windows": POINT_WINDOWS}

    def progress(self, point: dict[str, Any]) -> str:
        """The bits per character."""
        return f"{point['bits']:.3f} bits per character"

    def bits(self, **options: Any) -> float:
        """Bits per character of the held-out text; for options see `bits_per_character`."""
        text = self.corpus.evaluated
        return bits_per_character(self.trained, text, self.options.context, **options)

    def bound(self, windows: int) -> dict[str, Any]:
        """The bound of denoising by all blocks, see `bound_of`."""
        text = self.corpus.evaluated
        return bound_of(self.model, text, self.options.context, windows=windows)

    def samples(self, **options: Any) -> list[str]:
        """Continuations of windows spread over the held-out text, at temperature 1 by default.

        Options are passed to `generate`, such as `num_steps=`.
        """
        context = self.options.context
        prompts, _ = continuations(self.corpus.evaluated, context)
        written = generate(
            self.trained,
            prompts,
            max_new_tokens=context - PROMPT,
            generator=torch.Generator().manual_seed(NOISE_SEED),
            **options,
        )
        return [self.corpus.tokenizer.decode(tokens.tolist()) for tokens in written]
