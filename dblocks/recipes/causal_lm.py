"""The autoregressive language model on text: the network, what is measured, what it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.generate import generate
from dblocks.metrics import next_token_nll
from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.nn import ConditioningKind
from dblocks.recipes import _base
from dblocks.schedule import NoiseSchedule
from dblocks.text import (
    TOKENIZER_FILE,
    Corpus,
    Text,
    Tokenizer,
    load_corpus,
    random_windows,
    scored_windows,
    tokenizer_from_json,
)

NOISE_SEED = 7  # of the noise that evaluation and samples start from
POINT_WINDOWS = 32  # windows of the held-out text that a point of the curve looks at
SAMPLES = 32
PROMPT = 16  # tokens of held-out text that a sample continues


@dataclass(frozen=True, kw_only=True)
class TextRun(_base.Run):
    """Everything that decides the outcome of a run on text; see `dblocks.text.load_corpus`.

    The defaults are for two cores and ten minutes; `GPU` is a larger recipe.
    """

    data: str = "pydoc"
    """The text: pydoc, or the path of a file in UTF-8."""
    tokenizer: str | None = None
    """Path of a Hugging Face tokenizer.json; characters by default."""
    steps: int = 1440
    """Training steps, of one batch each."""
    batch_size: int = 4
    """Windows of `context` tokens in a batch."""
    context: int = 128
    """Tokens in a window."""
    width: int = 192
    """Width of the rows."""
    heads: int = 3
    """Attention heads."""
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
    """Of the preconditioning: deviation of an element of an embedding."""
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

    def corpus(self) -> Corpus:
        """The text, tokenized and split.

        Raises:
            ValueError: the text or the tokenizer cannot be read.
            ImportError: the tokenizer needs a package that is not installed.
        """
        return load_corpus(self.data, part=self.part, tokenizer=self._tokenizer())

    def learner(self) -> TextLearner:
        """The network of this run with its data, ready to train."""
        return TextLearner(self, self.corpus())

    def _tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        try:
            text = Path(self.tokenizer).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer must be a readable JSON file: {error}") from error
        return tokenizer_from_json(text)


# For a GPU with 80 GB: about the size of GPT-2; a text of some 100 MB, and a tokenizer file.
GPU = TextRun(
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


class TextLearner(_base.Learner):
    """A `CausalLM` in training on text.

    Args:
        run: what to train.
        corpus: what to train on and what to evaluate on.
    """

    def __init__(self, run: TextRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            lambda: CausalLM(run.model_config(corpus.tokenizer.size)),
            run.blocks_config,
        )
        self.text, self.corpus = run, corpus

    def counted(self) -> list[nn.Module]:
        """The MLPs: a layer calls its own once for clean rows and once for noisy ones."""
        return [layer.mlp for layer in self.network.layers]

    def host_batch(self, step: int) -> _base.Batch:
        """Batch number `step`, on the CPU."""
        run = self.text
        tokens = self.corpus.training.tokens
        return {
            "tokens": random_windows(tokens, run.context, run.batch_size, seed=run.seed, step=step)
        }

    def plain_loss(self, batch: _base.Batch) -> Tensor:
        """Cross-entropy of the plain next-token model."""
        return self.network.next_token_loss(batch)

    def measure(self) -> dict[str, Any]:
        """Bits per character of some of the held-out text, by the first block alone in blocks."""
        return {"bits": self.bits(windows=POINT_WINDOWS)}

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer."""
        (folder / TOKENIZER_FILE).write_text(self.corpus.tokenizer.to_json(), encoding="utf-8")

    def progress(self, point: dict[str, Any]) -> str:
        """The bits per character."""
        return f"{point['bits']:.3f} bits a character"

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

    def bits(self, *, num_steps: int = 1, windows: int | None = None) -> float:
        """Bits per character of the held-out text, see `bits_per_character`."""
        return bits_per_character(
            self.trained,
            self.corpus.evaluated,
            self.text.context,
            num_steps=num_steps,
            windows=windows,
        )

    def samples(self, *, num_steps: int | None) -> list[str]:
        """Continuations of places spread over the held-out text, at temperature 1.

        Args:
            num_steps: denoising steps; None for the plain model.
        """
        prompts, _ = continuations(self.corpus.evaluated, self.text.context)
        written = generate(
            self.trained,
            prompts,
            max_new_tokens=self.text.context - PROMPT,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed(NOISE_SEED),
        )
        return [self.corpus.tokenizer.decode(tokens.tolist()) for tokens in written]


def continuations(text: Text, context: int) -> tuple[Tensor, Tensor]:
    """Prompts spread evenly over a text, and how the text itself goes on, up to `context` tokens.

    Returns:
        int64 [SAMPLES, PROMPT] and [SAMPLES, context - PROMPT].
    """
    starts = torch.linspace(0, len(text.tokens) - context, SAMPLES).long()
    windows = text.tokens[starts[:, None] + torch.arange(context)]
    return windows[:, :PROMPT], windows[:, PROMPT:]


@torch.no_grad()
def bits_per_character(
    model: Any,
    text: Text,
    context: int,
    *,
    num_steps: int = 1,
    windows: int | None = None,
    batch_size: int = 32,
) -> float:
    """Bits per character of a text under a model, every token with half a window before it.

    In blocks with one step the first block, from noise at sigma_max, is a next-token predictor, and
    this is its cross-entropy. With more steps the tokens' probabilities are those of the last
    call, on the way from noise that does not know the token, so that it is an upper bound.

    Args:
        model: a `CausalLM` or its `DiffusionBlocks`.
        text: what to score; all but its first token.
        context: tokens in a window.
        num_steps: denoising steps; without a meaning for the plain model.
        windows: score the tokens of the first so many windows only.
        batch_size: windows at a time.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(NOISE_SEED)
    nats, count, seen = 0.0, 0, 0
    for tokens, scored in scored_windows(text.tokens, context, batch_size):
        if windows is not None and seen >= windows:
            break
        seen += len(tokens)
        losses = next_token_nll(
            model, tokens.to(device), num_steps=num_steps, generator=generator
        ).cpu()
        nats += losses[scored[:, 1:]].double().sum().item()
        count += int(scored[:, 1:].sum())
    return nats / count / math.log(2) * len(text.tokens) / text.characters
