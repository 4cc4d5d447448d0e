"""The masked diffusion language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.models.masked_lm import MaskedLM, MaskedLMConfig
from dblocks.nn import ConditioningKind
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.metrics.masked import Bits, bits_per_character
from dblocks.recipes.text_run import NOISE_SEED, TextLearner, TextRun, continuations
from dblocks.sampling import points_for, unmask
from dblocks.schedules.mask import MASKED, MaskSchedule, ScheduleKind

SAMPLED = "unmasked"  # the name of the samples in records
POINT_WINDOWS = 16  # windows of the held-out text that a point of the curve looks at


@dataclass(frozen=True, kw_only=True)
class MaskedLMRun(TextRun):
    """Everything that decides the outcome of a run of a masked diffusion model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    steps: int = 1500
    """Training steps, of one batch each."""
    batch_size: int = 8
    """Windows of `context` tokens in a batch."""
    width: int = 96
    """Width of the rows."""
    heads: int = 3
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    points: int = 5
    """How often the bound of some windows is measured on the way, evenly spaced."""
    rope_theta: float = 100.0
    """Base of the rotary positions' frequencies, for periods of 6 to some 500 tokens; with 10,000 a
    context of 128 was learned more slowly."""
    conditioning: ConditioningKind = "dit"
    """AdaLN on the masked share, of both ways of training."""
    gate_init: float = 1.0
    """Layers start as plain ones, not as the identity."""
    schedule: ScheduleKind = "linear"
    """The masked share as a function of t."""
    draw: Literal["alpha", "t"] = "alpha"
    """What training draws evenly; with alpha the schedule's kind has no effect. It learned a little
    faster than cosine with t."""
    weighting: Weighting = "auto"
    """Weight of a loss: auto is that of the bound."""
    overlap: float = 0.1
    """Of the blocks' ranges of the masked share."""

    def model_config(self, vocab_size: int) -> MaskedLMConfig:
        """The network, the same in blocks and end to end."""
        return MaskedLMConfig(
            vocab_size=vocab_size,
            context=self.context,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.kv_heads,
            rope_theta=self.rope_theta,
            conditioning=self.conditioning,
            gate_init=self.gate_init,
        )

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut."""
        return BlocksConfig(
            num_blocks=self.num_blocks,
            schedule=MaskSchedule(self.schedule, self.draw),
            overlap=self.overlap,
            weighting=self.weighting,
        )

    def learner(self) -> MaskedLMLearner:
        """The network of this run with its data, ready to train."""
        return MaskedLMLearner(self, self.corpus())


# For a GPU with 80 GB: about the size of GPT-2; a text of some 100 MB, and a tokenizer file.
GPU = MaskedLMRun(
    data="text.txt",
    tokenizer="tokenizer.json",
    steps=200_000,
    batch_size=64,
    context=1024,
    width=768,
    heads=12,
    rope_theta=10_000.0,
    lr=6e-4,
    device="cuda",
    bf16=True,
)


class MaskedLMLearner(TextLearner):
    """A `MaskedLM` in training on text; end to end it is one block of all layers.

    Args:
        run: what to train.
        corpus: what to train on and what to evaluate on.
    """

    def __init__(self, run: MaskedLMRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            corpus,
            lambda: MaskedLM(run.model_config(corpus.tokenizer.size)),
            run.blocks_config,
        )

    def measure(self) -> dict[str, Any]:
        """Bits per character of some of the held-out text."""
        return {"bits": self.bits(windows=POINT_WINDOWS).bits}

    def bits(self, *, windows: int | None = None) -> Bits:
        """The bound of the held-out text, of all of it or of so many windows."""
        text, context = self.corpus.evaluated, self.text.context
        points = points_for(self.num_blocks)
        return bits_per_character(
            self.trained, text, context, windows=windows, points=points, seed=NOISE_SEED
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the held-out text, and samples."""
        bits = self.bits(windows=self.text.windows)
        prompts, truth = continuations(self.corpus.evaluated, self.text.context)
        gaps = torch.full_like(truth, MASKED)
        written = unmask(
            self.trained,
            torch.cat([prompts, gaps], dim=1),
            generator=torch.Generator().manual_seed(NOISE_SEED),
        )
        texts = written.tokens[:, prompts.shape[1] :].tolist()
        return {
            "sha256": self.corpus.sha256,
            "bits": bits.bits,
            "bits_error": bits.error,
            "bits_by_share": bits.by_share,
            "samples_written": {SAMPLED: [self.corpus.tokenizer.decode(row) for row in texts]},
            "calls": written.calls,
            "rows": written.rows,
        }
