"""Networks whose target is a class or a token, in blocks of unequal layers.

The first block predicts alone, so that more layers there may pay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.study.causal_lm import EXPERIMENT
from benchmarks.study.quality import BITS
from benchmarks.study.rows import Row, Study
from benchmarks.study.self_conditioning import causal_lm as self_conditioned
from dblocks.blocks import BlocksConfig
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.columns import CAUSAL_LM, bits
from dblocks.recipes.masked_lm import MaskedLMRun
from dblocks.recipes.tables import COSTS
from dblocks.recipes.vit import ViTRun

SPLITS = ((6, 4, 2), (2, 4, 6))
HOURS = 0.15  # of a run of the language model, by the records of equal blocks


@dataclass(frozen=True, kw_only=True)
class ViTLayersRun(ViTRun):
    """Train a ViT in blocks of these layers."""

    layers: tuple[int, ...]
    """Of each block, first to last."""

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut and trained."""
        return replace(super().blocks_config(), layers_per_block=self.layers)


@dataclass(frozen=True, kw_only=True)
class CausalLMLayersRun(CausalLMRun):
    """Train a language model in blocks of these layers."""

    layers: tuple[int, ...]
    """Of each block, first to last."""

    def blocks_config(self, num_blocks: int) -> BlocksConfig:
        """How the network is cut and trained."""
        return replace(super().blocks_config(num_blocks), layers_per_block=self.layers)


@dataclass(frozen=True, kw_only=True)
class TopShareRun(MaskedLMRun):
    """Train a masked language model with a share of each block's draws of all tokens masked."""

    top_share: float
    """That share."""

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut and trained."""
        return replace(super().blocks_config(), top_share=self.top_share)


def text_rows() -> list[Row]:
    """The language model's blocks, whose steps run 4 layers on the average whatever the split."""
    run = EXPERIMENT.rows["blocks"][1]
    row = Row(
        name="blocks",
        title="3 blocks",
        method="DiffusionBlocks",
        run=run,
        lrs=EXPERIMENT.lrs[1:],
        shorter=3,
        seeds=EXPERIMENT.seeds,
        hours=HOURS,
        planned=False,
    )
    unequal = [
        replace(
            row,
            name=f"blocks_{''.join(map(str, layers))}",
            title=f"3 blocks of {', '.join(map(str, layers))} layers",
            run=CausalLMLayersRun(**vars(run), layers=layers),
        )
        for layers in SPLITS
    ]
    return [*unequal, *self_conditioned.rows_of(row)]


TEXT = Study(
    name="causal-lm-layers",
    title="a 12-layer language model of width 192 in blocks of unequal layers, and in blocks that "
    "see the prediction of the one before",
    rows=text_rows(),
    quality=BITS,
    headline=lambda record: f"{bits(record):.3f} bits per character",
    columns=(*CAUSAL_LM, *COSTS),
)
