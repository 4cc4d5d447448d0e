"""The autoregressive language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dblocks.blocks import trained_at_top
from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.recipes.autoregressive import (
    AutoregressiveLearner,
    AutoregressiveRun,
    bound_of,
)
from dblocks.recipes.data.text import Corpus

TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of the samples


@dataclass(frozen=True, kw_only=True)
class CausalLMRun(AutoregressiveRun):
    """Everything that decides the outcome of a run of an autoregressive model.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    steps: int = 2520
    """Training steps, of one batch each."""
    p_mean: float = 0.0
    """Mean of the logarithm of the noise levels: the first block owns 2.4 to 80, where a noisy
    embedding of norm 1 tells nothing, so that it learns to predict from the text alone."""
    tokens_per_block: int = 1
    """Tokens that are predicted, and written, at once; they share a noise level."""

    def model_config(self, vocab_size: int) -> CausalLMConfig:
        """The network."""
        k = 1 if self.end_to_end else self.tokens_per_block
        return CausalLMConfig(
            depth=self.depth, tokens_per_block=k, tokens_per_sigma=k, **self.sizes(vocab_size)
        )

    def learner(self) -> CausalLMLearner:
        """The network of this run with its data, ready to train."""
        return CausalLMLearner(self, self.corpus())


# How the paper's blocks differ.
PUBLISHED: dict[str, Any] = {
    "rows": "doubled", "head": "learned", "conditioning": "dit", "top_share": 0.0
}  # fmt: skip

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
        """Bits per character of the held-out text; of final runs their bound, and samples."""
        windows = self.text.windows
        found = {
            "adaln": self.network.config.conditioning != "none",
            "sha256": self.corpus.sha256,
            "bits": self.bits(windows=windows),
        }
        if self.has_product:
            found["product_bits"] = self.bits(product=True, windows=windows)
        if self.text.part == "selection":
            return found
        if self.model is not None:
            model, text = self.model, self.corpus.evaluated
            found["bound"] = bound_of(model, text, self.text.context, windows=windows)
        return found | {"samples_written": self._samples()}

    @property
    def has_product(self) -> bool:
        """Whether all blocks were trained at sigma_max, so that their product says something."""
        model = self.model
        return model is not None and (model.config.num_blocks == 1 or trained_at_top(model))

    def _samples(self) -> dict[str, list[str]]:
        """Samples by name: "plain", "product" or the Euler steps, and "@" the temperature."""
        if self.model is None:
            return {f"plain@{t:g}": self.samples(temperature=t) for t in TEMPERATURES}
        steps = sorted({1, self.num_blocks})
        written = {f"{n}@1": self.samples(num_steps=n) for n in steps}
        if self.has_product:
            written |= {
                f"product@{t:g}": self.samples(product=True, temperature=t) for t in TEMPERATURES
            }
        return written
