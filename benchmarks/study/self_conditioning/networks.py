"""Networks that also read the prediction of the block before, and blocks that hand it on.

With c the probabilities that block b - 1 predicts at sigma_max, W c is added to the row of the
noisy target; W begins at zero. In training c is made without gradients in a share of the steps, and
left out in the others, so that blocks also predict without it (Chen, Zhang and Hinton 2022, arXiv
2208.04202). Block 0 never has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, BlocksConfig, DiffusionBlocks
from dblocks.blocks.denoiser import Loss
from dblocks.models import CausalLM, CausalLMConfig, ViT, ViTConfig
from dblocks.models.causal_lm import Context
from dblocks.sampling import initial_noise
from dblocks.schedules.random import draw_seed

BEFORE = "before"  # the entry of a batch, or of a call: probabilities [N, K] or [N, T, K]


class Shifted(NamedTuple):
    """The condition of a `ConditionedViT` with a prediction of the block before."""

    patches: Tensor
    """[N, P, D]."""
    shift: Tensor
    """W c, [N, D]."""


class ConditionedViT(ViT):
    """A `ViT` that adds W c to its first token, where it is given c as `before`, [N, K]."""

    reads = (BEFORE,)
    call_reads = ("images", BEFORE)

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.before = _zeros(config.num_classes, config.width)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Any:
        """As of a ViT, with W c."""
        patches, before = super().embed_condition(batch, drop), batch.get(BEFORE)
        if before is None:
            return patches
        _check(before, (len(patches), self.config.num_classes))
        return Shifted(patches, self.before(before))

    def _tokens(self, first: Tensor, patches: Any) -> Tensor:
        if isinstance(patches, Shifted):
            first, patches = first + patches.shift, patches.patches
        return super()._tokens(first, patches)


class ConditionedLM(CausalLM):
    """A `CausalLM` of single rows that adds W c to each, where it is given c as `before`.

    Row i has the prediction of token i, which knows the tokens before it only. [N, T, K].
    """

    reads = (BEFORE,)
    call_reads = (*CausalLM.call_reads, BEFORE)

    def __init__(self, config: CausalLMConfig) -> None:
        if config.rows != "single" or config.tokens_per_block != 1:
            raise ValueError(
                "blocks see the block before in single rows of one token each, got "
                f"rows={config.rows!r} and tokens_per_block={config.tokens_per_block}"
            )
        super().__init__(config)
        self.before = _zeros(config.vocab_size, config.width)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """As of a `CausalLM`, with W c."""
        context, before = super().embed_condition(batch, drop), batch.get(BEFORE)
        if before is None:
            return context
        if context.starts is not None:
            raise ValueError("a batch with 'before' must have no padding, got an attention_mask")
        _check(before, (*context.x.shape[:2], self.config.vocab_size))
        return context._replace(x=context.x + self.before(before).to(context.x.dtype))


class ConditionedBlocks(DiffusionBlocks):
    """A `DiffusionBlocks` whose blocks are trained with the predictions of the blocks before.

    Args:
        model: a `ConditionedViT` or a `ConditionedLM`.
        config: as of `DiffusionBlocks`.
        share: of a block's steps that have them.
    """

    def __init__(
        self, model: ConditionedViT | ConditionedLM, config: BlocksConfig, share: float
    ) -> None:
        super().__init__(cast(Any, model), config)
        self.share = share

    def loss(
        self,
        batch: Batch,
        block: int | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Loss:
        """As of `DiffusionBlocks`; two more numbers are drawn from the generator."""
        if "attention_mask" in batch:  # in every step, not only in those that see the block before
            raise ValueError(
                "a batch of blocks that see the block before must have no padding, got an "
                "attention_mask; give texts of equal length without one"
            )
        given = torch.rand((), generator=generator).item() < self.share
        seed = draw_seed(generator)
        if block and given:
            batch = {**batch, BEFORE: self.before(batch, block, seed)}
        return super().loss(batch, block, generator=generator, **options)

    def before(self, batch: Batch, block: int, seed: int) -> Tensor:
        """The probabilities of block - 1 on a batch, without gradients."""
        model: Any = self.base_model
        read = {name: batch[name] for name in model.call_reads if name in batch}
        shape = (*self.target_shape(read), model.config.width)
        generator = torch.Generator().manual_seed(seed)
        z = initial_noise(shape, self.config.noise_schedule, generator=generator)
        return chain(self, z.to(next(self.parameters()).device), block, **read)[-1].exp()

    def target_shape(self, given: Mapping[str, Tensor]) -> tuple[int, ...]:
        """[N], or [N, T] of a text."""
        tokens = given.get("tokens")
        return (len(given["images"]),) if tokens is None else tuple(tokens.shape)


@torch.no_grad()
def chain(
    model: DiffusionBlocks, z: Tensor, blocks: int | None = None, **cond: Any
) -> list[Tensor]:
    """Log-probabilities [N, ..., K] of each block at sigma_max, given those of the one before.

    Args:
        model: blocks of a `ConditionedViT` or a `ConditionedLM`.
        z: state at sigma_max, [N, ..., D].
        blocks: how many of them, from the first; all by default.
        **cond: what the network's calls read.
    """
    sigma = z.new_full(z.shape[:1], model.config.noise_schedule.sigma_max)
    found: list[Tensor] = []
    for block in range(model.config.num_blocks if blocks is None else blocks):
        given: dict[str, Any] = {**cond, BEFORE: found[-1].exp()} if found else cond
        found.append(model.logits(z, sigma, block=block, **given).log_softmax(-1))
    return found


def product(predictions: list[Tensor]) -> Tensor:
    """The normalised geometric mean of predictions, given and returned as log-probabilities."""
    return torch.stack(predictions).mean(0).log_softmax(-1)


def _zeros(K: int, D: int) -> nn.Linear:
    """W [D, K]."""
    linear = nn.Linear(K, D, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _check(before: Tensor, shape: tuple[int, ...]) -> None:
    if before.shape != shape or not before.is_floating_point():
        raise ValueError(
            f"before must hold probabilities of shape {list(shape)}, got {before.dtype} "
            f"{list(before.shape)}"
        )
