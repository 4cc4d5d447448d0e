"""The autoregressive language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.recipes._autoregressive import AutoregressiveLearner, AutoregressiveRun
from dblocks.text import Corpus


@dataclass(frozen=True, kw_only=True)
class CausalLMRun(AutoregressiveRun):
    """Everything that decides the outcome of a run of an autoregressive model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    steps: int = 1440
    """Training steps, of one batch each."""
    p_mean: float = 0.0
    """Mean of the logarithm of the noise levels: the first block owns 2.4 to 80, where a noisy
    embedding of norm 1 tells nothing, so that it learns to predict from the text alone."""

    def model_config(self, vocab_size: int) -> CausalLMConfig:
        """The network."""
        return CausalLMConfig(depth=self.depth, **self.sizes(vocab_size))

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
