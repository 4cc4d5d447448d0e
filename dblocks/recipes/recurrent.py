"""The recurrent-depth language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dblocks.models.recurrent import RecurrentConfig, RecurrentLM
from dblocks.nn import ConditioningKind
from dblocks.recipes.autoregressive import AutoregressiveLearner, AutoregressiveRun, bound_of
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.run import Batch

STEPS = (1, 2, 4, 8, 16, 32)  # Euler steps, or recurrences, whose quality is measured
STEPS_WINDOWS = 32  # windows of the held-out text, spread evenly, that each is measured on
SAMPLE_STEPS = 8  # Euler steps of the samples that stand for the model


@dataclass(frozen=True, kw_only=True)
class RecurrentRun(AutoregressiveRun):
    """Everything that decides the outcome of a run of a recurrent-depth model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    blocks: int = 1
    """Number of blocks that the core is divided into: 1 block applies all of it at every step."""
    steps: int = 600
    """Training steps, of one batch each."""
    rows: Literal["single", "doubled"] = "doubled"
    """How noisy embeddings enter the blocks; see `LanguageModelConfig`."""
    head: Literal["posterior", "learned"] = "learned"
    """What the blocks' logits are; see `LanguageModelConfig`."""
    top_share: float = 0.0
    """Share of every block's draws that are at sigma_max."""
    conditioning: ConditioningKind = "dit"
    """AdaLN of the blocks; the network trained end to end has none."""
    width: int = 96
    """Width of the rows."""
    heads: int = 2
    """Attention heads."""
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
    p_mean: float = 1.5
    """Mean of the logarithm of the noise levels: three in four lie above 1, where a noisy embedding
    of norm 1 tells little, so that the core learns to predict from the text. With 0 the next
    token's bits were .14 worse; with 2.5 they were .03 better, but more Euler steps then made
    samples worse, as too few steps of training see little noise (tried, 300 to 400 steps)."""

    @property
    def sample_steps(self) -> int:
        """Euler steps, or recurrences, of the samples that stand for the model."""
        return self.mean_recurrence if self.end_to_end else max(SAMPLE_STEPS, self.blocks)

    @property
    def measured_steps(self) -> list[int]:
        """Euler steps, or recurrences, that quality is measured with: 1, and none that leaves out
        a block."""
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
            **self.sizes(vocab_size),
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
        self.recurrent = run
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

    def measured_plain_loss(self, batch: Batch) -> Tensor:
        """With `mean_recurrence` recurrences: of fewer than `backprop_depth` less is saved."""
        return self.network.next_token_loss(
            batch,
            num_recurrences=self.recurrent.mean_recurrence,
            generator=torch.Generator().manual_seed(0),
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the held-out text; of final runs more.

        That is bits of a part of the text, and samples, for several numbers of steps: minutes,
        that the choice of a learning rate has no use for.
        """
        found = {
            "adaln": self.network.config.conditioning != "none",
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "sha256": self.corpus.sha256,
            "bits": self.bits(windows=self.text.windows),
        }
        return found | self._against_steps() if self.text.part == "final" else found

    def _against_steps(self) -> dict[str, Any]:
        counts = self.recurrent.measured_steps
        plain = counts if self.model is None else [1]
        return {
            "windows": STEPS_WINDOWS,
            "bits_by_steps": {str(n): self.bits(num_steps=n, windows=STEPS_WINDOWS) for n in plain},
            "bound": None if self.model is None else self._bound(),
            "samples_written": {str(n): self.samples(num_steps=n) for n in counts},
        }

    def _bound(self) -> dict[str, Any]:
        text, context = self.corpus.evaluated, self.text.context
        return bound_of(self.model, text, context, windows=STEPS_WINDOWS)
