"""The masked diffusion language model: `dblocks train masked-lm`, also `eval` and `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.models.masked_lm import MaskedLM, MaskedLMConfig
from dblocks.nn import ConditioningKind
from dblocks.recipes import columns
from dblocks.recipes.command import Recipe
from dblocks.recipes.data.batches import TextData
from dblocks.recipes.data.text import Corpus, load_corpus
from dblocks.recipes.data.text_sources import Fold
from dblocks.recipes.evaluated import data_of
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.masked import Bits, bits_per_character
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.progress import progress_bar
from dblocks.recipes.run import Run, check_seed
from dblocks.recipes.tables import COSTS
from dblocks.recipes.text_run import TextOptions, continuations
from dblocks.recipes.trainer import Trainer
from dblocks.recipes.writing import TOKENS, load_text_model, prompt_tokens
from dblocks.sampling import points_for, unmask
from dblocks.schedules import MASKED, MaskSchedule
from dblocks.schedules.mask import ScheduleKind

SAMPLED = "unmasked"  # key of the samples in records
POINT_WINDOWS = 16  # held-out windows for a point of the curve


@dataclass(frozen=True, kw_only=True)
class MaskedLMRun(TextOptions, Run):
    """Train a 12-layer model that predicts the masked tokens of a text, and save it.

    In training a random fraction of the tokens, the mask ratio, is masked, and the model predicts
    them from both sides. The layers are divided into equal blocks, each for its own range of mask
    ratios, so a training step runs one block only and stores only its activations. Prints the bits
    per character of held-out text and the cost; writes model.safetensors, config.json,
    tokenizer.json and run.json to --out.
    """

    steps: int = 1500
    batch_size: int = 8
    """Windows of text per batch."""
    width: int = 96
    heads: int = 3
    kv_heads: int | None = None
    """Number of key/value heads; by default that of --heads."""
    points: int = 5
    rope_theta: float = 100.0  # with 10,000, training with a context of 128 was slower
    """Base of the frequencies of rotary positions; with 100, periods are 6 to about 500 tokens."""
    conditioning: ConditioningKind = "dit"
    """AdaLN for the mask ratio, in blocks and end to end:
    none, a plain layer norm; dit, that of DiT; official, that of the published code, which also
    applies SiLU to shifts, scales and gates."""
    gate_init: float = 1.0
    """Initial gates; with 1, layers start like layers without gates, not as the identity."""
    schedule: ScheduleKind = "linear"
    """Mask ratio as a function of time t. It defines the levels and, with --draw t, the
    distribution of mask ratios in training."""
    draw: Literal["alpha", "t"] = "alpha"  # trained a little faster than cosine with t
    """Variable that is uniform in training: alpha, the fraction of tokens that are not masked, or
    the time t."""
    weighting: Weighting = "auto"
    """Factor of the loss at a mask ratio: auto, the weight of the variational bound; none, 1."""
    overlap: float = 0.1
    """Overlap of the blocks' ranges of the mask ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()

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
        """The configuration of blocks."""
        return BlocksConfig(
            num_blocks=self.num_blocks,
            schedule=MaskSchedule(self.schedule, self.draw),
            overlap=self.overlap,
            weighting=self.weighting,
        )

    def trainer(self) -> MaskedLMTrainer:
        """The trainer of this run, with network and data."""
        return MaskedLMTrainer(self, self.read_corpus(self.part))


# For a GPU with 80 GB: about the size of GPT-2. Use a text of some 100 MB and a tokenizer file.
GPU = MaskedLMRun(
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

RECIPE = Recipe(
    run=MaskedLMRun(),
    gpu=GPU,
    paper=EXPERIMENTS["masked-lm"],
    out=Path("runs/masked-lm"),
    columns=(*columns.MASKED_LM, *COSTS),
    after="Write text, or fill the gaps of one, with\n"
    "dblocks sample masked-lm --checkpoint {out} --prompt 'The '\n"
    "dblocks sample masked-lm --checkpoint {out} --infill 'The ______ is a string'",
)


class MaskedLMTrainer(Trainer):
    """Trains a `MaskedLM` on text; end to end, as one block of all layers.

    Args:
        run: options of the run.
        corpus: the texts for training and evaluation.
    """

    def __init__(self, run: MaskedLMRun, corpus: Corpus) -> None:
        super().__init__(
            run,
            TextData(corpus, run.context, run.batch_size, run.seed),
            lambda: MaskedLM(run.model_config(corpus.tokenizer.size)),
            run.blocks_config,
        )
        self.options, self.corpus = run, corpus

    def measure(self) -> dict[str, Any]:
        """Bits per character of a part of the held-out text."""
        return {"bits": self.bits(windows=POINT_WINDOWS).bits}

    def progress(self, point: dict[str, Any]) -> str:
        """The bits per character."""
        return f"{point['bits']:.3f} bits per character"

    def bits(self, *, windows: int | None = None) -> Bits:
        """The bound for the held-out text: all of it, or a number of windows."""
        text, context = self.corpus.evaluated, self.options.context
        points = points_for(self.num_blocks)
        return bits_per_character(
            self.trained, text, context, windows=windows, points=points, seed=NOISE_SEED
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the held-out text, and samples."""
        bits = self.bits(windows=self.options.windows)
        prompts, truth = continuations(self.corpus.evaluated, self.options.context)
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
            "bits_by_share": bits.by_ratio,
            "samples_written": {SAMPLED: [self.corpus.tokenizer.decode(row) for row in texts]},
            "calls": written.calls,
            "rows": written.rows,
        }


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the bits per character of held-out text under a saved masked model.

    The result is an upper bound: the expected cost of generating the text in random order.
    """

    data: str | None = None
    """Text to evaluate on; uses its held-out part. By default that of the training, by its
    run.json. See `dblocks train masked-lm`."""
    data_path: str | None = None
    """See `dblocks train masked-lm`."""
    fold: Fold | None = None
    """Reduce the text to letters and spaces, as in training."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train masked-lm`."""
    points: int | None = None
    """Number of evenly spaced mask ratios at which to evaluate; a multiple of the number of blocks.
    By default 12, or the next multiple."""
    seed: int = 0
    """Seed of the masks."""

    def __call__(self) -> None:
        """Print the bits per character of the held-out part."""
        check_seed(self.seed)
        model, network, tokenizer = load_text_model(self.checkpoint, MaskedLM)
        data, options = data_of(
            self.checkpoint, data=self.data, data_path=self.data_path, fold=self.fold
        )
        text = load_corpus(data, tokenizer=tokenizer, **options).evaluated
        points = points_for(model.config.num_blocks) if self.points is None else self.points
        found = bits_per_character(
            model, text, network.config.context, points=points, seed=self.seed
        )
        print(
            f"{found.bits:.3f} bits per character (bound, standard error {found.error:.3f}) on "
            f"{text.characters:,} held-out characters"
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Continue a text with a saved masked model, or fill in its gaps.

    Tokens are generated in random order, a few in each step.
    """

    prompt: str = "The "
    """The text to continue."""
    infill: str | None = None
    """A text with gaps, instead of a prompt: each _ is one token to fill in."""
    gap: str = "_"
    """The character that marks a token to fill in."""
    checkpoint: Path = RECIPE.out
    """Folder written by `dblocks train masked-lm`."""
    tokens: int | None = None
    """Number of tokens to generate after the prompt; by default 100, or as many as fit into the
    context."""
    steps: int | None = None
    """Number of steps; by default the total number of tokens. Steps that unmask no token run no
    layers."""
    temperature: float = 1.0
    """Divisor of the logits; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Sample only from this many most likely tokens."""
    top_p: float | None = None
    """Sample only from the smallest set of most likely tokens whose probabilities sum to at least
    this."""
    seed: int = 0
    """Seed of the order of unmasking and of the tokens."""

    def __call__(self) -> None:
        """Generate and print the text, and the number of calls of each block."""
        check_seed(self.seed)
        model, network, tokenizer = load_text_model(self.checkpoint, MaskedLM)
        sequence = torch.tensor([self._sequence(tokenizer, network.config.context)])
        with progress_bar("sampling", "writing") as bar:

            def show(state: dict[str, Any]) -> None:
                bar.total = state["num_steps"]
                bar.update()

            written = unmask(
                model,
                sequence,
                num_steps=self.steps,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=torch.Generator().manual_seed(self.seed),
                callback=show,
            )
        print(tokenizer.decode(written.tokens[0].tolist()))
        calls = ", ".join(f"block {b}: {n}" for b, n in enumerate(written.calls))
        print(f"calls of each block's layers: {calls}")

    def _sequence(self, tokenizer: Any, context: int) -> list[int]:
        """The tokens of the text, masked at gaps.

        Raises:
            ValueError: there is no gap, or no text.
        """
        if self.infill is None:
            prompt = prompt_tokens(self.prompt, tokenizer)
            tokens = min(TOKENS, context - len(prompt)) if self.tokens is None else self.tokens
            if tokens < 1 or len(prompt) + tokens > context:
                raise ValueError(
                    f"--tokens must be at least 1 and fit with the prompt's {len(prompt)} tokens "
                    f"into the context of {context}, got {tokens}"
                )
            return [*prompt, *[MASKED] * tokens]
        if len(self.gap) != 1 or self.gap not in self.infill:
            raise ValueError(
                "--infill must have a gap, the one character of --gap for each token to generate, "
                f"got {self.infill!r} and {self.gap!r}"
            )
        first, *others = self.infill.split(self.gap)
        sequence = list(tokenizer.encode(first))
        for part in others:
            sequence += [MASKED, *tokenizer.encode(part)]
        return sequence
