"""The recurrent-depth language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.models.recurrent import RecurrentConfig, RecurrentLM
from dblocks.nn import ConditioningKind
from dblocks.recipes._autoregressive import AutoregressiveLearner
from dblocks.recipes._text import TextRun
from dblocks.schedule import NoiseSchedule
from dblocks.text import Corpus

STEPS = (1, 2, 4, 8, 16, 32)  # Euler steps, or recurrences, whose quality is measured
STEPS_WINDOWS = 32  # windows of the held-out text that each of them is measured on
DRAWS = 4  # of noise, where there is more than one step
SAMPLE_STEPS = 8  # Euler steps of the samples that stand for the model


@dataclass(frozen=True, kw_only=True)
class RecurrentRun(TextRun):
    """Everything that decides the outcome of a run of a recurrent-depth model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    blocks: int = 1
    """Number of blocks that the core is divided into: 1 block applies all of it at every step."""
    steps: int = 600
    """Training steps, of one batch each."""
    batch_size: int = 4
    """Windows of `context` tokens in a batch."""
    width: int = 96
    """Width of the rows."""
    heads: int = 2
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    prelude: int = 2
    """Layers that read the clean tokens."""
    depth: int = 4
    """Layers of the core, which is applied again and again."""
    coda: int = 2
    """Layers between the core and the readout."""
    mean_recurrence: int = 32
    """How often training end to end applies the core, on the average."""
    backprop_depth: int = 8
    """How many of these gradients go through."""
    conditioning: ConditioningKind = "dit"
    """AdaLN in blocks; the network trained end to end has none."""
    gate_init: float = 1.0
    """Of core and coda in blocks: they start as the plain layers of the network trained end to
    end."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    weighting: Weighting = "none"
    """Weight of a noise level's loss in blocks."""
    p_mean: float = 1.5
    """Mean of the logarithm of the noise levels: three in four lie above 1, where a noisy embedding
    of norm 1 tells little, so that the core learns to predict from the text. With 0 the next
    token's bits were .14 worse; with 2.5 they were .03 better, but more Euler steps then made
    samples worse, as too few steps of training see little noise (tried, 300 to 400 steps)."""
    p_std: float = 2.0
    """Standard deviation of it."""
    sigma_data: float = 0.5
    """Of the preconditioning; an element of an embedding deviates by embed_scale/sqrt(width)."""
    overlap: float = 0.1
    """Of the blocks' noise levels, where there are several blocks."""

    def model_config(self, vocab_size: int) -> RecurrentConfig:
        """The network: AdaLN where there is a noise level to follow, plain end to end."""
        return RecurrentConfig(
            vocab_size=vocab_size,
            context=self.context,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            prelude=self.prelude,
            core=self.depth,
            coda=self.coda,
            mean_recurrence=self.mean_recurrence,
            backprop_depth=self.backprop_depth,
            conditioning="none" if self.end_to_end else self.conditioning,
            gate_init=0.0 if self.end_to_end else self.gate_init,
            embed_scale=self.embed_scale,
        )

    def blocks_config(self) -> BlocksConfig:
        """How the core is cut, and the noise levels."""
        return BlocksConfig(
            num_blocks=self.blocks,
            schedule=NoiseSchedule(
                p_mean=self.p_mean, p_std=self.p_std, sigma_data=self.sigma_data
            ),
            overlap=self.overlap,
            weighting=self.weighting,
        )

    def learner(self) -> RecurrentLearner:
        """The network of this run with its data, ready to train."""
        return RecurrentLearner(self, self.corpus())


# For a GPU with 80 GB: some 190 million parameters, unfolded end to end 1.7 billion in each step; a
# text of some 100 MB, and a tokenizer file.
GPU = RecurrentRun(
    data="text.txt",
    tokenizer="tokenizer.json",
    steps=100_000,
    batch_size=64,
    context=1024,
    width=1024,
    heads=16,
    lr=6e-4,
    device="cuda",
    bf16=True,
)


class RecurrentLearner(AutoregressiveLearner):
    """A `RecurrentLM` in training on text.

    Args:
        run: what to train.
        corpus: what to train on and what to evaluate on.
    """

    def __init__(self, run: RecurrentRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            corpus,
            lambda: RecurrentLM(run.model_config(corpus.tokenizer.size)),
            run.blocks_config,
            lambda lm, batch: lm.next_token_loss(batch, generator=self.generator),
        )

    def counted(self) -> list[nn.Module]:
        """The MLPs of prelude, core and coda."""
        network = self.network
        return [layer.mlp for layer in (*network.prelude, *network.layers, *network.coda)]

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of all of the held-out text; of final runs more.

        That is bits of a part of the text, and samples, for several numbers of steps: minutes,
        that the choice of a learning rate has no use for.
        """
        found = {
            "adaln": self.network.config.conditioning != "none",
            "sha256": self.corpus.sha256,
            "bits": self.bits(),
        }
        return found | self._against_steps() if self.text.part == "final" else found

    def _against_steps(self) -> dict[str, Any]:
        plain = self.model is None
        main = self.network.config.mean_recurrence if plain else SAMPLE_STEPS
        counts = sorted({*STEPS, main})
        return {
            "bits_by_steps": {
                str(n): self.bits(num_steps=n, windows=STEPS_WINDOWS, draws=1 if n == 1 else DRAWS)
                for n in counts
            },
            "samples_written": {str(n): self.samples(num_steps=n) for n in counts},
        }
