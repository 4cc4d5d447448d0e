"""Negative log-likelihoods of tokens under a language model: exact, or a bound over all blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks import DiffusionBlocks, unwrapped
from dblocks.blocks.targets.padding import (
    check_attention_mask,
    check_ids,
    from_front,
    starts_of,
    to_front,
)
from dblocks.blocks.targets.token_batch import TokenBatch, padded_documents
from dblocks.config import check_count
from dblocks.sampling.interface import CausalNetwork, NextTokenNetwork, check_some_texts
from dblocks.sampling.samplers import initial_noise, product_logits
from dblocks.schedules.random import check_generator, draw_device


class Texts(NamedTuple):
    """Texts with padding moved to the end, where causal models do not see it."""

    tokens: Tensor
    """int64 [N, T]."""
    shown: Tensor | None
    """bool [N, T], false at padding; None if there is none."""
    starts: Tensor | None
    """The original index of each text's first token, int64 [N]."""
    cond: dict[str, Any]
    """Other inputs of the network; per-token inputs are moved in the same way."""

    @property
    def counted(self) -> Tensor | None:
        """Which tokens after the first column are scored, bool [N, T - 1]; None for all."""
        if self.cond.get("cu_seqlens") is not None:
            # The first token of each document is not scored.
            given = TokenBatch(tokens=self.tokens, cu_seqlens=self.cond["cu_seqlens"])
            return given.positions()[None, 1:] > 0
        return None if self.shown is None else self.shown[:, 1:]

    @property
    def scored(self) -> Tensor:
        """As `counted`, at the original positions."""
        return self.back(torch.ones_like(self.tokens[:, 1:], dtype=torch.bool))

    def back(self, values: Tensor) -> Tensor:
        """Values [N, T - 1] at the original positions; 0 where no token is scored."""
        counted = self.counted
        if counted is None:
            return values
        values = nnf.pad(values.masked_fill(~counted, 0), (1, 0))
        return from_front(values, self.starts)[:, 1:]


class Bound(NamedTuple):
    """An upper bound of the negative log-likelihood of each token, in nats; all float32."""

    nll: Tensor
    """An unbiased estimate of the bound, [N, T - 1]."""
    by_block: Tensor
    """The contribution of each block, [B, N, T - 1]."""
    variance: Tensor
    """A conservative estimate of each token's contribution to the variance of the sum of `nll`, [N,
    T - 1]; tokens that are generated at once share their levels and contribute equally."""
    scored: Tensor
    """Which tokens are neither padding nor the first of a text, bool [N, T - 1]."""

    def mean(self, scored: Tensor | None = None) -> tuple[float, float]:
        """The mean over tokens, and its standard error due to the random draws, not to the choice
        of texts.

        Args:
            scored: bool [N, T - 1], the tokens to average over, without padding; all by default.

        Raises:
            ValueError: no token is scored.
        """
        scored = self.scored if scored is None else self.scored & scored
        nll, variance = self.nll.double()[scored], self.variance.double()[scored]
        if nll.numel() == 0:
            raise ValueError("the mean of a bound needs at least one scored token, got none")
        return nll.mean().item(), variance.sum().sqrt().item() / nll.numel()


@torch.no_grad()
def next_token_nll(
    model: DiffusionBlocks | NextTokenNetwork,
    tokens: Tensor,
    *,
    num_steps: int | None = None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    **cond: Any,
) -> Tensor:
    """Negative log-likelihood of each token given those before it, in nats.

    In blocks it is computed by the first block at sigma_max, where the noisy input carries no
    information: this is an exact next-token predictor, as a plain model is. With `tokens_per_block`
    tokens at once, each token is predicted from the tokens before its block of tokens. Divide the
    mean by ln 2 for bits per token.

    Args:
        model: the blocks of a `CausalLM`, a `RecurrentLM` or a converted causal model, or one of
            the first two as a plain model.
        tokens: int64 [N, T].
        num_steps: for a plain `RecurrentLM`, the number of recurrences, by default their mean in
            training; otherwise 1 or None. The prediction after several Euler steps depends on a
            state that the steps drew, so its cross-entropy is not a likelihood; see
            `denoising_bound`.
        generator: source of the noise; by default the default generator of the tokens' device. For
            a plain `RecurrentLM` on the CPU.
        attention_mask: [N, T], 0 at padding before or after each text. The values of a text are
            those of the text alone, and 0 at padding and at its first token; take the mean over the
            scored tokens.
        cond: other inputs of the network, such as the encoder_tokens of a T5; the result is 0 at
            the first token of each document of `cu_seqlens`.

    Returns:
        float32 [N, T - 1]: the first token of a sequence is given.

    Raises:
        TypeError: `model` is not one of these.
        ValueError: `num_steps` is above 1 for blocks or for a plain `CausalLM`; or there is no
            text, or one token only.
    """
    model = unwrapped(model)
    check_generator(generator)
    if isinstance(model, DiffusionBlocks):
        _of_tokens(model)
        texts = _texts(tokens, attention_mask, cond, _block_size(model))
        tokens = texts.tokens
        if num_steps not in (None, 1):
            raise ValueError(
                "num_steps must be 1 or None in blocks, since several steps have no likelihood, "
                f"got {num_steps}; see dblocks.sampling.denoising_bound"
            )
        z = _noise_at_top(model, tokens, generator)
        top = z.new_full(z.shape[:1], model.config.noise_schedule.sigma_max)
        logits = model.logits(z, top, block=0, tokens=tokens, **texts.cond)[:, 1:]
    elif isinstance(model, NextTokenNetwork):
        if cond:
            raise ValueError(f"a plain model takes only tokens, got {sorted(cond)} too")
        steps, texts = model.plain_steps(num_steps), _texts(tokens, attention_mask, cond)
        tokens = texts.tokens
        logits = model.next_token_logits(tokens, num_steps=steps, generator=generator)[:, :-1]
    else:
        raise TypeError(
            "model must be a CausalLM, a RecurrentLM or the DiffusionBlocks of one, "
            f"got {type(model).__name__}; see dblocks.models"
        )
    return texts.back(_costs(logits, tokens))


@torch.no_grad()
def product_nll(
    model: DiffusionBlocks,
    tokens: Tensor,
    *,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    **cond: Any,
) -> Tensor:
    """Negative log-likelihood of each token under the product of all blocks' predictions, in nats.

        ln p(k) = mean over blocks of ln p_b(k), normalised

    Each block is called once at sigma_max, where the noisy input carries no information, so this is
    exact: `generate(product=True)` samples from this distribution. See `product_logits`.

    Args:
        model: the blocks of a language model, trained with `BlocksConfig.top_share` above 0.
        tokens: int64 [N, T].
        generator: source of the noise; by default that of the tokens' device.
        attention_mask: [N, T], 0 at padding before or after each text. The values of a text are
            those of the text alone, and 0 at padding and at its first token; take the mean over the
            scored tokens.
        cond: other inputs of the network, such as the encoder_tokens of a T5; the result is 0 at
            the first token of each document of `cu_seqlens`.

    Returns:
        float32 [N, T - 1].

    Raises:
        TypeError: `model` is no `DiffusionBlocks` of a language model.
        ValueError: blocks after the first one never saw sigma_max in training; or there is no
            text, or one token only.
    """
    model = _blocks(model)
    texts = _texts(tokens, attention_mask, cond, _block_size(model))
    tokens = texts.tokens
    z = _noise_at_top(model, tokens, generator)
    logits = product_logits(model, z, tokens=tokens, **texts.cond)[:, 1:]
    return texts.back(_costs(logits, tokens))


@torch.no_grad()
def denoising_bound(
    model: DiffusionBlocks,
    tokens: Tensor,
    *,
    draws: int = 2,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    **cond: Any,
) -> Bound:
    """An upper bound of the negative log-likelihood of each token under all blocks, in nats.

    The variational bound of a continuous diffusion of the token's embedding y (Kingma et al. 2021),
    where the token is finally predicted from the noisy embedding z at sigma_min:

        |y|^2/(2 sigma_max^2)  +  int |y - denoised|^2/sigma^3 d(sigma)  -  ln p(token | z)

    The integral is over [sigma_min, sigma_max], with each level evaluated by the block that owns
    it; `top_share` does not affect it. It is estimated with ln sigma uniform in each block's range
    and stratified: one draw in each of `draws` equal parts. It bounds the negative log-likelihood
    of the stochastic reverse process in the limit of small steps, not that of text generated by
    Euler steps.

    Args:
        model: the blocks of a language model.
        tokens: int64 [N, T].
        draws: number of levels per block of layers and token (or block of tokens), at least 2.
        generator: source of levels and noise; by default the default generator of the tokens'
            device.
        attention_mask: [N, T], 0 at padding before or after each text. The values of a text are
            those of the text alone, and 0 at padding and at its first token; take the mean over the
            scored tokens.
        cond: other inputs of the network, such as the encoder_tokens of a T5; the result is 0 at
            the first token of each document of `cu_seqlens`.

    Raises:
        TypeError: `model` is no `DiffusionBlocks` of a language model.
        ValueError: `draws` is less than 2, or there is no text, or one token only.
    """
    model = _blocks(model)
    if check_count("draws", draws) < 2:
        raise ValueError(f"draws must be at least 2, for the standard error, got {draws}")
    network = cast(Any, model.base_model)
    schedule, num_blocks = model.config.noise_schedule, model.config.num_blocks
    target, k = network.target, _block_size(model)
    texts = _texts(tokens, attention_mask, cond, k)
    tokens, cond = texts.tokens, texts.cond
    y = target.embed(target.check({"tokens": tokens, "cu_seqlens": cond.get("cu_seqlens")}))
    ends = schedule.boundaries(num_blocks).tolist()
    parts, variances = [], []
    for block, (high, low) in enumerate(pairwise(ends)):
        errors = _scaled_errors(model, tokens, y, block, (low, high), draws, generator, cond)
        parts.append(errors.sum(0))
        variances.append(_variance(errors, k, texts.counted))
    by_block = torch.stack(parts)
    prior = y.square().sum(-1)[:, 1:] / (2 * schedule.sigma_max**2)
    z = y + schedule.sigma_min * _normal(y.shape, tokens, generator)
    sigma = z.new_full(z.shape[:1], schedule.sigma_min)
    logits = model.logits(z, sigma, block=num_blocks - 1, tokens=tokens, **cond)[:, 1:]
    nll = by_block.sum(0) + prior + _costs(logits, tokens)
    variance = torch.stack(variances).sum(0)
    by_block = torch.stack([texts.back(part) for part in by_block])
    return Bound(texts.back(nll), by_block, texts.back(variance), texts.scored)


def _costs(logits: Tensor, tokens: Tensor) -> Tensor:
    """-ln p of each token but the first, [N, T - 1]."""
    return nnf.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _texts(
    tokens: Tensor, attention_mask: Tensor | None, cond: dict[str, Any], block_size: int = 1
) -> Texts:
    check_some_texts(tokens)
    if tokens.ndim == 2 and tokens.shape[1] == 1:
        raise ValueError(
            "texts must have at least 2 tokens, since the first one is not scored, got 1; leave "
            "such texts out"
        )
    if attention_mask is None:
        return Texts(tokens, None, None, cond)
    if cond.get("cu_seqlens") is not None:
        raise padded_documents()
    shown = check_attention_mask(attention_mask, tuple(tokens.shape)).to(tokens.device)
    if block_size > 1 and (shown.sum(1) % block_size).any():
        raise ValueError(
            f"the lengths of texts must be multiples of tokens_per_block={block_size}, got "
            f"{shown.sum(1).tolist()} in the attention_mask; cut the texts"
        )
    starts = starts_of(shown)
    if cond.get("position_ids") is not None:
        # The network checks their values.
        ids = check_ids("position_ids", cond["position_ids"], tuple(tokens.shape), 2**63)
        cond = {**cond, "position_ids": to_front(ids, starts)}
    return Texts(to_front(tokens, starts), to_front(shown, starts), starts, cond)


def _scaled_errors(
    model: DiffusionBlocks,
    tokens: Tensor,
    y: Tensor,
    block: int,
    levels: tuple[float, float],
    draws: int,
    generator: torch.Generator | None,
    cond: Mapping[str, Any],
) -> Tensor:
    """The contributions of the strata of a block's levels to the integral, [draws, N, T - 1]."""
    low, high = map(math.log, levels)
    k, (N, T) = _block_size(model), tokens.shape
    device = draw_device(generator, tokens.device)
    errors = []
    for draw in range(draws):
        u = torch.rand(N, -(-T // k), generator=generator, device=device).to(tokens.device)
        u = u.repeat_interleave(k, 1)[:, :T]
        sigma = (low + (high - low) * (draw + u) / draws).exp().clamp(*levels)
        z = y + sigma[..., None] * _normal(y.shape, tokens, generator)
        error = (y - model(z, sigma, block=block, tokens=tokens, **cond)).square().sum(-1)
        errors.append((high - low) / draws * error / sigma.square())
    return torch.stack(errors)[:, :, 1:]


def _variance(errors: Tensor, k: int, counted: Tensor | None = None) -> Tensor:
    """The variance of the sum over strata of errors [draws, N, T - 1], divided among tokens.

    Blocks of k tokens share their levels, so the variance of their sum is divided among them.
    """
    draws, N, rows = errors.shape
    # From pairs of neighbouring strata, as if both were draws from their union. The first token has
    # no row.
    ends = (1, -(rows + 1) % k)
    ones = errors.new_ones(1, rows) if counted is None else counted.to(errors.dtype)
    pairs = nnf.pad((errors[1:] - errors[:-1]) * ones, ends).view(draws - 1, N, -1, k).sum(-1)
    counts = nnf.pad(ones, ends).view(len(ones), -1, k).sum(-1).clamp(min=1)
    shares = pairs.square().sum(0) * (draws / (2 * (draws - 1))) / counts
    return shares.repeat_interleave(k, 1)[:, 1 : rows + 1]


def _block_size(model: DiffusionBlocks) -> int:
    """The number of tokens that share a level, which are generated at once."""
    return cast(CausalNetwork, model.base_model).block_size


def _blocks(model: Any) -> DiffusionBlocks:
    model = unwrapped(model)
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(
            f"model must be the DiffusionBlocks of a language model, got {type(model).__name__}; "
            "next_token_nll takes a plain model too"
        )
    return _of_tokens(model)


def _of_tokens(model: DiffusionBlocks) -> DiffusionBlocks:
    if not isinstance(model.base_model, CausalNetwork):
        raise TypeError(
            "model must be the DiffusionBlocks of a language model, with token embeddings as "
            f"targets, got those of a {type(model.base_model).__name__}; see dblocks.models"
        )
    return model


def _noise_at_top(
    model: DiffusionBlocks, tokens: Tensor, generator: torch.Generator | None
) -> Tensor:
    """A state [N, T, D] of pure noise at sigma_max for every token."""
    schedule, width = model.config.noise_schedule, cast(CausalNetwork, model.base_model).width
    device = draw_device(generator, tokens.device)
    z = initial_noise((*tokens.shape, width), schedule, generator=generator, device=device)
    return z.to(tokens.device)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = draw_device(generator, like.device)
    return torch.randn(shape, generator=generator, device=device).to(like.device)
