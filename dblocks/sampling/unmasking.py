"""Text generation with a masked diffusion model, by unmasking tokens step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dblocks.blocks import DiffusionBlocks, unwrapped
from dblocks.blocks.targets.padding import check_attention_mask, from_front, starts_of, to_front
from dblocks.blocks.targets.token_batch import TokenSizes, check_tokens
from dblocks.sampling.choice import Choice
from dblocks.sampling.interface import TokenNetwork
from dblocks.schedules import MASKED, MaskSchedule
from dblocks.schedules.random import draw_seed, uniforms_at

Callback = Callable[[dict[str, Any]], object]


class Written(NamedTuple):
    """The result of sampling, and its cost."""

    tokens: Tensor
    """int64 [N, T] without masked tokens; padding is unchanged."""
    calls: tuple[int, ...]
    """Number of calls of each block's layers."""
    rows: tuple[int, ...]
    """Number of sequences that ran through each block, over all calls."""


@torch.no_grad()
def unmask(
    model: DiffusionBlocks,
    tokens: Tensor,
    *,
    num_steps: int | None = None,
    spacing: Literal["equal_mass", "uniform"] = "equal_mass",
    share_of: Literal["tokens", "gaps"] = "tokens",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    attention_mask: Tensor | None = None,
) -> Written:
    """Replaces the masked tokens of sequences by ancestral sampling.

    In the step from time t to s, each masked token is unmasked with probability `(alpha_s -
    alpha_t)/(1 - alpha_t)` and then sampled from the softmax of the logits that the block of t
    computes for the sequence at t. The last step ends at 0 and unmasks all remaining tokens. The
    step at which a token is unmasked does not depend on the sampled tokens, so it is drawn in
    advance, with one uniform random number per token: a step runs only the sequences in which it
    unmasks a token, and a step that unmasks nothing calls no network.

    Given tokens never change. A partly given sequence begins at the t of its own mask ratio, at
    which a model trained on whole texts has seen as many masked tokens; its steps are the grid
    scaled to that ratio. For a model trained with a `loss_mask`, whose mask ratios count only
    tokens that are not given, use `share_of="gaps"`: sequences begin at t = 1.

    The result depends on the generator's state, the sequence and its index in the batch. Up to
    rounding it does not depend on other sequences or on the device.

    Args:
        model: the blocks of a `MaskedLM` or of a masked language model wrapped by
            `dblocks.convert`, possibly wrapped by torch.compile or AveragedModel.
        tokens: int64 [N, T]: given tokens, and `MASKED` elsewhere.
        num_steps: number of steps; by default T, so that each unmasks about one token.
        spacing: spacing of the steps, see `MaskSchedule.steps`.
        share_of: the tokens counted in the mask ratio: all "tokens", or the "gaps".
        temperature: divisor of the logits; 0 chooses the most likely token.
        top_k: sample only from this many most likely tokens.
        top_p: then sample only from the smallest set of most likely tokens whose probabilities sum
            to at least this.
        generator: a CPU generator, from which one number is drawn.
        callback: called after each step, even if it unmasks nothing, with a dict of 'i',
            'num_steps' and 'tokens', the sequences so far; with an `attention_mask`, their padding
            is at the end.
        attention_mask: [N, T], 0 at padding before or after each sequence. Padding does not affect
            the result; the default of `num_steps` is then the length of the longest sequence.

    Raises:
        TypeError: `model` is not one of these, or `tokens` are not int64.
        FloatingPointError: logits are not finite; on a GPU raised at the end.
        ValueError: `tokens` are neither in the vocabulary nor `MASKED`, or longer than the context;
            or another value is invalid.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329, algorithm 2.
    """
    blocks, sizes, schedule = _parts_of(model)
    choice = Choice(temperature, top_k, top_p)
    if tokens.dtype == torch.int64 and tokens.ndim == 2:
        check_tokens(tokens.where(tokens != MASKED, 0), sizes.vocab_size)
    else:
        check_tokens(tokens, sizes.vocab_size)
    N, T = tokens.shape
    if sizes.context < T:
        raise ValueError(f"tokens must be at most context={sizes.context} long, got {T}; cut them")
    shown = starts = None
    if attention_mask is not None:
        shown = check_attention_mask(attention_mask, (N, T)).to(tokens.device)
        starts = starts_of(shown)
        tokens, shown = to_front(tokens, starts), to_front(shown, starts)
    if share_of not in ("tokens", "gaps"):
        raise ValueError(f"share_of must be 'tokens' or 'gaps', got {share_of!r}")
    u, picks = _uniforms(N, T, sizes.context, draw_seed(generator))
    # On the CPU: the host needs to know which rows a step runs.
    real = torch.ones(N, T, dtype=torch.bool) if shown is None else shown.cpu()
    gaps = (tokens.cpu() == MASKED) & real
    share = _share(gaps, real) if share_of == "tokens" else torch.ones(N, 1, dtype=torch.float64)
    if num_steps is None:
        num_steps = max(int(real.sum(1).max()), 1) if N else T
    levels = _levels(schedule, share, schedule.steps(num_steps, spacing))
    owners = schedule.block_of(levels, blocks.config.num_blocks)
    # A gap is masked at t if its uniform number is below the mask ratio, as in training.
    step_of = (u[:, None] < schedule.masked(levels)[:, :, None] / share[..., None]).sum(1) - 1
    step_of = torch.where(gaps, step_of, -1)
    device = next(blocks.parameters()).device
    z, picks, bound = tokens.to(device, copy=True), picks.to(device), blocks.bind()
    calls, rows = [0] * blocks.config.num_blocks, [0] * blocks.config.num_blocks
    for i in range(levels.shape[1]):
        changes = step_of == i
        changing = changes.any(1)
        for block in owners[changing, i].unique().tolist():
            row = (changing & (owners[:, i] == block)).nonzero()[:, 0]
            n, k = changes[row].nonzero(as_tuple=True)
            there = row.to(device)
            if shown is not None:
                bound = blocks.bind(attention_mask=shown[row.to(shown.device)].to(device))
            logits = bound.logits(z[there], levels[row, i].float().to(device), block=block)
            n, k, at = n.to(device), k.to(device), row[n].to(device)
            z[at, k] = choice.token(logits[n, k], picks[at, k])
            calls[block] += 1
            rows[block] += len(row)
        if callback is not None:
            callback({"i": i, "num_steps": levels.shape[1], "tokens": z})
    choice.check()
    return Written(from_front(z, starts), tuple(calls), tuple(rows))


def _parts_of(model: Any) -> tuple[DiffusionBlocks, TokenSizes, MaskSchedule]:
    blocks = unwrapped(model)
    network = blocks.base_model if isinstance(blocks, DiffusionBlocks) else blocks
    masked = isinstance(blocks, DiffusionBlocks) and blocks.config.schedule.corruption == "masks"
    if not (masked and isinstance(network, TokenNetwork)):
        raise TypeError(
            "model must be the DiffusionBlocks of a MaskedLM, "
            f"got {'that of a ' if network is not blocks else 'a '}{type(network).__name__}"
        )
    return blocks, network.sizes, blocks.config.mask_schedule


def _uniforms(N: int, T: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two uniform random numbers per token, [N, T], functions of its row and position."""
    sample, position = (torch.arange(n, device="cpu") for n in (N, T))
    first = 2 * (context * sample[:, None] + position)
    return uniforms_at(first, seed), uniforms_at(first + 1, seed)


def _share(gaps: Tensor, real: Tensor) -> Tensor:
    """The fraction of gaps in each sequence, float64 [N, 1]; 1 if it has none."""
    share = gaps.double().sum(1, keepdim=True) / real.sum(1, keepdim=True)
    return share.where(share > 0, 1.0)


def _levels(schedule: MaskSchedule, share: Tensor, grid: Tensor) -> Tensor:
    """Times of each sequence, float64 [N, steps]: at the mask ratios of the grid times `share`."""
    return torch.where(share == 1, grid, schedule.time_at(share * schedule.masked(grid)))
