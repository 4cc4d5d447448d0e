"""The autoregressive language model: `dblocks train causal-lm`, also `eval` and `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dblocks.blocks import trained_at_top
from dblocks.config import check_count
from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.recipes import columns
from dblocks.recipes.autoregressive import (
    PUBLISHED,
    PUBLISHED_HELP,
    AutoregressiveOptions,
    AutoregressiveTrainer,
)
from dblocks.recipes.command import Recipe, check_steps
from dblocks.recipes.data.text import Corpus, load_corpus
from dblocks.recipes.data.text_sources import Fold
from dblocks.recipes.evaluated import data_of
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.run import Run
from dblocks.recipes.tables import COSTS
from dblocks.recipes.writing import SampleText, load_text_model, print_bits

TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of the samples


@dataclass(frozen=True, kw_only=True)
class CausalLMRun(AutoregressiveOptions, Run):
    """Train a 12-layer language model on text, in blocks or end to end, and save it.

    The layers are divided into equal blocks. Each block learns to denoise the next token's
    embedding within its own range of noise levels, given the preceding text, so a training step
    runs one block only and stores only its activations. Prints the bits per character of held-out
    text and the cost; writes model.safetensors, config.json, tokenizer.json and run.json to --out.
    """

    steps: int = 2520
    p_mean: float = 0.0
    """Mean of the logarithm of the noise levels. With 0, the first of three blocks owns levels 2.4
    to 80, where a noisy embedding of norm 1 carries no information, so it learns to predict from
    the text alone."""
    tokens_per_block: int = 1
    """Number of tokens predicted at once, which share a noise level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()
        k = 1 if self.end_to_end else check_count("tokens_per_block", self.tokens_per_block)
        if self.context % k:
            raise ValueError(
                f"context must be a multiple of tokens_per_block={k}, got {self.context}; take "
                f"{self.context + -self.context % k}"
            )

    def model_config(self, vocab_size: int) -> CausalLMConfig:
        """The network."""
        k = 1 if self.end_to_end else self.tokens_per_block
        sizes = self.sizes(vocab_size, end_to_end=self.end_to_end)
        return CausalLMConfig(depth=self.depth, tokens_per_block=k, tokens_per_sigma=k, **sizes)

    def corpus(self) -> Corpus:
        """The text, tokenized and split; see `read_corpus`."""
        return self.read_corpus(self.part)

    def trainer(self) -> CausalLMTrainer:
        """The trainer of this run, with network and data."""
        return CausalLMTrainer(self, self.corpus())


# For a GPU with 80 GB: about the size of GPT-2. Use a text of some 100 MB and a tokenizer file.
GPU = CausalLMRun(
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

RECIPE = Recipe(
    run=CausalLMRun(),
    gpu=GPU,
    paper=EXPERIMENTS["causal-lm"],
    out=Path("runs/causal-lm"),
    columns=(*columns.CAUSAL_LM, *COSTS),
    published=PUBLISHED,
    published_help=PUBLISHED_HELP,
    after="Write text with\ndblocks sample causal-lm --checkpoint {out} --prompt 'The '",
)


class CausalLMTrainer(AutoregressiveTrainer):
    """Trains a `CausalLM` on text.

    Args:
        run: options of the run.
        corpus: the texts for training and evaluation.
    """

    def __init__(self, run: CausalLMRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            run,
            corpus,
            lambda: CausalLM(run.model_config(corpus.tokenizer.size)),
            lambda lm, batch: lm.next_token_loss(batch),
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the held-out text; for final runs also the bound and samples."""
        windows = self.options.windows
        found = {
            "adaln": self.network.config.conditioning != "none",
            "sha256": self.corpus.sha256,
            "bits": self.bits(windows=windows),
        }
        if self.has_product:
            found["product_bits"] = self.bits(product=True, windows=windows)
        if self.run.part == "selection":
            return found
        if self.model is not None:
            found["bound"] = self.bound(windows)
        return found | {"samples_written": self._samples()}

    @property
    def has_product(self) -> bool:
        """Whether all blocks were trained at sigma_max, so that their product is meaningful."""
        model = self.model
        return model is not None and (model.config.num_blocks == 1 or trained_at_top(model))

    def _samples(self) -> dict[str, list[str]]:
        """Samples by name: "plain", "product" or the Euler steps, then "@" and the temperature."""
        if self.model is None:
            return {f"plain@{t:g}": self.samples(temperature=t) for t in TEMPERATURES}
        steps = sorted({1, self.num_blocks})
        written = {f"{n}@1": self.samples(num_steps=n) for n in steps}
        if self.has_product:
            written |= {
                f"product@{t:g}": self.samples(product=True, temperature=t) for t in TEMPERATURES
            }
        return written


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved language model."""

    data: str | None = None
    """Text to evaluate on; uses its held-out part. By default that of the training, by its
    run.json. See `dblocks train causal-lm`."""
    data_path: str | None = None
    """See `dblocks train causal-lm`."""
    fold: Fold | None = None
    """Reduce the text to letters and spaces, as in training."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train causal-lm`."""
    windows: int = 1024
    """Number of windows to score, evenly spaced; at most all of them."""

    def __call__(self) -> None:
        """Print the bits per character of the held-out part."""
        model, network, tokenizer = load_text_model(self.checkpoint, CausalLM)
        data, options = data_of(
            self.checkpoint, data=self.data, data_path=self.data_path, fold=self.fold
        )
        text = load_corpus(data, tokenizer=tokenizer, **options).evaluated
        print_bits(model, text, network.config.context, self.windows)


@dataclass(frozen=True, kw_only=True)
class Sample(SampleText):
    """Continue a text with a saved language model, printing it as it is generated."""

    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train causal-lm`."""
    steps: int | None = None
    """Denoising steps per token; 1 runs only the first block. By default, tokens are sampled from
    the product of all blocks' predictions or, if blocks were trained as published, with one step
    for each block."""
    product: bool = False
    """Require the product of all blocks' predictions; an error if the blocks were not trained for
    it."""

    def __call__(self) -> None:
        """Print the prompt and its continuation."""
        model, _, tokenizer = load_text_model(self.checkpoint, CausalLM)
        in_blocks = check_steps(self.steps, self.checkpoint, model)
        if self.product and self.steps is not None:
            raise ValueError(
                "--product calls every block once, so --steps must be left out, got "
                f"--steps {self.steps}"
            )
        if self.product and not in_blocks:
            raise ValueError(
                f"--product needs blocks, and the network in {self.checkpoint} was trained end to "
                "end: leave --product out"
            )
        product = in_blocks and self.steps is None and (self.product or trained_at_top(model))
        self.write(model, tokenizer, self.steps, product=product)
