"""Text generation with a language model, trained in blocks or end to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks import DiffusionBlocks, check_trained_at_top, unwrapped
from dblocks.blocks.targets.padding import texts_of
from dblocks.blocks.targets.token_batch import TokenSizes, check_tokens
from dblocks.sampling.cache import Slots
from dblocks.sampling.choice import Choice, Repeats
from dblocks.sampling.generation_config import Writing
from dblocks.sampling.interface import (
    CachedNetwork,
    CausalNetwork,
    NextTokenNetwork,
)
from dblocks.sampling.levels import blocks_of, grid_of, levels_of
from dblocks.sampling.rows import CachedRows, WholeRows
from dblocks.sampling.steps import Sampler, check_sampler
from dblocks.sampling.writers import PlainWriter, ProductWriter, StepWriter, Writer
from dblocks.schedules.random import draw_seed, uniforms_at

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def generate(
    model: DiffusionBlocks | NextTokenNetwork,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | Sequence[int] | None = None,
    cache: bool = True,
    product: bool = False,
    sampler: Sampler = "euler",
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
) -> list[Tensor]:
    """Generates the continuation of each prompt: collects the tokens of `stream`.

    Arguments and errors are those of `stream`.

    Returns:
        For each prompt its new tokens, int64 [at most max_new_tokens], up to and including a
        `stop_token`.
    """
    writing = Writing.of(
        generation_config, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, repetition_penalty=repetition_penalty, stop_token=stop_token, cache=cache,
    )  # fmt: skip
    steps = _begin(
        model, prompts, attention_mask, writing, num_steps, sigmas, generator, product, sampler
    )
    tokens = torch.stack(list(steps), dim=1)
    if not writing.stop_tokens:
        return list(tokens.unbind())
    ends = _among(tokens, writing.stop_tokens)
    lengths = (ends.cumsum(1) == 0).sum(1) + 1
    return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def stream(
    model: DiffusionBlocks | NextTokenNetwork,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | Sequence[int] | None = None,
    cache: bool = True,
    product: bool = False,
    sampler: Sampler = "euler",
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
) -> Iterator[Tensor]:
    """Generates text: yields the next token of every prompt.

    In blocks, each token is denoised by Euler steps; the block that owns a noise level runs it. All
    calls but the last return the expected embedding, and the token is sampled from the logits of
    the last call. A single step, at sigma_max, runs only the first block, as a next-token model
    with that block's layers. With `product`, every block is called once at sigma_max, where the
    noisy input carries no information, and the token is sampled from the normalised geometric mean
    of their predictions, the distribution of `product_nll`. With `tokens_per_block`, a whole block
    of tokens needs this number of calls. A block of tokens begins at the end of a prompt, so
    prompts whose length is a multiple of the block's match training best.

    Each block caches the keys and values of clean tokens in its own layers. The rows of a new token
    are added in the block's first call for the next token, together with the noisy row, so a token
    costs only `num_steps` calls; the prelude of a `RecurrentLM` runs only in each block's first
    call. A plain `RecurrentLM` caches keys and values of every recurrence. Without the cache, all
    rows are computed in each call, with the same result up to rounding. In a single stream, the
    rows of known tokens hold noise too, at the highest level at which their block was trained:
    sigma_max for the first block and with `top_share` above 0.

    The tokens generated for a prompt depend on the generator's state, the prompt and its index in
    the batch. Up to rounding they do not depend on other prompts or on `max_new_tokens`. The noise
    does not depend on the device.

    Args:
        model: the blocks of a `CausalLM`, a `RecurrentLM` or a model wrapped by `dblocks.convert`,
            possibly wrapped by torch.compile or AveragedModel; or a plain `CausalLM` or
            `RecurrentLM`. Without a cache, converted models run all rows as in training.
        prompts: int64 [N, P], or a sequence of N prompts of different lengths, each with at least
            one token.
        max_new_tokens: number of tokens to generate for each prompt; by default from the
            generation_config.
        num_steps: number of steps on the equal-mass grid; by default the number of blocks. For a
            plain `RecurrentLM`, the number of recurrences; by default their mean in training.
        sigmas: descending levels to use instead.
        temperature: divisor of the logits, 1 by default; 0 chooses the most likely token.
        top_k: sample only from this many most likely tokens (and ties with the last one).
        top_p: then sample only from the smallest set of most likely tokens whose probabilities sum
            to at least this. The order is as in transformers: repetition_penalty, temperature,
            top_k, top_p.
        repetition_penalty: penalty on tokens that a text already contains, its prompt included;
            above 1 makes them less likely. See `dblocks.sampling.choice.Repeats`.
        generator: a CPU generator, from which one number is drawn.
        stop_token: one or several tokens. After a stop token, a prompt repeats it; the iterator
            ends when all prompts have one. This check after every token is the only synchronisation
            with a GPU.
        cache: whether to keep keys and values.
        product: sample from the product of all blocks' predictions instead of by steps; for blocks
            trained with a `top_share`.
        sampler: "euler" or "heun"; see `sample_heun`.
        attention_mask: [N, P], 0 at padding before or after each prompt of a tensor. Padding does
            not affect the result.
        generation_config: a GenerationConfig of transformers, or a mapping with its names, meanings
            and defaults: without `do_sample=True` the most likely token is chosen; with it, `top_k`
            is 50 by default. Supported are `max_new_tokens`, `max_length`, `do_sample`,
            `temperature`, `top_k`, `top_p`, `repetition_penalty`, `eos_token_id` (the stop token),
            `pad_token_id` (yielded after it) and `use_cache`. Other arguments override it.

    Yields:
        int64 [N], on the device of the model.

    Raises:
        FloatingPointError: logits are not finite; on a GPU raised at the end.
        TypeError: `model` is not a language model, or tokens are not integers.
        ValueError: a prompt is empty or, with the new tokens, longer than the context; a token is
            outside the vocabulary; both `num_steps` and `sigmas` are given; the model does not
            support `sigmas`, `num_steps`, `sampler` or a cache; `product` is combined with steps or
            a `sampler`, or blocks were not trained at sigma_max; the `generation_config` has an
            unknown or unsupported option; or another value is invalid.
    """
    writing = Writing.of(
        generation_config, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, repetition_penalty=repetition_penalty, stop_token=stop_token, cache=cache,
    )  # fmt: skip
    return _begin(
        model, prompts, attention_mask, writing, num_steps, sigmas, generator, product, sampler
    )


def _begin(
    model: DiffusionBlocks | NextTokenNetwork,
    prompts: Prompts,
    attention_mask: Tensor | None,
    writing: Writing,
    num_steps: int | None,
    sigmas: Tensor | Sequence[float] | None,
    generator: torch.Generator | None,
    product: bool,
    sampler: Sampler,
) -> Iterator[Tensor]:
    """The iterator of `stream`; checks run before the first token is requested."""
    model, cache = unwrapped(model), writing.cache
    if isinstance(model, DiffusionBlocks):
        model.before_use()
    network, sizes = _network_of(model, cache)
    choice = Choice(writing.temperature, writing.top_k, writing.top_p)
    _check_ends(writing, sizes.vocab_size)
    if attention_mask is not None:
        prompts = texts_of(cast(Tensor, prompts), attention_mask)
    rows = _prompt_rows(prompts, sizes.vocab_size)
    longest = max(map(len, rows))
    new = writing.new_tokens(longest)
    if longest + new > sizes.context:
        raise ValueError(
            "prompt and new tokens must fit in the context of "
            f"{sizes.context} tokens, got {longest} and {new}; shorten one"
        )
    check_sampler(sampler)
    k = cast(CausalNetwork, network).block_size if network is not model else 1
    # Blocks of tokens, including the last one, are generated as a whole.
    capacity = longest + -(-new // k) * k
    slots = Slots([len(row) for row in rows], capacity, next(network.parameters()).device, k)
    repeats = Repeats(writing.repetition_penalty, rows, sizes.vocab_size, slots.device)
    if product:
        _check_product(model, network, num_steps, sigmas, sampler)
    if isinstance(model, DiffusionBlocks):
        writer = _block_writer(model, slots, num_steps, sigmas, cache, product, sampler)
    else:
        writer = _plain_writer(model, slots, num_steps, sigmas, cache, sampler)
    seed = draw_seed(generator)
    tokens = torch.zeros(len(rows), slots.capacity, dtype=torch.int64)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    stride = sizes.context + k - 1  # rows of noise between one prompt and the next
    tokens, last = tokens.to(slots.device), longest + new
    return _steps(writer, tokens, slots, choice, repeats, seed, writing, stride, last)


def _network_of(model: Any, cache: bool) -> tuple[Any, TokenSizes]:
    """The network that generates (`model` itself if it is not in blocks) and its sizes."""
    in_blocks = isinstance(model, DiffusionBlocks)
    network = model.base_model if in_blocks else model
    if not isinstance(network, CausalNetwork if in_blocks else NextTokenNetwork):
        raise TypeError(
            "model must be a CausalLM, a RecurrentLM or the DiffusionBlocks of one, "
            f"got {type(network).__name__}; see dblocks.models, or dblocks.sampling.interface for "
            "networks of your own"
        )
    if in_blocks and cache and not isinstance(network, CachedNetwork):
        raise ValueError(
            f"cache must be False for the blocks of a {type(network).__name__}, which does not "
            "support one, got True; see dblocks.sampling.interface.CachedNetwork"
        )
    return network, network.sizes


def _block_writer(
    model: DiffusionBlocks,
    slots: Slots,
    num_steps: int | None,
    sigmas: Tensor | Sequence[float] | None,
    cache: bool,
    product: bool,
    sampler: Sampler,
) -> Writer:
    levels = levels_of(grid_of(model, num_steps, sigmas))
    if product:
        blocks = list(range(model.config.num_blocks))
    else:
        # A single step runs only the first block on purpose. Other grids may skip blocks by
        # mistake.
        blocks = [0] if num_steps == 1 else blocks_of(model, levels, stacklevel=5)
    network = model.base_model
    whole = not cache and getattr(network, "runs_whole", False)
    if whole or not isinstance(network, CachedNetwork):
        rows = WholeRows(model, slots)
    else:
        rows = CachedRows(model, blocks, slots, cache=cache)
    if product:
        return ProductWriter(model, rows)
    return StepWriter(model, rows, levels, blocks, sampler)


def _plain_writer(
    model: NextTokenNetwork,
    slots: Slots,
    num_steps: int | None,
    sigmas: Tensor | Sequence[float] | None,
    cache: bool,
    sampler: Sampler,
) -> Writer:
    kind = type(model).__name__
    if sigmas is not None:
        raise ValueError(
            f"sigmas must be None for a plain {kind}, which has no noise levels, "
            f"got {sigmas}; leave them out"
        )
    if sampler != "euler":
        raise ValueError(
            f"sampler must be 'euler', the default, for a plain {kind}, which has no noise levels, "
            f"got {sampler!r}; leave it out"
        )
    return PlainWriter(model, model.plain_steps(num_steps), slots, cache=cache)


@torch.no_grad()
def _steps(
    writer: Writer,
    tokens: Tensor,
    slots: Slots,
    choice: Choice,
    repeats: Repeats,
    seed: int,
    writing: Writing,
    stride: int,
    last: int,
) -> Iterator[Tensor]:
    """Fills `tokens` [N, capacity] from the end of the longest prompt up to `last`."""
    first, new = slots.prompt, slots.capacity - slots.prompt
    N, (count, width) = len(tokens), writer.noise_shape
    noise = _noise(N, count, stride, width, seed, tokens.device)
    sample, step = (torch.arange(n, device=tokens.device) for n in (N, new))
    uniform = uniforms_at(stride * sample[:, None] + step, seed)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    after = torch.zeros_like(finished, dtype=torch.int64)
    for j in range(new):
        place = j % slots.block_size
        if place == 0:
            logits = writer.next_logits(tokens[:, : first + j], noise, j)
        token = choice.token(repeats.penalised(logits[:, place]), uniform[:, j])
        if writing.stop_tokens:
            token = torch.where(finished, after, token)
            finished = finished | _among(token, writing.stop_tokens)
            pad = writing.pad_token
            after = token if pad is None else torch.full_like(token, pad)
        repeats.add(token)
        tokens[:, first + j] = token
        yield token
        if writing.stop_tokens and finished.all():
            break
        if first + j + 1 == last:
            break
    choice.check()


def _among(tokens: Tensor, stop_tokens: Sequence[int]) -> Tensor:
    """Which tokens are stop tokens; bool of the same shape."""
    # Python numbers: a tensor would be copied to the GPU at each step.
    found = tokens == stop_tokens[0]
    for stop_token in stop_tokens[1:]:
        found = found | (tokens == stop_token)
    return found


def _check_ends(writing: Writing, vocab_size: int) -> None:
    for token in writing.stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_token must be in 0..{vocab_size - 1}, got {token}")
    pad = writing.pad_token
    if pad is not None and not (isinstance(pad, int) and 0 <= pad < vocab_size):
        raise ValueError(f"pad_token_id must be None or in 0..{vocab_size - 1}, got {pad!r}")


def _check_product(
    model: object, network: object, num_steps: object, sigmas: object, sampler: str
) -> None:
    if not isinstance(model, DiffusionBlocks):
        raise ValueError(
            "product must be False for a model that is not in blocks, "
            f"got True for a plain {type(network).__name__}"
        )
    if num_steps is not None or sigmas is not None:
        raise ValueError(
            "product calls every block once, at sigma_max, so num_steps and sigmas must be None, "
            f"got {num_steps} and {sigmas}"
        )
    if sampler != "euler":
        raise ValueError(
            "product makes no steps between levels, so sampler must be 'euler', the default, "
            f"got {sampler!r}; leave it out"
        )
    check_trained_at_top(model)


def _noise(N: int, rows: int, stride: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Normal random numbers [N, rows, width], functions of seed, sample, row and column."""
    zeros = torch.zeros(1, rows * width, device=device)
    one = torch.ones((), device=device)
    drawn = [F.noise_inject(zeros, one, seed, offset=n * stride * width).z for n in range(N)]
    return torch.cat(cast(list[Tensor], drawn)).view(N, rows, width)


def _prompt_rows(prompts: Prompts, vocab_size: int) -> list[Tensor]:
    """The prompts as int64 tensors on the CPU, checked."""
    if isinstance(prompts, Mapping):
        raise TypeError(
            f"prompts must be rows of tokens, got a {type(prompts).__name__}; pass its "
            "'input_ids', and its attention_mask as attention_mask="
        )
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be rows of tokens, got text; encode it with a tokenizer")
    rows = [torch.as_tensor(prompt, device="cpu") for prompt in prompts]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    for n, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(
                f"each prompt must be a row of at least one token, got shape {list(row.shape)} for "
                f"prompt {n}; begin with a beginning-of-text token"
            )
        check_tokens(row[None], vocab_size)
    return rows
