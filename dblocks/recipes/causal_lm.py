"""The autoregressive language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.nn import ConditioningKind
from dblocks.recipes._autoregressive import AutoregressiveLearner
from dblocks.recipes._text import TextRun
from dblocks.schedule import NoiseSchedule
from dblocks.text import Corpus


@dataclass(frozen=True, kw_only=True)
class CausalLMRun(TextRun):
    """Everything that decides the outcome of a run of an autoregressive model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    steps: int = 1440
    """Training steps, of one batch each."""
    batch_size: int = 4
    """Windows of `context` tokens in a batch."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    conditioning: ConditioningKind = "dit"
    """AdaLN of the blocks; the network trained end to end has none."""
    gate_init: float = 1.0
    """Of the blocks' layers: they start as the plain layers of the network trained end to end."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    weighting: Weighting = "none"
    """Weight of a noise level's loss in blocks."""
    p_mean: float = 0.0
    """Mean of the logarithm of the noise levels: the first block owns 2.4 to 80, where a noisy
    embedding of norm 1 tells nothing, so that it learns to predict from the text alone."""
    p_std: float = 2.0
    """Standard deviation of it."""
    sigma_data: float = 0.5
    """Of the preconditioning; an element of an embedding deviates by embed_scale/sqrt(width)."""
    overlap: float = 0.1
    """Of the blocks' noise levels."""

    def model_config(self, vocab_size: int) -> CausalLMConfig:
        """The network: AdaLN where there is a noise level to follow, plain end to end."""
        return CausalLMConfig(
            vocab_size=vocab_size,
            context=self.context,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.kv_heads,
            conditioning="none" if self.end_to_end else self.conditioning,
            gate_init=0.0 if self.end_to_end else self.gate_init,
            embed_scale=self.embed_scale,
        )

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut."""
        return BlocksConfig(
            num_blocks=self.blocks,
            schedule=NoiseSchedule(
                p_mean=self.p_mean, p_std=self.p_std, sigma_data=self.sigma_data
            ),
            overlap=self.overlap,
            weighting=self.weighting,
        )

    def learner(self) -> CausalLMLearner:
        """The network of this run with its data, ready to train."""
        return CausalLMLearner(self, self.corpus())


# For a GPU with 80 GB: about the size of GPT-2; a text of some 100 MB, and a tokenizer file.
GPU = CausalLMRun(
    data="text.txt",
    tokenizer="tokenizer.json",
    steps=100_000,
    batch_size=64,
    context=1024,
    width=768,
    heads=12,
    kv_heads=4,
    lr=6e-4,
    device="cuda",
    bf16=True,
)


class CausalLMLearner(AutoregressiveLearner):
    """A `CausalLM` in training on text.

    Args:
        run: what to train.
        corpus: what to train on and what to evaluate on.
    """

    def __init__(self, run: CausalLMRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            corpus,
            lambda: CausalLM(run.model_config(corpus.tokenizer.size)),
            run.blocks_config,
            lambda lm, batch: lm.next_token_loss(batch),
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of all of the held-out text, and samples."""
        steps = (None,) if self.model is None else sorted({1, self.num_blocks})
        by_steps = {str(n): self.bits(num_steps=n) for n in steps if n is not None}
        return {
            "adaln": self.network.config.conditioning != "none",
            "sha256": self.corpus.sha256,
            "bits": by_steps["1"] if by_steps else self.bits(),
            "bits_by_denoising_steps": by_steps,
            "samples_written": {str(n or "plain"): self.samples(num_steps=n) for n in steps},
        }
