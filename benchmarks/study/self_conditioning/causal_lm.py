"""The language model in self-conditioned blocks: its run, and rows of a study."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as nnf

from benchmarks.study.causal_lm import EVALUATIONS
from benchmarks.study.rows import Row
from benchmarks.study.self_conditioning.networks import (
    ConditionedBlocks,
    ConditionedLM,
    chain,
    product,
)
from benchmarks.study.self_conditioning.runs import (
    FORWARD,
    SHARE,
    check_run,
    layers_per_step,
    made,
    work,
)
from dblocks.recipes.autoregressive import POINT_WINDOWS, AutoregressiveTrainer
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.data.windows import scored_windows
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.sampling import initial_noise

AT_ONCE = 32  # windows that are scored at a time


@dataclass(frozen=True, kw_only=True)
class SelfCausalLMRun(CausalLMRun):
    """Train a language model in blocks that see the prediction of the block before."""

    share: float = SHARE
    """Of a block's steps that see it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self, self.share)
        if self.rows != "single" or self.tokens_per_block != 1:
            raise ValueError(
                "rows must be 'single' and tokens_per_block 1, as a prediction is added to the "
                f"row of its token, got {self.rows!r} and {self.tokens_per_block}"
            )

    def trainer(self) -> SelfCausalLMTrainer:
        """The network of this run with its data, ready to train."""
        return SelfCausalLMTrainer(self)


class SelfCausalLMTrainer(AutoregressiveTrainer):
    """Trains a `ConditionedLM`; its bits are of the last block, through the chain of the others.

    As a token's likelihood is of a single call at sigma_max, where the noisy input knows nothing of
    the token, they are exact.
    """

    def __init__(self, run: SelfCausalLMRun) -> None:
        corpus = run.corpus()
        self.share = run.share
        super().__init__(
            run,
            run,
            corpus,
            lambda: ConditionedLM(run.model_config(corpus.tokenizer.size)),
            lambda lm, batch: lm.next_token_loss(batch),
        )

    def measure(self) -> dict[str, Any]:
        """Bits per character of some of the held-out text."""
        found = self.chain_bits(POINT_WINDOWS)
        return {**found, "bits": found["chain_bits"][-1], "windows": POINT_WINDOWS}

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits of the last block and of every one in the chain, and of the chain's product.

        "first_bits" and "product_without_condition" are those of the first block, and of all blocks
        without a condition.
        """
        windows = self.options.windows
        found = self.chain_bits(windows)
        return {
            "adaln": self.network.config.conditioning != "none",
            "sha256": self.corpus.sha256,
            **found,
            "bits": found["chain_bits"][-1],
            "first_bits": self.bits(windows=windows),
            "product_without_condition": self.bits(product=True, windows=windows),
            **work(self.run, last["layer_evaluations"]),
        }

    @torch.no_grad()
    def chain_bits(self, windows: int | None) -> dict[str, Any]:
        """Bits per character of each block in the chain, and of the product of the chain."""
        text, device = self.corpus.evaluated, self.run.device
        model, generator = cast(ConditionedBlocks, self.model), torch.Generator()
        generator.manual_seed(NOISE_SEED)
        nats, count = torch.zeros(self.num_blocks + 1, dtype=torch.float64), 0
        context, width = self.options.context, self.network.width
        for tokens, scored in scored_windows(text.tokens, context, AT_ONCE, windows=windows):
            z = initial_noise(
                (*tokens.shape, width), model.config.noise_schedule, generator=generator
            )
            found = chain(model, z.to(device), tokens=tokens.to(device))
            for i, predicted in enumerate([*found, product(found)]):
                losses = nnf.nll_loss(
                    predicted[:, 1:].transpose(1, 2).cpu(), tokens[:, 1:], reduction="none"
                )
                nats[i] += losses[scored[:, 1:]].double().sum()
            count += int(scored[:, 1:].sum())
        bits = nats / count / math.log(2) * len(text.tokens) / text.characters
        return {"chain_bits": bits[:-1].tolist(), "product_bits": bits[-1].item()}

    def _made(self, make: Callable[[], Any]) -> tuple[Any, Any]:
        return made(self.run, self.share, self.config, ConditionedLM, make)


def rows_of(blocks: Row) -> list[Row]:
    """Self-conditioned blocks of as much work as `blocks`, a row of equal ones."""
    run = cast(CausalLMRun, blocks.run)
    per_step = layers_per_step(run.depth, run.blocks, SHARE, FORWARD)
    return [
        replace(
            blocks,
            name="blocks_self",
            title="3 blocks that see the one before (bits of the last), forward calls counted as "
            "a third",
            run=SelfCausalLMRun(**{**vars(run), "steps": round(EVALUATIONS / per_step)}),
            part="conditions",
            planned=False,
        )
    ]
